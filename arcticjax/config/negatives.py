"""The fields of `data.negatives`: how hard negatives are cut from candidates at load time."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from arcticjax.config.section import NonNegative, Positive, PositiveNumber, Section


class ThresholdConfig(Section):
    kind: Literal["absolute", "percent", "margin"] = Field(
        description="absolute: a score; percent: a share of a positive's score, 0.95 being 5 % of "
        "its size below it, also for negative scores; margin: so much below a positive's score."
    )
    value: float = Field(description="The score, the share (0 to 1) or the distance.")
    of: Literal["lowest", "mean"] = Field(
        default="lowest",
        description="The positive's score that percent and margin start from, of the positives in "
        "use.",
    )


class ThresholdsConfig(Section):
    upper: ThresholdConfig | None = Field(
        default=None,
        description="A candidate that scores above this is taken for a false negative; see "
        "data.negatives.thresholds.upper.*. null: no limit.",
    )
    lower: ThresholdConfig | None = Field(
        default=None,
        description="A candidate that scores below this is too easy; see "
        "data.negatives.thresholds.lower.*. null: no limit.",
    )


class WindowConfig(Section):
    first: Positive = Field(
        default=1,
        description="Best rank that is taken, from 1; ranks leave out positives and duplicates.",
    )
    last: Positive | None = Field(default=None, description="Worst rank that is taken. null: any.")


class CurriculumPoint(Section):
    start: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="Where it begins, as a share of the run; the first point is at 0."
    )
    upper: float | None = Field(
        default=None,
        description="Replaces data.negatives.thresholds.upper.value. null: as it stands there.",
    )
    lower: float | None = Field(
        default=None,
        description="Replaces data.negatives.thresholds.lower.value. null: as it stands there.",
    )
    first: Positive | None = Field(
        default=None, description="Replaces data.negatives.window.first. null: as it stands there."
    )
    last: Positive | None = Field(
        default=None, description="Replaces data.negatives.window.last. null: as it stands there."
    )


class CurriculumConfig(Section):
    shape: Literal["steps", "linear"] = Field(
        default="steps",
        description="steps: each point's values hold until the next. linear: they move from point "
        "to point, in `levels` equal steps.",
    )
    points: Annotated[list[CurriculumPoint], Field(min_length=1)] = Field(
        description="What holds from when on, in order; see data.negatives.curriculum.points.N.*"
    )
    levels: Positive = Field(
        default=8, description="Steps between two points of a linear curriculum."
    )


class NegativesConfig(Section):
    count: NonNegative = Field(
        description="Hard negatives of a query. 0: none, the candidates are left aside."
    )
    thresholds: ThresholdsConfig = Field(
        default=ThresholdsConfig(), description="Between which scores negatives lie."
    )
    window: WindowConfig = Field(
        default=WindowConfig(), description="Between which ranks negatives lie."
    )
    sampling: Literal["top", "random", "weighted"] = Field(
        default="top",
        description="Which of the candidates that pass are taken: top the best-scored; random "
        "others in every epoch; weighted random by exp(score / sampling_temperature).",
    )
    sampling_temperature: PositiveNumber = Field(
        default=0.05, description="See sampling: weighted; the lower, the nearer to top."
    )
    minimum: Positive | None = Field(
        default=None,
        description="Queries of which fewer candidates pass are left out of the run. null: count "
        "times uses.",
    )
    uses: Positive = Field(
        default=1,
        description="How many times an epoch a query is drawn, each time with other negatives.",
    )
    retrieved_positives: bool = Field(
        default=False,
        description="Use only positives that score at least as well as the query's last candidate: "
        "those that the teacher found.",
    )
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="A candidate whose runs of four tokens agree with a positive's to this share "
        "(Jaccard, estimated) is no negative. null: only equal texts are left out.",
    )
    curriculum: CurriculumConfig | None = Field(
        default=None,
        description="Thresholds and window as a schedule over the run; see "
        "data.negatives.curriculum.*. null: they stay.",
    )
