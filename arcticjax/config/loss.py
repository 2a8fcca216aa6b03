"""The fields of `loss`: what is compared with what, and what is left out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from arcticjax.config.contract import Pooling
from arcticjax.config.section import Positive, PositiveNumber, Section, Text


class MatryoshkaSize(Section):
    size: Positive = Field(description="So many leading numbers of an embedding.")
    weight: PositiveNumber = Field(default=1.0, description="Its loss counts so much.")


class DistillationConfig(Section):
    kind: Literal["kl", "margin_mse"] = Field(
        description="kl: the student's softmax over a query's own documents follows the teacher's; "
        "margin_mse: its score differences between positives and negatives do."
    )
    weight: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="Its share of the loss; the contrastive loss gets the rest."
    )
    teacher_temperature: PositiveNumber | None = Field(
        default=None,
        description="The teacher's scores are divided by this. null: loss.temperature for kl, 1 "
        "for margin_mse, which takes cosines as they are.",
    )


class GuideConfig(Section):
    model: Text = Field(
        description="Frozen encoder that reads the same tokens: a run directory, a model folder or "
        "a hub name. Its tokenizer is that of the trained model; prompts and lengths are the run's."
    )
    pooling: Pooling | None = Field(
        default=None,
        description="How its token vectors become one vector; for a plain Hugging Face folder, "
        "which does not state it. null: its own.",
    )
    margin: Annotated[float, Field(ge=-2, le=2)] = Field(
        default=0.0,
        description="A text is left out that is nearer to the query than the query's positive by "
        "more than this, by the guide's cosines; below 0 also what is a little less near.",
    )


class LossConfig(Section):
    temperature: PositiveNumber = Field(
        default=0.02, description="Cosine similarities are divided by this before the softmax."
    )
    learn_temperature: bool = Field(
        default=False,
        description="Train the logarithm of the temperature along with the encoder, from "
        "temperature on.",
    )
    in_batch_negatives: bool = Field(
        default=True,
        description="The other documents of the global batch are a query's negatives. false: only "
        "its own hard negatives are (data.negatives), and no document goes to another device.",
    )
    symmetric: bool = Field(
        default=False,
        description="Also find the query of each document among all queries; the two losses count "
        "half each.",
    )
    query_query: bool = Field(
        default=False, description="The other queries are negatives of a query too."
    )
    document_query: bool = Field(
        default=False,
        description="Other queries that come near a query's document are negatives too.",
    )
    document_document: bool = Field(
        default=False,
        description="Other documents that come near a query's document are negatives too.",
    )
    matryoshka: list[MatryoshkaSize] = Field(
        default=[],
        description="Sizes that embeddings may be cut to, each trained as an embedding of its own; "
        "see loss.matryoshka.N.*. []: whole embeddings only.",
    )
    distillation: DistillationConfig | None = Field(
        default=None,
        description="Also learn the teacher's scores of a query's own documents, stored with its "
        "candidates; see loss.distillation.*. null: no.",
    )
    margin: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        default=None,
        description="A document whose cosine with a query exceeds that of the query's positive by "
        "more than this is taken for a false negative and left out. null: none is.",
    )
    guide: GuideConfig | None = Field(
        default=None,
        description="Also leave out negatives that another model finds nearer to the query than "
        "its positive; see loss.guide.*. null: no.",
    )
    gather: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Type in which embeddings go to the other devices and are compared; sums and "
        "gradients between devices are float32.",
    )
    tile: Positive | None = Field(
        default=None,
        description="Documents scored at once; bounds memory, not the result. Left out: 1024, on a "
        "GPU 4096.",
    )
