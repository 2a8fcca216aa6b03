"""Everything a training run needs before its first step.

It is built from the run's config and checked before anything compiles.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from arcticjax import errors
from arcticjax.config import RunConfig, TextContract
from arcticjax.data import catalog, layout, lineage, list_pipeline, pipeline
from arcticjax.export import readers, record
from arcticjax.export.source import Source, open_source
from arcticjax.models.presets import random_start
from arcticjax.models.pretrained import Pretrained, contract_options, load_pretrained
from arcticjax.models.tokenizer import TextTokenizer
from arcticjax.parallel import mesh as meshes
from arcticjax.scoring.evaluator import Evaluator, load_tasks
from arcticjax.step import program as programs
from arcticjax.step import state as states
from arcticjax.step.embedder import Embedder, templates

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

    total_steps: of the whole run; start: the model and what it starts from; builder: batches by
    step; program: the training step; guide: the model of `loss.guide`.
    """

    config: RunConfig
    mesh: Mesh
    start: Pretrained
    tokenizer: TextTokenizer
    data: catalog.Catalog
    builder: pipeline.BatchBuilder | list_pipeline.ListBatchBuilder
    total_steps: int
    program: programs.Program
    embedder: Embedder
    evaluator: Evaluator
    guide: Source | None = None

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
        return self.program.initial_state(self.start.params)

    def guide_params(self) -> Any:
        """The guide's parameters, whole on every device; None without a guide."""
        return self.guide and meshes.replicate(self.mesh, self.guide.params)

    def exact_embedder(self, params: Any) -> Embedder:
        """An embedder of these parameters in float32, whatever the run computes in: for exports."""
        return Embedder(self.program.encoder, params, self.tokenizer, self.contract, self.mesh)

    def announcements(self) -> list[dict[str, Any]]:
        """Every program that the run compiles, with its sizes: `compiled_shapes` of the result."""
        asked = self.config.evaluation
        found = [
            self.program.announcement(),
            *self.evaluator.programs(len(asked.demo_queries), asked.demo_top),
        ]
        if self.config.export.enabled:
            exact = self.exact_embedder(None).shapes()
            found.append({"program": "encode", "purpose": "export", **exact})
            # One device reads the folder back: with the same program, where the run has no more.
            if readers.read_here() and self.mesh.devices.size > 1:
                found.append({**found[-1], "purpose": "certificate", "devices": 1})
        return found

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says of itself beside its arrays."""
        return {
            "model": {
                "spec": self.start.spec.to_hf(),
                "name": self.start.name,
                "sha256": self.start.sha256,
                "revision": self.start.revision,
                "tokenizer_sha256": self.tokenizer.sha256,
            },
            "contract": self.contract.to_dict(),
            **({"guide": {"sha256": self.guide.sha256}} if self.guide else {}),
            "data_fingerprint": self.data.fingerprint,
            "global_batch": self.config.train.global_batch,
            "total_steps": self.total_steps,
        }

    def lineage(self) -> dict[str, Any]:
        """Where model and data come from, for the record and the model card."""
        return {
            "base_model": record.base_model(self.config.model.init),
            "base_sha256": self.start.sha256,
            "total_steps": self.total_steps,
            "data": lineage.describe(self.config, self.data),
        }


def prepare(config: RunConfig, mesh: Mesh) -> Setup:
    """Loads the model, opens the data and builds the programs; raises an ArcticError for whatever
    does not fit."""
    programs.check_global_batch(config.train.global_batch, mesh.devices.size)
    start = _start(config)
    tokenizer = TextTokenizer.from_file(start.tokenizer_file)
    sides = templates(start.contract, tokenizer)
    data = catalog.open_sources(config, tokenizer)
    guide = _guide(config, tokenizer)
    draw = programs.make_draw(config, data.views)
    shapes = programs.choose_shapes(config, start.spec, data.views, draw, sides, mesh)
    total_steps = config.train.total_steps or draw.steps_per_epoch
    builder = programs.make_builder(
        config,
        data.views,
        draw,
        shapes,
        sides,
        meshes.local_positions(mesh),
        total_steps,
        tokenizer.pad_id,
    )
    if config.optimizer.warmup_steps + (config.optimizer.decay_steps or 0) > total_steps:
        raise errors.ConfigError(
            f"optimizer.warmup_steps {config.optimizer.warmup_steps} and optimizer.decay_steps "
            f"{config.optimizer.decay_steps or 0} are more than the {total_steps} steps of the run"
        )
    program = programs.build(
        config,
        start.spec,
        start.contract.pooling,
        shapes,
        mesh,
        total_steps,
        meshes.device_memory(),
        guide and (guide.spec, guide.contract.pooling),
    )
    embedder = Embedder(
        program.encoder,
        None,  # the run lends it the parameters of its state
        tokenizer,
        start.contract,
        mesh,
        dtype=jnp.dtype(config.train.precision),
    )
    made = {"docstrings": data.task_folder} if data.task_folder is not None else {}
    evaluator = Evaluator(load_tasks(config.evaluation.tasks, made), embedder, mesh)
    return Setup(
        config=config,
        mesh=mesh,
        start=start,
        tokenizer=tokenizer,
        data=data,
        builder=builder,
        total_steps=total_steps,
        program=program,
        embedder=embedder,
        evaluator=evaluator,
        guide=guide,
    )


def copy_tokenizer(tokenizer_file: Path, target: Path) -> None:
    """Copies a tokenizer into `target` as tokenizer.json, with what belongs to it beside."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tokenizer_file, target / "tokenizer.json")
    for name in _TOKENIZER_FILES:
        file = tokenizer_file.with_name(name)
        if file.is_file():
            shutil.copyfile(file, target / name)


def _guide(config: RunConfig, tokenizer: TextTokenizer) -> Source | None:
    """The model of `loss.guide`, whose tokens and lengths must be those of the run."""
    if config.loss.guide is None:
        return None
    name, data = config.loss.guide.model, config.data
    guide = open_source(name, pooling=config.loss.guide.pooling)
    if not tokenizer.same_tokens(TextTokenizer.from_file(guide.tokenizer_folder)):
        raise errors.ConfigError(
            f"loss.guide.model: {name} has another tokenizer than the trained model, whose tokens "
            "it would read; take a guide of the same vocabulary"
        )
    longest = max(data.query_length, data.document_length)
    if longest > guide.spec.max_positions:
        raise errors.ConfigError(
            f"loss.guide.model: {name} takes {guide.spec.max_positions} tokens, but "
            f"data.query_length / data.document_length are up to {longest}; shorten them, or take "
            "another guide"
        )
    return guide


def _start(config: RunConfig) -> Pretrained:
    model, contract = config.model, contract_options(config)
    if model.preset is not None:
        return random_start(
            model.preset, seed=config.run.seed, tokenizer=model.tokenizer or "", **contract
        )
    return load_pretrained(
        model.init or "", keep_layers=model.keep_layers, tokenizer=model.tokenizer, **contract
    )
