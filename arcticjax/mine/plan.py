"""What mining so many queries and documents takes on a slice: memory, disk and time.

Times are sums over peaks: products at a share of the chip's peak, the choice of the best at a rate.
Axis letters: Q queries, T documents, D embedding width, K candidates of a query.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from arcticjax.config import MineConfig
from arcticjax.config.checks import nearest
from arcticjax.errors import ConfigError
from arcticjax.mine.inputs import inputs_of, is_beir
from arcticjax.models.spec import ModelSpec
from arcticjax.parallel.chips import CHIPS, Chip
from arcticjax.step.search import FLOAT_BYTES, QUERY_BLOCK, cut_block, fitting

GB = 1e9
# Slots of packed rows that hold tokens.
FILL = 0.95
# Scores a second among which one chip keeps the best K: an assumption, not measured on a TPU.
SELECTED = 4e9
# Bytes of a text of pairs: its id, a record and what finds equal ones among them.
PAIR_BYTES = 40
# Texts of a BEIR folder stay in memory: their UTF-8, at so many bytes a token, and what ids and
# objects take beside it (docs/mining.md, Size).
TOKEN_BYTES, OBJECT_BYTES = 5, 250


@dataclass(frozen=True)
class Plan:
    """Bytes are of one chip, of the whole disk, and of one host's memory, of which text_bytes for
    the inputs' texts and ids; times in seconds, of embedding all texts, of the products and of the
    choice."""

    chip: Chip
    chips: int
    queries: int
    documents: int
    dimension: int
    top_k: int
    blocks: int
    hbm_bytes: int
    disk_embeddings: int
    disk_candidates: int
    host_bytes: int
    text_bytes: int
    embed_seconds: float
    product_seconds: float
    select_seconds: float
    efficiency: float
    lengths: tuple[float, float]

    @property
    def fits(self) -> bool:
        """Whether a chip's memory suffices."""
        return self.hbm_bytes <= self.chip.usable_bytes


def parse_slice(text: str) -> tuple[Chip, int]:
    """`v5e:2x4` as a kind of chip and how many; ConfigError for anything else."""
    match = re.fullmatch(r"([A-Za-z0-9]+):(\d+(?:x\d+)*)", text)
    if match is None or match[1] not in CHIPS:
        close = match and nearest(match[1], list(CHIPS))
        hint = f"; did you mean {close}:{match[2]}?" if match and close else ""
        raise ConfigError(
            f"--topology: {text!r} is not KIND:SIZE with a kind of {', '.join(CHIPS)}, such as "
            f"v5e:2x4{hint}"
        )
    chips = math.prod(int(side) for side in match[2].split("x"))
    if not chips:
        raise ConfigError(f"--topology: {text!r} has no chip")
    return CHIPS[match[1]], chips


def make_plan(
    config: MineConfig,
    spec: ModelSpec,
    params: int,
    queries: int,
    documents: int,
    chip: Chip,
    chips: int,
    *,
    lengths: tuple[float, float],
    row_length: int,
    efficiency: float | None = None,
) -> Plan:
    """The plan of one pool.

    params: numbers in the teacher. lengths: mean tokens of a query and of a document as encoded.
    row_length: tokens of a packed row. efficiency: share of its peak that a chip reaches in
    products; None: 0.5, or 0.35 for hidden sizes below 768.
    """
    width, k = spec.hidden_size, min(config.top_k, documents)
    efficiency = efficiency or (0.5 if width >= 768 else 0.35)
    block = min(documents, config.document_block or fitting(chip.usable_bytes, width, chips))
    blocks = math.ceil(documents / block)
    share, tile = cut_block(block, documents, chips)

    tokens = queries * lengths[0] + documents * lengths[1]
    # A token's forward pass: 4 h^2 + 2 h f multiply-adds a layer for the matrices, and 2 S h for
    # attention over its row.
    layer = 4 * width**2 + 2 * width * spec.intermediate_size + 2 * row_length * width
    passes = chip.float32_cost if config.precision == "float32" else 1
    peak = chips * chip.peak_flops * efficiency
    embed_flops = 2 * spec.num_layers * layer * tokens / FILL

    # Scores and places of the tile and of the best so far, in and out of the choice.
    choice = 2 * QUERY_BLOCK * (tile + k) * 8 + chips * QUERY_BLOCK * k * 8
    results = min(config.shard, queries) * k * (4 + 8)
    listed = any(map(is_beir, inputs_of(config)))
    text_bytes = (
        int(TOKEN_BYTES * tokens + OBJECT_BYTES * (queries + documents))
        if listed
        else PAIR_BYTES * (queries + documents)
    )
    return Plan(
        chip=chip,
        chips=chips,
        queries=queries,
        documents=documents,
        dimension=width,
        top_k=k,
        blocks=blocks,
        hbm_bytes=FLOAT_BYTES * (params + share * width + QUERY_BLOCK * width) + choice,
        disk_embeddings=(queries + documents) * width * FLOAT_BYTES,
        disk_candidates=queries * k * 12 * (1 if blocks == 1 else 1 + blocks),
        # Results twice while positives are parted from them, and one chip's documents on their way.
        host_bytes=3 * results + FLOAT_BYTES * (params + share * width) + text_bytes,
        text_bytes=text_bytes,
        embed_seconds=embed_flops * passes / peak,
        product_seconds=2 * queries * documents * width * chip.float32_cost / peak,
        select_seconds=queries * documents / (chips * SELECTED),
        efficiency=efficiency,
        lengths=lengths,
    )


def to_text(plan: Plan) -> str:
    """The plan as lines to read."""
    whole = plan.embed_seconds + plan.product_seconds + plan.select_seconds
    return "\n".join(
        [
            f"mining     {plan.queries:,} queries x {plan.documents:,} documents x "
            f"{plan.dimension}, top {plan.top_k:,}, on {plan.chips} {plan.chip.name}",
            f"chip       {_size(plan.hbm_bytes)} of {_size(plan.chip.usable_bytes)}: "
            f"{'fits' if plan.fits else 'does not fit; set document_block lower'}; "
            f"{plan.blocks} block(s) of documents",
            f"host       {_size(plan.host_bytes)} beside the program, {_size(plan.text_bytes)} of "
            "it for the inputs' texts and ids",
            f"disk       {_size(plan.disk_embeddings)} of embeddings, "
            f"{_size(plan.disk_candidates)} of candidates before compression",
            f"time       {_time(whole)}: embedding {_time(plan.embed_seconds)} (texts of "
            f"{plan.lengths[0]:g} and {plan.lengths[1]:g} tokens), products "
            f"{_time(plan.product_seconds)}, choosing the best {_time(plan.select_seconds)}",
            f"assumed    {plan.efficiency:g} of the peak in products; {SELECTED:.0e} scores a "
            "second and chip in choosing, which is not measured on a TPU; reading and writing not "
            "counted",
        ]
    )


def _size(count: float) -> str:
    return f"{count / GB:,.2f} GB"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
