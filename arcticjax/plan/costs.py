"""What a step costs: model FLOPs, and a projected time from the chip's limits.

Only memory and collectives are compiled facts; times here are arithmetic on published peaks and
stated assumptions, never measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arcticjax.data.layout import Shapes
from arcticjax.models.spec import ModelSpec
from arcticjax.parallel.hlo import Collective
from arcticjax.plan.topology import Target
from arcticjax.plan.workload import Load

# Share of the peak that matrix units reach while they work, assumed: what encoders of this width
# are designed for here. Narrow ones (hidden size below 768) wait for memory more often.
EFFICIENCY_WIDE, EFFICIENCY_NARROW = 0.5, 0.35
# Times that the activations of a layer cross the memory bus in a training step.
_ACTIVATION_TRIPS = 5


@dataclass(frozen=True)
class Projection:
    """A step's projected time in seconds, by what takes it.

    compute: all slots, padding included, at `efficiency` of the peak; memory: activations, weights
    and optimiser at the full bandwidth; network: every collective, none of it hidden. A step takes
    the larger of the first two, and the third. ideal: real tokens and a single forward and
    backward pass only, at the whole peak.
    """

    compute: float
    memory: float
    network: float
    efficiency: float
    ideal: float

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return max(self.compute, self.memory) + self.network

    @property
    def mfu(self) -> float:
        """Model FLOPs per second over the peak."""
        return self.ideal / self.step


def forward_flops(spec: ModelSpec, tokens: float, squares: float, *, windows: bool = True) -> float:
    """FLOPs of one forward pass over texts of `tokens` tokens in all, `squares` being the sum of
    their squared lengths: L (2 (4 h^2 + m h f) tokens + 4 h squares) with m matrices in a layer's
    perceptron.

    A layer with a window of w places to each side has at most (2 w + 1) tokens in place of the
    squares, unless `windows` is off: masks leave out nothing that is computed.
    """
    width, inner, layers = spec.hidden_size, spec.intermediate_size, spec.num_layers
    matrices = 2 * (4 * width**2 + spec.mlp_matrices * width * inner)
    nearby, within = 0, squares
    if spec.window is not None and windows:
        nearby = layers - len(range(0, layers, spec.window.every))
        within = min(squares, tokens * (2 * spec.window.reach + 1))
    seen = (layers - nearby) * squares + nearby * within
    return layers * matrices * tokens + 4 * width * seen


def model_flops(spec: ModelSpec, load: Load, global_batch: int) -> float:
    """FLOPs that a step's mathematics asks for, over all devices: forward and twice that backward
    over real tokens, attention within each text, and the loss, 6 B^2 D."""
    loss = 6.0 * global_batch**2 * spec.hidden_size
    return 3 * forward_flops(spec, load.tokens, load.squares) + loss


def project(
    spec: ModelSpec,
    shapes: Shapes,
    load: Load,
    target: Target,
    collectives: Sequence[Collective],
    *,
    passes: str,
    precision_bytes: int,
    state_bytes: int,
    efficiency: float | None = None,
    guide: ModelSpec | None = None,
) -> Projection:
    """The projected time of a step on a slice or on GPUs.

    state_bytes: parameters and optimiser of one device. guide: a frozen encoder that goes over the
    same rows once.
    """
    assert target.chip is not None
    chip = target.chip
    if efficiency is None:
        efficiency = EFFICIENCY_WIDE if spec.hidden_size >= 768 else EFFICIENCY_NARROW
    slots = load.microbatches * load.rows * shapes.row_length
    batch = shapes.devices * shapes.pairs
    documents = shapes.devices * shapes.documents
    # Forward, twice that backward, and forward again with two passes; attention spans whole rows.
    times = 3 if passes == "one" else 4 - load.at_once
    done = times * forward_flops(spec, slots, slots * shapes.row_length, windows=False)
    # Scores of a device's queries with all documents; the backward pass computes them again.
    done += 8.0 * shapes.pairs * documents * spec.hidden_size
    moved = _ACTIVATION_TRIPS * activation_bytes(spec, shapes.row_length, precision_bytes) * slots
    weights = spec.parameter_count() * (times * precision_bytes + 8)
    if guide is not None:
        done += forward_flops(guide, slots, slots * shapes.row_length, windows=False)
        done += 4.0 * shapes.pairs * documents * guide.hidden_size
        moved += 2 * activation_bytes(guide, shapes.row_length, precision_bytes) * slots
        weights += 4 * guide.parameter_count()
    slower = 1 if precision_bytes == 2 else chip.float32_cost
    compute = done * slower / (chip.peak_flops * efficiency)
    memory = (moved + load.microbatches * weights + 2 * state_bytes) / chip.hbm_bandwidth
    network = sum(
        _bytes_on_the_wire(one)
        * (load.microbatches * spec.num_layers if one.in_loop else 1)
        / target.bandwidth(one.groups[0])
        for one in collectives
    )
    return Projection(
        compute=compute,
        memory=memory,
        network=network,
        efficiency=efficiency,
        ideal=model_flops(spec, load, batch) / (chip.peak_flops * shapes.devices),
    )


def activation_bytes(spec: ModelSpec, row_length: int, precision_bytes: int) -> float:
    """Bytes of activations of a token in all layers: projections, inputs and MLP, and attention
    scores over a row in float32 and once in the compute type."""
    inner = spec.mlp_matrices * spec.intermediate_size
    wide = precision_bytes * (8 * spec.hidden_size + inner)
    scores = spec.num_heads * row_length * (4 + precision_bytes)
    return spec.num_layers * (wide + 4 * spec.num_heads + scores)


def _bytes_on_the_wire(one: Collective) -> float:
    """Bytes that a device sends, by the ring algorithms."""
    size = len(one.groups[0])
    share = (size - 1) / size if size > 1 else 0.0
    return one.bytes * share * (2 if one.op == "all-reduce" else 1)
