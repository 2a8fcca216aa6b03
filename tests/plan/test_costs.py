import dataclasses

import pytest

from arcticjax.data.layout import Shapes
from arcticjax.models.spec import PRESETS
from arcticjax.parallel.hlo import Collective
from arcticjax.plan import costs, topology
from arcticjax.plan.workload import Load


@pytest.mark.parametrize(
    ("preset", "query", "document", "pair"),
    [
        ("xs", 0.689, 6.04, 20.2),
        ("s", 1.378, 12.08, 40.4),
        ("m", 5.474, 45.90, 154.1),
        ("l", 19.43, 161.1, 541.5),
    ],
)
def test_flops_of_the_presets(preset, query, document, pair):
    """GFLOP of a forward pass over 32 and 256 tokens, and of a trained pair without its loss."""
    spec = PRESETS[preset]
    assert costs.forward_flops(spec, 32, 32**2) / 1e9 == pytest.approx(query, rel=1e-3)
    assert costs.forward_flops(spec, 256, 256**2) / 1e9 == pytest.approx(document, rel=1e-3)
    load = Load(tokens=288, squares=32**2 + 256**2, microbatches=1, rows=2, at_once=0, fill=1)
    loss = 6 * spec.hidden_size
    assert (costs.model_flops(spec, load, 1) - loss) / 1e9 == pytest.approx(pair, rel=1e-3)


def test_flops_of_gates_and_windows():
    """By hand: NomicBERT has a third matrix; of ModernBERT's 22 layers 8 see the whole text."""
    tokens, squares = 1000.0, 1000.0**2
    nomic = 12 * (2 * (4 * 768**2 + 3 * 768 * 3072) * tokens + 4 * 768 * squares)
    assert costs.forward_flops(PRESETS["m-long"], tokens, squares) == nomic
    modern = PRESETS["modernbert-base"]
    matrices = 22 * 2 * (4 * 768**2 + 3 * 768 * 1152) * tokens
    seen = 8 * squares + 14 * tokens * 129
    assert costs.forward_flops(modern, tokens, squares) == matrices + 4 * 768 * seen
    whole = matrices + 22 * 4 * 768 * squares
    assert costs.forward_flops(modern, tokens, squares, windows=False) == whole
    # a window wider than the texts leaves nothing out
    short = matrices + 22 * 4 * 768 * 50 * tokens
    assert costs.forward_flops(modern, tokens, 50 * tokens) == short


SHAPES = Shapes(256, 64, 256, 4, 32, 256)
LOAD = Load(
    tokens=256 * 40 * 256.0,
    squares=256 * 40 * 256.0**2,
    microbatches=10,
    rows=4,
    at_once=0,
    fill=1,
)
GATHER = Collective("g", "all-gather", 2**30, (tuple(range(256)),), False, "")


def project(*collectives, load=LOAD, **changes):
    options = dict(
        target=topology.parse("v5e:16x16"), passes="two", precision_bytes=2, state_bytes=10**9,
        efficiency=0.5,
    )  # fmt: skip
    return costs.project(PRESETS["m"], SHAPES, load, collectives=collectives, **(options | changes))


def test_full_rows_at_full_fill_cost_what_the_formula_says():
    """With rows full of one text each, four forward passes against the model's three."""
    seconds = project()
    assert seconds.network == 0
    loss = 6 * (256 * 64) ** 2 * 768
    encoder = (costs.model_flops(PRESETS["m"], LOAD, 256 * 64) - loss) / 3
    work = (4 * encoder + 8 * (256 * 64) ** 2 * 768) / 256
    assert seconds.compute == pytest.approx(work / (197e12 * 0.5))
    assert seconds.step == max(seconds.compute, seconds.memory)
    assert seconds.mfu == pytest.approx((3 * encoder + loss) / 256 / 197e12 / seconds.step)


def test_one_pass_saves_a_quarter_and_float32_costs_six_times():
    two, one = project(), project(passes="one")
    assert 0.75 < one.compute / two.compute < 0.76  # the loss stays
    assert project(precision_bytes=4).compute == pytest.approx(6 * two.compute)


def test_gpus_multiply_float32_beside_the_matrix_units():
    target = topology.parse("h200:16")
    two = project(target=target)
    assert project(target=target, precision_bytes=4).compute == pytest.approx(
        two.compute * 989 / 67
    )


def test_what_crosses_hosts_of_gpus_takes_longer():
    host = dataclasses.replace(GATHER, groups=(tuple(range(8)), tuple(range(8, 16))))
    across = dataclasses.replace(GATHER, groups=tuple((one, one + 8) for one in range(8)))
    found = project(host, across, target=topology.parse("h100:16")).network
    assert found == pytest.approx(2**30 * (7 / 8 / 450e9 + 1 / 2 / 50e9))


def test_a_guide_costs_a_forward_pass_more():
    alone, guided = project(), project(guide=PRESETS["m"])
    assert guided.compute / alone.compute == pytest.approx(5 / 4, rel=0.02)
    assert alone.memory < guided.memory < 1.5 * alone.memory
    assert guided.ideal == alone.ideal


def test_collectives_by_ring_algorithms():
    gathered = project(GATHER).network
    assert gathered == pytest.approx(2**30 * 255 / 256 / 200e9)
    reduced = dataclasses.replace(GATHER, op="all-reduce")
    assert project(reduced).network == pytest.approx(2 * gathered)
    looped = dataclasses.replace(GATHER, in_loop=True)
    assert project(looped).network == pytest.approx(10 * 12 * gathered)


def test_memory_traffic_grows_with_microbatches():
    fewer = project(load=dataclasses.replace(LOAD, microbatches=5)).memory
    assert 1.9 < (project().memory - 2e9 / 819e9) / (fewer - 2e9 / 819e9) < 2.1
