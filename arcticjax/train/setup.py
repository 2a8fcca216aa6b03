"""Everything a training run needs before its first step.

It is built from the run's config and checked before anything compiles.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from arcticjax import errors
from arcticjax.config import RunConfig, TextContract
from arcticjax.data import catalog, layout, pipeline
from arcticjax.data.draw import Draw
from arcticjax.models.bert import Remat
from arcticjax.models.encoder import Encoder
from arcticjax.models.presets import random_start
from arcticjax.models.pretrained import Pretrained, load_pretrained
from arcticjax.models.spec import Pooling
from arcticjax.models.tokenizer import TextTokenizer
from arcticjax.parallel import mesh as meshes
from arcticjax.parallel.sharding import Sharding, make_sharding
from arcticjax.scoring.evaluator import Evaluator, load_tasks
from arcticjax.step import activations
from arcticjax.step import optimizer as optimizers
from arcticjax.step import state as states
from arcticjax.step import train as steps
from arcticjax.step.embedder import Embedder, templates
from arcticjax.step.objective import Objective

# Token slots of a microbatch at most, where train.microbatch is left out: what keeps a platform's
# matrix units busy.
_MICROBATCH_TOKENS = {"cpu": 2048}
_MICROBATCH_TOKENS_ELSEWHERE = 16384
# What a tokenizer consists of; copied into the run so that it stays complete without the model it
# started from.
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class Setup:
    """The parts of a run, ready to train.

    total_steps: of the whole run; encoder, start: the model and what it starts from; builder:
    batches by step; encoding, objective, sharding: what the training step does, and where; kept:
    its buffers.
    """

    config: RunConfig
    mesh: Mesh
    start: Pretrained
    tokenizer: TextTokenizer
    encoder: Encoder
    data: catalog.Catalog
    builder: pipeline.BatchBuilder
    total_steps: int
    optimizer: optax.GradientTransformation
    encoding: steps.Encoding
    objective: Objective
    sharding: Sharding
    train_step: Any
    kept: list[jax.ShapeDtypeStruct]
    embedder: Embedder
    evaluator: Evaluator

    @property
    def contract(self) -> TextContract:
        """What a text goes through before it is a vector, in this run."""
        return self.start.contract

    @property
    def shapes(self) -> layout.Shapes:
        """Static shapes of the training step."""
        return self.builder.shapes

    def initial_state(self) -> states.State:
        """The state before the first step, on the mesh."""
        arrays = {"params": self.start.params, "loss": self.objective.init()}
        return states.init_state(arrays, self.optimizer, self.sharding)

    def exact_embedder(self, params: Any) -> Embedder:
        """An embedder of these parameters in float32, whatever the run computes in: for exports."""
        return Embedder(self.encoder, params, self.tokenizer, self.contract, self.mesh)

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says of itself beside its arrays."""
        return {
            "model": {
                "spec": self.start.spec.to_hf(),
                "name": self.start.name,
                "sha256": self.start.sha256,
                "tokenizer_sha256": self.tokenizer.sha256,
            },
            "contract": self.contract.to_dict(),
            "data_fingerprint": self.data.fingerprint,
            "global_batch": self.config.train.global_batch,
            "total_steps": self.total_steps,
        }


