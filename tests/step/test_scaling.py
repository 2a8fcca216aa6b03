"""How the training step grows with devices, pairs and layers: lowered or compiled, not run."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter

import jax
import pytest

from arcticjax.models.spec import PRESETS
from arcticjax.step import activations
from tests.step import scaling
from tests.step.scaling import PAIRS, TILE, WIDTH

# The optimisations left out move little memory and no collective.
pytestmark = pytest.mark.usefixtures("quick_compiler")

DEVICES = (1, 8, 32)


@pytest.fixture(scope="module")
def by_devices(quick_compiler):
    """Facts of the step on 1, 8 and 32 devices with as many pairs each, from a process that has 32
    fake ones."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=32"
    done = subprocess.run(
        [sys.executable, "-m", "tests.step.scaling", *map(str, DEVICES)],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {int(devices): facts for devices, facts in json.loads(done.stdout).items()}


@pytest.mark.parametrize("devices", DEVICES)
def test_no_array_of_pairs_times_pairs(by_devices, devices):
    """The largest arrays are the embeddings of the batch; scores exist a tile at a time."""
    sizes = [math.prod(shape) for shape in by_devices[devices]["shapes"]]
    batch = devices * PAIRS
    assert max(sizes) < batch * batch
    if devices > 1:
        assert max(sizes) == batch * WIDTH
    assert [PAIRS, TILE] in by_devices[devices]["shapes"]


def test_weak_scaling_of_computation(by_devices):
    """Encoding costs a device the same; the loss grows as the devices and not as their square."""
    one, eight, most = (by_devices[devices]["flops"] for devices in DEVICES)
    assert (most - eight) / (eight - one) == pytest.approx((32 - 8) / (8 - 1), rel=0.01)
    # Products of queries with documents: forward, again backward, and for two gradients.
    product = 2 * PAIRS * PAIRS * WIDTH
    assert (most - eight) / (32 - 8) / product == pytest.approx(4, rel=0.1)


def test_weak_scaling_of_memory(by_devices):
    """Gathered documents and their gradient, and no more than labels beside."""
    for few, many in ((1, 8), (8, 32)):
        more = by_devices[many]["temporary_bytes"] - by_devices[few]["temporary_bytes"]
        assert more <= 2.2 * (many - few) * PAIRS * WIDTH * 4


def test_what_moves_grows_with_documents_alone(by_devices):
    assert by_devices[1]["moved"] == {}
    eight, most = (by_devices[devices]["moved"] for devices in (8, 32))
    places = (32 - 8) * PAIRS * 4
    assert most["reduce-scatter"] - eight["reduce-scatter"] == places * WIDTH
    assert most["all-gather"] - eight["all-gather"] == places * (WIDTH + 1)
    assert most["all-reduce"] == eight["all-reduce"] <= 64


def test_as_many_collectives_on_more_devices(by_devices):
    """One document gather and its transpose, and the same handful for leaves and scalars; none is
    in a loop."""
    assert by_devices[1]["counted"] == {}
    assert by_devices[8]["counted"] == by_devices[32]["counted"]
    assert set(by_devices[8]["counted"]) == {"all-gather", "reduce-scatter", "all-reduce"}


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_optimizer_is_shared_by_all_devices(by_devices, preset, devices):
    """Two float32 numbers a parameter, over the devices; flattened leaves, and so the gradients
    that are scattered, are padded by less than a hundredth."""
    share = 8 * PRESETS[preset].parameter_count() / devices
    assert by_devices[devices]["optimizer_bytes"][preset] == pytest.approx(share, rel=0.01)


def test_memory_grows_with_pairs_as_their_embeddings():
    """Two passes, the same microbatch: four times as many pairs."""
    few, many = (
        scaling.lowered(1, pairs=pairs).compile().memory_analysis().temp_size_in_bytes
        for pairs in (256, 1024)
    )
    # Queries and documents, their cotangents, and sums that the loss carries.
    assert many - few <= 5.7 * 2 * (1024 - 256) * WIDTH * 4


def test_a_program_does_not_grow_with_its_layers():
    few, many = (len(scaling.lowered(1, layers=layers).as_text()) for layers in (2, 24))
    assert many < 1.05 * few


def test_recomputing_layers_takes_less_memory():
    none, full = (
        scaling.lowered(1, layers=8, rows=16, remat=remat)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for remat in ("none", "full")
    )
    assert full <= 0.35 * none
    kept = {
        remat: activations.buffer_bytes(scaling.make(1, remat=remat, passes="one").kept)
        for remat in ("none", "dots", "named", "full")
    }
    assert kept["full"] < kept["named"] < kept["none"]
    assert kept["dots"] < kept["none"]


def test_lowered_for_a_gpu():
    """What a machine without a GPU can tell of a GPU's program: it lowers, with the collectives of
    the CPU's; the encoder multiplies in bfloat16 and the loss in float32."""
    program = scaling.make(8, dtype="bfloat16")
    with jax.set_mesh(program.mesh):
        exported = jax.export.export(program.jitted(), platforms=["cuda"])(
            program.abstract_state(), program.abstract_buffers(), program.abstract_batch()
        )
        here = program.lower(
            program.abstract_state(), program.abstract_buffers(), program.abstract_batch()
        )
    assert (exported.platforms, exported.nr_devices) == (("cuda",), 8)
    text = exported.mlir_module()
    assert operations(text) == operations(here.as_text())
    products = re.findall(r"dot_general.* : \(tensor<(\S+)>, tensor<(\S+)>\)", text)
    of_loss = {pair for pair in products if "bf16" not in "".join(pair)}
    assert {str(PAIRS)} == {left.partition("x")[0] for left, _ in of_loss}
    mixed = [pair for pair in products if len({one.rpartition("x")[2] for one in pair}) > 1]
    assert not mixed
    assert len(products) > len(of_loss)


def operations(text):
    """How often each collective stands in a StableHLO program."""
    return Counter(re.findall(r"stablehlo\.(all_\w+|reduce_scatter|collective_\w+)", text))
