"""Every field of a run's configuration: its type, its default, its range and its unit."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from arcticjax.config.checks import cross_field_problems
from arcticjax.config.contract import Pooling
from arcticjax.config.loss import LossConfig
from arcticjax.config.negatives import NegativesConfig
from arcticjax.config.problem import Problem
from arcticjax.config.section import (
    Fraction,
    Language,
    Length,
    Name,
    NonNegative,
    Positive,
    PositiveNumber,
    Section,
    Text,
)

CROSS_FIELD = "cross_field"


class Root(Section):
    """A whole config. Cross-field rules hold in every instance."""

    @staticmethod
    def problems(config: Any) -> list[Problem]:
        """Every broken rule that ties several fields together; see `checks`.

        config: an instance, or what has its attributes and raises `checks.Unknown` for wrong ones.
        """
        return []

    @model_validator(mode="after")
    def _cross_field(self) -> Self:
        problems = self.problems(self)
        if problems:
            text = "; ".join(f"{'.'.join(map(str, path))}: {why}" for path, why in problems)
            raise PydanticCustomError(CROSS_FIELD, "{text}", {"text": text, "problems": problems})
        return self


class RunSection(Section):
    directory: Text = Field(
        description="Folder of the run: config, metrics, checkpoints, report and export. The same "
        "command on the same folder resumes. Relative to the working directory; or a place in a "
        "bucket, s3://BUCKET/NAME or gs://BUCKET/NAME."
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        default=0, description="Decides initial weights and the order of the data."
    )
    compilation_cache: Text = Field(
        default="auto",
        description="Private folder of compiled programs, which later runs take from there. auto: "
        "arcticjax/compiled in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache). none: "
        "nothing is kept. JAX_COMPILATION_CACHE_DIR in the environment goes before it.",
    )


Preset = Literal[
    "xs",
    "s",
    "m",
    "m-v1.5",
    "m-long",
    "l",
    "m-v2",
    "l-v2",
    "modernbert-base",
    "modernbert-large",
]


class ModelConfig(Section):
    init: Text | None = Field(
        default=None,
        description="Pretrained encoder to start from: a folder or a hub name. Give this or "
        "preset.",
    )
    preset: Preset | None = Field(
        default=None,
        description="Architecture to start from with random weights; needs tokenizer. Give this "
        "or init.",
    )
    tokenizer: Text | None = Field(
        default=None,
        description="tokenizer.json or the folder that holds it; beside init with its tokens, if "
        "init has one. null: init's own.",
    )
    pooling: Pooling | None = Field(
        default=None,
        description="How token vectors become one vector. null: init's own; cls for a preset.",
    )
    keep_layers: Positive | None = Field(
        default=None, description="Keep only the first so many layers. null: all."
    )
    query_prompt: str | None = Field(
        default=None,
        description="Put before every query; ends in a space, or is empty. null: init's own, "
        "none for a preset.",
    )
    document_prompt: str | None = Field(
        default=None,
        description="Put before every document; ends in a space, or is empty. null: init's own, "
        "none for a preset.",
    )


class SourceConfig(Section):
    name: Name = Field(
        description="Name of the source in metrics and in the cache, once per config."
    )
    path: Text = Field(
        description="A stored source, a Parquet or JSONL[.gz] file or folder of them, either also "
        "in a bucket (s3://), hub:NAME or tfds:NAME; with data.negatives also "
        "beir:FOLDER?split=train, msmarco:FOLDER?split=train&negatives=FILE or "
        "arctictraining:FOLDER."
    )
    query: Text = Field(default="query", description="Column that holds the query.")
    document: Text = Field(
        default="document",
        description="Column that holds the document; with data.negatives also a list of them, all "
        "of them positives.",
    )
    negatives: list[Text] = Field(
        default=[],
        description="Columns that hold hard negatives, a text or a list of them each, hardest "
        "first. []: none.",
    )
    scores: list[Text] = Field(
        default=[],
        description="Columns that hold a teacher's scores, a number or a list of them each: "
        "together one for every document and then every negative of the record. []: none.",
    )
    candidates: Text | None = Field(
        default=None,
        description="Folder of candidates that were mined for this source under its name; hard "
        "negatives are cut from them by data.negatives.*. null: none.",
    )
    corpus: Text | None = Field(
        default=None,
        description="With candidates that were mined from a corpus beside the pairs: that corpus, "
        "as in mining's input.N.corpus. null: none.",
    )
    corpus_column: Text = Field(
        default="text", description="Column of corpus that holds the document."
    )
    parents: list[Text] = Field(
        default=[],
        description="Columns that say of which larger document each document is a piece (a page's "
        "title or id), a text or number or a list of them each: together one for every document "
        "and then every negative of the record; with candidates the one column of the document, "
        "of a BEIR folder the key in corpus.jsonl. No piece of a positive's own document is its "
        "query's hard negative. []: documents stand alone.",
    )
    weight: PositiveNumber | None = Field(
        default=None,
        description="Share of the batches, relative to the other sources' weights; all sources "
        "have one or none has. null: in proportion to the source's size.",
    )
    bad_records: Literal["error", "skip"] = Field(
        default="error",
        description="What to do with a record that is no pair of texts, or with data.negatives no "
        "list of them, or no text or relation of a published set: stop, or leave it out and count "
        "it. Sources that are stored already hold none.",
    )
    bad_records_limit: Fraction = Field(
        default=0.01, description="Share of the source's records that may be left out by skip."
    )
    licence: Text | None = Field(
        default=None,
        description="Licence of the texts, for the model card (apache-2.0, cc-by-sa-4.0, ...). "
        "null: what a stored source says, else left out.",
    )
    language: list[Language] = Field(
        default=[],
        description="Languages of the texts, for the model card, as ISO 639 codes ([en, de]). "
        "[]: what a stored source says, else left out.",
    )


class DocstringsConfig(Section):
    packages: list[Text] | Literal["installed"] = Field(
        default="installed",
        description="Python packages, by import name, whose docstrings become pairs (summary line "
        "-> body), one source per package. installed: all that are found.",
    )
    held_out: list[Text] = Field(
        default=[],
        description="Packages, by import name, that are never trained on; their pairs become the "
        "docstrings evaluation task.",
    )
    max_pairs: Positive = Field(default=4000, description="Pairs taken from one package at most.")
    min_pairs: Positive | None = Field(
        default=None,
        description="Packages with fewer pairs share one source. null: train.global_batch.",
    )
    max_documents: Positive = Field(
        default=1000, description="Documents in the evaluation task at most."
    )


class DataConfig(Section):
    sources: list[SourceConfig] = Field(
        default=[], description="Files of pairs to train on; see data.sources.N.*"
    )
    docstrings: DocstringsConfig | None = Field(
        default=None,
        description="Also train on the docstrings of installed Python packages; {} takes the "
        "defaults of data.docstrings.*. null: no.",
    )
    positives: Positive = Field(
        default=1,
        description="Positives of a query in a batch at most, those that the teacher scores "
        "highest; more than 1 needs data.negatives.",
    )
    negatives: NegativesConfig | None = Field(
        default=None,
        description="Hard negatives: how they are cut from each source's candidates or negative "
        "columns; see data.negatives.*. null: the sources are pairs.",
    )
    query_length: Length = Field(
        default=32, description="Tokens of a query at most, special tokens and prompt included."
    )
    document_length: Length = Field(
        default=256,
        description="Tokens of a document at most, special tokens and prompt included.",
    )
    row_length: Annotated[int, Field(ge=8)] | None = Field(
        default=None,
        description="Tokens in a row into which texts are packed; no less than the two lengths "
        "above. null: chosen from the data.",
    )
    small_sources: Literal["error", "merge", "drop"] = Field(
        default="error",
        description="What to do with a source that has fewer pairs than train.global_batch.",
    )
    stratified: bool = Field(
        default=True,
        description="Every global batch comes from one source. false: batches mix all sources.",
    )
    cache: Text | None = Field(
        default=None,
        description="Folder of tokenised sources. null: cache inside run.directory, or in the "
        "user's cache folder if that is in a bucket.",
    )
    threads: Positive = Field(default=2, description="Threads that read data, per process.")
    prefetch: Positive = Field(default=2, description="Global batches made ready ahead of use.")


class OptimizerConfig(Section):
    learning_rate: PositiveNumber = Field(description="Peak learning rate of AdamW.")
    schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        default="linear",
        description="Shape of the learning rate after warm-up; wsd: constant, then a linear decay "
        "over the last decay_steps.",
    )
    warmup_steps: NonNegative = Field(
        default=0, description="Steps over which the learning rate rises to its peak."
    )
    decay_steps: Positive | None = Field(
        default=None, description="Length in steps of the final decay; wsd only, required there."
    )
    final_fraction: Fraction = Field(
        default=0.0, description="Where the learning rate ends, as a fraction of its peak."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.01, description="Decoupled weight decay; biases and norms have none."
    )
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="Decay of the mean of the gradient, per step."
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.999, description="Decay of the mean of the squared gradient, per step."
    )
    epsilon: PositiveNumber = Field(default=1e-8, description="Added to AdamW's denominator.")
    freeze_embeddings: bool = Field(
        default=False, description="Leave the token, position and type tables as they are."
    )
    freeze_layers: NonNegative = Field(
        default=0,
        description="Leave so many layers, from the input on, as they are; needs "
        "freeze_embeddings.",
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="Each layer learns at this share of the rate of the layer above it, the "
        "embeddings below all of them.",
    )
    clip_norm: PositiveNumber | None = Field(
        default=1.0, description="Global gradient norm above which it is scaled down. null: never."
    )


class TrainConfig(Section):
    total_steps: Positive | None = Field(
        default=None, description="Optimiser steps in the run. null: one exact epoch of the data."
    )
    global_batch: Annotated[int, Field(ge=2)] = Field(
        description="Pairs in one step, over all devices."
    )
    microbatch: Positive | None = Field(
        default=None,
        description="Rows that a device encodes at once; bounds memory, not the result. null: "
        "chosen.",
    )
    passes: Literal["auto", "one", "two"] = Field(
        default="auto",
        description="one: keep the activations of the whole batch until its loss is known. two: "
        "encode a second time instead, in a small constant memory and a third more computing. "
        "auto: one where that takes at most a quarter of a device's memory.",
    )
    ladder: Literal["auto"] | Annotated[list[Positive], Field(max_length=8)] = Field(
        default="auto",
        description="Ascending numbers of rows: a batch that needs no more on any device than one "
        "of them is encoded in one piece of that many, all its activations kept and none copied; "
        "each takes a program of its own to compile, larger batches go in microbatches and two "
        "passes. auto: on GPUs up to two from sampled batches, where those activations take at "
        "most a quarter of a device's memory or passes is one; else none. []: none. More rows than "
        "a device can fill are refused.",
    )
    remat: Literal["auto", "none", "dots", "named", "full"] = Field(
        default="auto",
        description="What is kept of a layer for its backward pass: all (none recomputed), the "
        "results of matrix products and of attention (dots), those and what else is dear to a CPU "
        "(named), or the layer's input (full: all recomputed). auto: dots; on a CPU named with one "
        "pass, none with two.",
    )
    attention: Literal["auto", "xla", "looped", "cudnn", "packed", "splash"] = Field(
        default="auto",
        description="How attention is computed in training: by the compiler, for all heads at once "
        "(xla) or for one after another (looped), both on any device and in any precision; on "
        "NVIDIA GPUs by cuDNN or by kernels that skip what lies between texts (packed, rows of a "
        "multiple of 64 tokens); on TPUs by the splash kernel (rows of a multiple of 128 tokens); "
        "these three in bfloat16 only. auto: the fastest by the package's table of measurements; "
        "xla where it has none.",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Type the encoder computes in; weights, statistics and loss are float32.",
    )
    nonfinite: Literal["error", "skip", "rollback"] = Field(
        default="error",
        description="What follows a loss or gradient that is not finite, whose update is never "
        "applied. error: the run stops. skip: it goes on with the next batch. rollback: so too, "
        "from the weights and moments of the newest checkpoint; the updates since are lost.",
    )
    nonfinite_limit: Positive = Field(
        default=10, description="Steps of a run that may be not finite; one more stops it."
    )
    log_every_steps: Positive = Field(
        default=1, description="Steps between two lines of metrics.jsonl."
    )


class MeshConfig(Section):
    data: Positive | Literal["auto"] = Field(
        default="auto", description="Devices that share the global batch. auto: all."
    )
    fsdp: Positive = Field(
        default=1,
        description="Devices that share the layers' matrices, each gathered when it is needed; "
        "they share the global batch too. 1: every device has them all.",
    )
    slices: Positive | Literal["auto"] = Field(
        default="auto",
        description="Equal parts of these devices with a slow network between them; documents are "
        "gathered inside a part first. auto: what the devices report.",
    )
    platform: Literal["auto", "cpu", "gpu", "tpu"] = Field(
        default="auto", description="Kind of device. auto: the best that jax finds."
    )
    policy: Literal["required", "preferred"] = Field(
        default="required",
        description="When platform is not there: required stops, preferred runs on the CPU and "
        "says so.",
    )
    check_every_steps: Positive = Field(
        default=100,
        description="Steps between two checks that all processes do the same; the first step is "
        "always checked.",
    )
    peer_seconds: PositiveNumber = Field(
        default=60.0,
        description="A process that shows no sign of life for so long is lost; the others stop.",
    )
    hang_seconds: PositiveNumber | None = Field(
        default=3600.0,
        description="A run that makes no progress for so long stops; more than the longest step, "
        "compilation, evaluation of all tasks or export takes. null: never.",
    )


class CheckpointConfig(Section):
    save_every_steps: Positive = Field(
        default=100, description="Steps between two checkpoints; the last step is always saved."
    )
    keep: Positive = Field(default=2, description="Checkpoints kept; older ones are deleted.")


class EvaluationConfig(Section):
    tasks: list[Text] = Field(
        default=[],
        description="Retrieval tasks scored before and after training: beir:FOLDER, or docstrings "
        "(the held-out packages).",
    )
    every_steps: Positive | None = Field(
        default=None,
        description="Also score every so many steps. null: only before and after.",
    )
    demo_queries: list[Text] = Field(
        default=[], description="Queries searched at the end, to look at the answers."
    )
    demo_top: Positive = Field(default=3, description="Answers shown for each demo query.")


class ExportConfig(Section):
    enabled: bool = Field(
        default=True, description="Write a sentence-transformers folder at the end."
    )
    licence: Text | None = Field(
        default=None,
        description="Licence of the model, for its card (apache-2.0, ...). null: left out.",
    )


class ReportConfig(Section):
    tensorboard: bool = Field(default=False, description="Mirror the metrics to TensorBoard.")
    plots: bool = Field(default=True, description="Draw loss and scores as PNG files.")


class RunConfig(Root):
    """A whole run of training."""

    run: RunSection = Field(description="Where the run lives and what it can be repeated from.")
    model: ModelConfig = Field(description="The encoder and the text contract it starts with.")
    data: DataConfig = Field(description="The pairs, and how they are cut and packed.")
    loss: LossConfig = Field(default=LossConfig(), description="InfoNCE.")
    optimizer: OptimizerConfig = Field(description="AdamW and its learning rate over time.")
    train: TrainConfig = Field(description="How long, how many pairs a step, in what precision.")
    mesh: MeshConfig = Field(default=MeshConfig(), description="The devices.")
    checkpoint: CheckpointConfig = Field(
        default=CheckpointConfig(), description="How often the run is saved."
    )
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="How well it retrieves."
    )
    export: ExportConfig = Field(default=ExportConfig(), description="What is handed on.")
    report: ReportConfig = Field(default=ReportConfig(), description="What is shown.")

    @staticmethod
    def problems(config: Any) -> list[Problem]:
        """Every broken rule; see `Root.problems`."""
        return cross_field_problems(config)