def prepare(config: RunConfig, mesh: Mesh) -> Setup:
    """Loads the model, opens the data and builds the programs; raises an ArcticError for whatever
    does not fit."""
    devices = mesh.devices.size
    batch = config.train.global_batch
    if batch % devices:
        raise errors.ConfigError(
            f"train.global_batch: {batch} pairs do not divide among {devices} devices; take a "
            f"multiple of {devices}, such as {layout.round_up(batch, devices)}, or fewer devices "
            "(mesh.data)"
        )
    start = _start(config)
    tokenizer = TextTokenizer.from_file(start.tokenizer_file)
    sides = templates(start.contract, tokenizer)
    data = catalog.open_sources(config, tokenizer)
    weights = [view.weight for view in data.views]
    draw = Draw(
        [len(view) for view in data.views],
        batch,
        config.run.seed,
        None if None in weights else [float(weight or 0) for weight in weights],
    )
    shapes = pipeline.choose_shapes(
        data.views,
        draw,
        sides["query"],
        sides["document"],
        devices=devices,
        row_length=config.data.row_length,
        rows=config.train.microbatch,
        hidden_size=start.spec.hidden_size,
        intermediate_size=start.spec.intermediate_size,
        most_tokens=_MICROBATCH_TOKENS.get(jax.default_backend(), _MICROBATCH_TOKENS_ELSEWHERE),
    )
    builder = pipeline.BatchBuilder(
        data.views,
        draw,
        shapes,
        sides["query"],
        sides["document"],
        meshes.local_positions(mesh),
        tokenizer.pad_id,
    )
    total_steps = config.train.total_steps or draw.steps_per_epoch
    if config.optimizer.warmup_steps + (config.optimizer.decay_steps or 0) > total_steps:
        raise errors.ConfigError(
            f"optimizer.warmup_steps {config.optimizer.warmup_steps} and optimizer.decay_steps "
            f"{config.optimizer.decay_steps or 0} are more than the {total_steps} steps of the run"
        )
    encoder = Encoder(start.spec)
    optimizer = optimizers.make_optimizer(config.optimizer, total_steps)
    objective = _objective(config, start)
    sharding = make_sharding({"params": start.params, "loss": objective.init()}, mesh)
    encoding, kept = _choose_encoding(config, encoder, start.contract.pooling, shapes, sharding)
    train_step = steps.make_train_step(
        encoding,
        objective,
        shapes,
        sharding,
        optimizer,
        optimizers.make_schedule(config.optimizer, total_steps),
        config.optimizer.clip_norm,
    )
    embedder = Embedder(
        encoder,
        None,  # the run lends it the parameters of its state
        tokenizer,
        start.contract,
        mesh,
        dtype=encoding.dtype,
    )
    made = {"docstrings": data.task_folder} if data.task_folder is not None else {}
    evaluator = Evaluator(load_tasks(config.evaluation.tasks, made), embedder, mesh)
    return Setup(
        config=config,
        mesh=mesh,
        start=start,
        tokenizer=tokenizer,
        encoder=encoder,
        data=data,
        builder=builder,
        total_steps=total_steps,
        optimizer=optimizer,
        encoding=encoding,
        objective=objective,
        sharding=sharding,
        train_step=train_step,
        kept=kept,
        embedder=embedder,
        evaluator=evaluator,
    )


def _objective(config: RunConfig, start: Pretrained) -> Objective:
    loss, width = config.loss, start.spec.hidden_size
    for index, one in enumerate(loss.matryoshka):
        if one.size > width:
            raise errors.ConfigError(
                f"loss.matryoshka.{index}.size: {one.size} is more than the {width} numbers of an "
                f"embedding of {start.name}"
            )
    return Objective(
        temperature=loss.temperature,
        learn_temperature=loss.learn_temperature,
        symmetric=loss.symmetric,
        query_query=loss.query_query,
        document_query=loss.document_query,
        document_document=loss.document_document,
        matryoshka=tuple((one.size, one.weight) for one in loss.matryoshka),
        margin=loss.margin,
        gather_dtype=loss.gather,
        tile=loss.tile,
    )


def _choose_encoding(
    config: RunConfig,
    encoder: Encoder,
    pooling: Pooling,
    shapes: layout.Shapes,
    sharding: Sharding,
) -> tuple[steps.Encoding, list[jax.ShapeDtypeStruct]]:
    """How a step encodes, and the buffers that it needs for that."""
    train = config.train

    def encoding(passes: steps.Passes) -> steps.Encoding:
        usual: Remat = "named" if passes == "one" else "none"
        remat = usual if train.remat == "auto" else train.remat
        return steps.Encoding(encoder, pooling, jnp.dtype(train.precision), passes, remat)

    most = encoding("two" if train.passes == "two" else "one")
    kept = steps.kept_shapes(most, shapes, sharding)
    room = meshes.device_memory()
    if train.passes == "auto" and (room is None or activations.buffer_bytes(kept) > room // 4):
        return encoding("two"), []
    return most, kept


def copy_tokenizer(tokenizer_file: Path, target: Path) -> None:
    """Copies a tokenizer into `target` as tokenizer.json, with what belongs to it beside."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tokenizer_file, target / "tokenizer.json")
    for name in _TOKENIZER_FILES:
        file = tokenizer_file.with_name(name)
        if file.is_file():
            shutil.copyfile(file, target / name)


def _start(config: RunConfig) -> Pretrained:
    model, data = config.model, config.data
    contract: dict[str, Any] = {
        "pooling": model.pooling,
        "query_prompt": model.query_prompt,
        "document_prompt": model.document_prompt,
        "query_length": data.query_length,
        "document_length": data.document_length,
    }
    if model.preset is not None:
        return random_start(
            model.preset, seed=config.run.seed, tokenizer=model.tokenizer or "", **contract
        )
    start = load_pretrained(model.init or "", keep_layers=model.keep_layers, **contract)
    if model.tokenizer is None:
        return start
    tokenizer = TextTokenizer.from_file(Path(model.tokenizer))
    if tokenizer.vocab_size > start.spec.vocab_size:
        raise errors.ConfigError(
            f"model.tokenizer: {tokenizer.file} has {tokenizer.vocab_size} tokens, but "
            f"{model.init} has a token table of {start.spec.vocab_size} rows: it does not match "
            "the weights; leave model.tokenizer out to take the one beside the weights"
        )
    return dataclasses.replace(start, tokenizer_file=tokenizer.file)
