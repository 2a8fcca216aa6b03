"""AdamW, its schedules and its decay mask, from optax."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

from arcticjax.config.schema import OptimizerConfig

# Biases and normalisation scales are not decayed, as is usual for BERT (Devlin et al. 2018, A.2); a
# temperature has no reason to be near 1.
_UNDECAYED = ("bias", "scale", "log_temperature")


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate of each step, counted from 0, over `total_steps` steps.

    The first of w warm-up steps uses 1/w of the peak and the w-th the peak itself. Linear and
    cosine fall from there to `final_fraction` of the peak at `total_steps`; wsd stays at the peak
    and falls linearly over the last `decay_steps`.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    last = peak * config.final_fraction
    after = max(1, total_steps - warmup)
    if config.schedule == "constant":
        main = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        main = optax.linear_schedule(peak, last, after)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, after, alpha=config.final_fraction)
    else:
        decay = config.decay_steps or 1
        main = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, last, decay)],
            [max(0, after - decay)],
        )
    if not warmup:
        return main
    # optax counts from 0: start at peak / warmup, so that no step is spent at rate 0.
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, main], [warmup])


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay applies to: matrices and embedding tables."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) not in _UNDECAYED, params
    )


def rate_shares(config: OptimizerConfig, pieces: Any) -> Any:
    """The share of the learning rate that each leaf has: a number, or one for each of its layers.

    pieces: of `Sharding.cut`, layers along axis 0 of the leaves below `layers`. The top layer has
    the whole rate, one below it `layer_decay` of that and so on, the embeddings one step more;
    frozen ones have 0.
    """
    layers = max((leaf.shape[0] for path, leaf in _named(pieces) if "layers" in path), default=0)

    def one(path: Any, leaf: Any) -> Any:
        keys = _keys(path)
        if "layers" in keys:
            height = np.arange(leaf.shape[0])
            share = config.layer_decay ** (layers - 1.0 - height)
            return np.where(height < config.freeze_layers, 0, share)[:, None].astype(np.float32)
        if "embeddings" in keys:
            return 0.0 if config.freeze_embeddings else config.layer_decay**layers
        return 1.0

    return jax.tree_util.tree_map_with_path(one, pieces)


def without_frozen(config: OptimizerConfig, gradients: Any) -> Any:
    """Gradients with those of frozen parameters 0, so that they do not count in the norm."""
    if not config.freeze_embeddings:
        return gradients
    shares = rate_shares(config, gradients)
    return jax.tree.map(
        lambda one, share: one * np.float32(np.asarray(share) > 0), gradients, shares
    )


def _keys(path: Any) -> list[Any]:
    return [getattr(key, "key", None) for key in path]


def _named(tree: Any) -> list[tuple[list[Any], Any]]:
    return [(_keys(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2017) with decay decoupled and masked, for pieces of parameters.

    Clipping is the training step's: it has the norm of the whole gradient already.
    """
    adamw = optax.adamw(
        make_schedule(config, total_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.layer_decay == 1 and not config.freeze_embeddings:
        return adamw

    def scale(changes: Any, params: Any) -> Any:
        shares = rate_shares(config, changes)
        return jax.tree.map(lambda change, share: change * share, changes, shares)

    return optax.chain(adamw, optax.stateless(scale))


def at_step(optimizer: Any, step: jax.Array) -> Any:
    """The optimiser's state with its schedule at `step`: a step whose update was left out, or taken
    back, is a step of the schedule all the same."""

    def scheduled(part: Any) -> bool:
        return isinstance(part, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda part: part._replace(count=step) if scheduled(part) else part,
        optimizer,
        is_leaf=scheduled,
    )
