"""Every field of a mining run's configuration: its type, its default, its range and its unit."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from pydantic import Field

from arcticjax.config.contract import Pooling
from arcticjax.config.problem import Problem, Unknown
from arcticjax.config.schema import Length, Name, Root, Text
from arcticjax.config.section import NonNegative, Positive, PositiveNumber, Section


class InputConfig(Section):
    name: Name = Field(
        description="Name of the input, once per config; the name of the training source that "
        "takes its negatives from here."
    )
    path: Text = Field(
        description="Queries with their positives, and the corpus: a stored source, a Parquet or "
        "JSONL[.gz] file or folder of them, hub:NAME, tfds:NAME, or a BEIR folder as beir:FOLDER "
        "or beir:FOLDER?split=train."
    )
    query: Text = Field(
        default="query", description="Column that holds the query; unused for a BEIR folder."
    )
    document: Text = Field(
        default="document",
        description="Column that holds the query's positive; all of them are the corpus. Unused "
        "for a BEIR folder.",
    )

    corpus: Text | None = Field(
        default=None,
        description="A larger corpus for these queries, beside their positives, which are always "
        "part of it: a Parquet or JSONL[.gz] file or folder of them, hub:NAME, tfds:NAME, or a "
        "stored source, whose documents it is. null: the positives alone. Not for a BEIR folder, "
        "which brings its own.",
    )
    corpus_column: Text = Field(
        default="text", description="Column of corpus that holds the document."
    )


class ContractConfig(Section):
    pooling: Pooling | None = Field(
        default=None,
        description="How token vectors become one vector; for a plain Hugging Face folder, which "
        "does not state it. null: the teacher's own.",
    )
    query_prompt: str | None = Field(
        default=None,
        description="Put before every query; ends in a space, or is empty. null: the teacher's "
        "own.",
    )
    document_prompt: str | None = Field(
        default=None,
        description="Put before every document; ends in a space, or is empty. null: the teacher's "
        "own.",
    )
    query_length: Length | None = Field(
        default=None,
        description="Tokens of a query at most, special tokens and prompt included. null: the "
        "teacher's own.",
    )
    document_length: Length | None = Field(
        default=None,
        description="Tokens of a document at most, special tokens and prompt included. null: the "
        "teacher's own.",
    )


class MiningMeshConfig(Section):
    data: Positive | Literal["auto"] = Field(
        default="auto", description="Devices that share the work. auto: all."
    )
    platform: Literal["auto", "cpu", "gpu", "tpu"] = Field(
        default="auto", description="Kind of device. auto: the best that jax finds."
    )
    policy: Literal["required", "preferred"] = Field(
        default="required",
        description="When platform is not there: required stops, preferred runs on the CPU and "
        "says so.",
    )
    peer_seconds: PositiveNumber = Field(
        default=60.0,
        description="A process that shows no sign of life for so long is lost; the others stop.",
    )


class MiningReportConfig(Section):
    negatives: Positive = Field(
        default=10,
        description="Candidates that must pass a threshold for a query to count as kept.",
    )
    queries: Positive = Field(
        default=2000,
        description="Queries whose lists are compared text by text to estimate false negatives, "
        "drawn at random.",
    )
    depth: Positive = Field(
        default=20, description="Candidates of each of these queries that are compared."
    )
    examples: NonNegative = Field(
        default=10, description="Queries shown with their positives and candidates."
    )


class MineConfig(Root):
    """A whole mining run."""

    teacher: Text = Field(
        description="The encoder that scores: a run directory, a model folder or a hub name."
    )
    input: Text | list[InputConfig] = Field(
        description="What is mined: the path of one input, named by its last part, or a list of "
        "inputs; see input.N.*"
    )
    output: Text = Field(
        description="Folder of the candidates, their report and the embeddings. The same command "
        "on the same folder goes on where it stopped. All processes must see it."
    )
    top_k: Positive = Field(default=1000, description="Candidates looked up for each query.")
    corpus: Literal["own", "union"] = Field(
        default="own",
        description="Whose documents an input's queries are compared with: the input's own, or "
        "those of all inputs together.",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Type the teacher computes in; its vectors and their products are float32.",
    )
    shard: Positive = Field(
        default=8192,
        description="Texts that are embedded, and queries that are searched, between two writes: "
        "as much as a kill can lose.",
    )
    document_block: Positive | None = Field(
        default=None,
        description="Documents that the devices hold at once. null: as many as take half of the "
        "devices' memory.",
    )
    cache: Text | None = Field(
        default=None,
        description="Folder of tokenised inputs. null: cache inside output.",
    )
    compilation_cache: Text = Field(
        default="auto",
        description="Private folder of compiled programs, as run.compilation_cache of training.",
    )
    contract: ContractConfig = Field(
        default=ContractConfig(), description="Replaces what the teacher states of its texts."
    )
    mesh: MiningMeshConfig = Field(default=MiningMeshConfig(), description="The devices.")
    report: MiningReportConfig = Field(
        default=MiningReportConfig(), description="What is looked at in the end."
    )

    @staticmethod
    def problems(config: Any) -> list[Problem]:
        """Every broken rule; see `Root.problems`."""
        try:
            inputs = config.input
            if isinstance(inputs, str):
                return []
            if not inputs:
                return [(("input",), "the list is empty; name at least one input")]
            names = Counter(one.name for one in inputs)
        except Unknown:
            return []
        found: list[Problem] = []
        for number, one in enumerate(inputs):
            if names[one.name] > 1:
                found.append(
                    (
                        ("input", number, "name"),
                        f"{one.name!r} is the name of several inputs; rename it",
                    )
                )
            if one.query == one.document:
                found.append(
                    (
                        ("input", number, "document"),
                        f"query and document are the same column ({one.query!r}); every query "
                        "would be its own positive",
                    )
                )
        return found
