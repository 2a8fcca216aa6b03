"""The tiled loss on several devices, and what its compiled program holds."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from arcticjax.losses import Labels, LossSums, tiled_infonce
from tests.losses.problems import (
    NUMBERS,
    error,
    make_problem,
    reference,
)

pytestmark = pytest.mark.usefixtures("quick_compiler")

# Devices.


def sharded_step(devices, tile, row_block=None):
    """Mean loss of the global batch and its gradients, everything inside one shard_map."""
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    split, whole = P("data"), P()

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(split, split, Labels(split, split, whole), whole),
        out_specs=((whole, LossSums(*[whole] * 5)), (split, split, whole)),
        check_vma=True,
    )
    def step(queries_bD, documents_cD, labels, temperature):
        def loss(queries_bD, documents_cD, temperature):
            documents_TD = jax.lax.all_gather(documents_cD, "data", tiled=True)
            sums = tiled_infonce(
                queries_bD,
                documents_TD,
                labels,
                temperature=temperature,
                tile=tile,
                row_block=row_block,
            )
            sums = jax.lax.psum(sums, "data")
            return sums.loss / sums.count, sums

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
            queries_bD, documents_cD, temperature
        )

    return step


@pytest.mark.parametrize("devices", [1, 8])
def test_devices_equal_one_device(devices):
    problem = make_problem(9, rows=48, columns=64)
    temperature = jnp.float32(0.1)
    expected = reference(*problem, 0.1)
    count = expected.sums["count"]
    (mean, sums), gradients = sharded_step(devices, tile=24, row_block=5)(*problem, temperature)
    assert float(mean) == pytest.approx(expected.sums["loss"] / count, rel=1e-5)
    for name in NUMBERS:
        assert float(getattr(sums, name)) == pytest.approx(expected.sums[name], rel=1e-5), name
    for found, wanted in zip(gradients[:2], expected.gradients, strict=True):
        assert error(found, wanted / count) <= 1e-5
    assert float(gradients[2]) == pytest.approx(expected.temperature_gradient / count, rel=1e-5)


def compiled_shapes(text):
    """Every array shape of compiled HLO, as tuples."""
    found = re.findall(r"\b(?:f32|bf16|s32|u32|pred)\[([\d,]+)\]", text)
    return {tuple(map(int, dimensions.split(","))) for dimensions in found}


@pytest.mark.parametrize("devices", [1, 8])
def test_compiled_step(devices):
    """One gather, its transpose, scalar sums, none of them in a loop; no scores beyond one tile."""
    rows, columns, width, tile, row_block = 528, 1096, 8, 48, 30
    problem = (
        jax.ShapeDtypeStruct((rows, width), jnp.float32),
        jax.ShapeDtypeStruct((columns, width), jnp.float32),
        Labels(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in [(rows, 1), (rows,), (columns,)])),
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    text = sharded_step(devices, tile, row_block).lower(*problem).compile().as_text()

    shapes = compiled_shapes(text)
    assert (row_block, tile) in shapes  # the search finds what there is
    largest = max(int(np.prod(shape)) for shape in shapes)
    assert largest <= columns * width
    assert largest < rows // devices * columns

    collectives = re.findall(
        r"= (.*) (all-gather|reduce-scatter|all-reduce|all-to-all|collective-\w+)(?:-start)?\((.*)",
        text,
    )
    names = [name for _, name, _ in collectives]
    assert names.count("all-gather") == names.count("reduce-scatter") == 1
    for shape, name, rest in collectives:
        assert not re.search(r'op_name="[^"]*while', rest)  # not in a loop
        if name not in ("all-gather", "reduce-scatter"):
            assert name == "all-reduce"
            assert set(re.findall(r"\[([\d,]*)\]", shape)) == {""}  # scalars


# Memory.


def temporaries(batch):
    def loss(queries, documents, labels):
        sums = tiled_infonce(queries, documents, labels, temperature=0.02, tile=1024)
        return sums.loss / sums.count

    texts = jax.ShapeDtypeStruct((batch, 384), jnp.float32)
    numbers = jax.ShapeDtypeStruct((batch,), jnp.int32)
    labels = Labels(jax.ShapeDtypeStruct((batch, 1), jnp.int32), numbers, numbers)
    compiled = (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(texts, texts, labels).compile()
    )
    shapes = compiled_shapes(compiled.as_text())
    assert max(np.prod(shape) for shape in shapes) <= max(batch * 384, 2**22)
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_batch_and_not_its_square():
    half, whole = temporaries(16384), temporaries(32768)
    assert whole <= 128 * 2**20
    assert whole <= 2.1 * half
