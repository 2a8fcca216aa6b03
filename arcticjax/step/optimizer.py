"""AdamW, its schedules and its decay mask, from optax."""

from __future__ import annotations

from typing import Any

import jax
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


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2017) with decay decoupled and masked.

    Clipping is the training step's: it has the norm of the whole gradient already.
    """
    return optax.adamw(
        make_schedule(config, total_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
