"""Every implementation of segment attention against NumPy loops in float64.

The kernels of Pallas run in its interpreter, splash in blocks of half a row. cuDNN cannot run on a
CPU: what it is given goes to jax's own attention instead.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from arcticjax.errors import ConfigError
from arcticjax.models import packed_attention, splash
from arcticjax.models.attention import attend

ROWS, LENGTH, HEADS, WIDTH = 3, 256, 2, 16
IMPLEMENTATIONS = ("xla", "looped", "cudnn", "packed", "splash")


def packed() -> np.ndarray:
    """Rows of several texts, some on a block's edge, with padding before, between and after them;
    of one text; of padding."""
    segments_RS = np.zeros((ROWS, LENGTH), np.int32)
    for number, (start, end) in enumerate([(3, 60), (60, 61), (61, 128), (128, 131), (140, 250)]):
        segments_RS[0, start:end] = number + 1
    segments_RS[1] = 1
    return segments_RS


SEGMENTS_RS = packed()
REAL_RS = SEGMENTS_RS > 0


def inputs(seed: int = 0) -> tuple[np.ndarray, ...]:
    """Query, key, value and what the gradient is taken of."""
    random = np.random.default_rng(seed)
    shape = (ROWS, LENGTH, HEADS, WIDTH)
    return tuple(random.normal(size=shape).astype(np.float32) for _ in range(4))


def by_hand(query, key, value, wanted, *, reach=LENGTH):
    """The result, and the gradients of sum(result * wanted) over the texts; a token sees those up
    to `reach` places away."""
    query, key, value, wanted = (array.astype(np.float64) for array in (query, key, value, wanted))
    mixed, gradients = np.zeros_like(value), [np.zeros_like(value) for _ in range(3)]
    scale = 1 / np.sqrt(query.shape[-1])
    for row, head in np.ndindex(len(query), query.shape[2]):
        for segment in range(1, SEGMENTS_RS[row].max() + 1):
            own = (row, SEGMENTS_RS[row] == segment, head)
            scores = query[own] @ key[own].T * scale
            places = np.arange(len(scores))
            scores[np.abs(places[:, None] - places) > reach] = -np.inf
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            mixed[own] = weights @ value[own]
            back = wanted[own] @ value[own].T
            of_scores = weights * (back - (back * weights).sum(1, keepdims=True)) * scale
            gradients[0][own] = of_scores @ key[own]
            gradients[1][own] = of_scores.T @ query[own]
            gradients[2][own] = weights.T @ wanted[own]
    return mixed, *gradients


@functools.partial(jax.jit, static_argnames="implementation")
def compiled(query, key, value, wanted, segments_RS, implementation, reach=None):
    """The result and the gradients, by an implementation."""

    def mix(query, key, value):
        return attend(query, key, value, segments_RS, implementation, reach)

    mixed, pull = jax.vjp(mix, query, key, value)
    return mixed, *pull(wanted.astype(mixed.dtype))


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu():
    """Kernels are interpreted, splash in blocks of half a row; cuDNN's place is taken by jax's
    own."""
    with pytest.MonkeyPatch.context() as patch:
        make, usual = splash.pallas.make_splash_mha, jax.nn.dot_product_attention
        patch.setattr(splash.pallas, "make_splash_mha", functools.partial(make, interpret=True))
        patch.setattr(splash, "_LARGEST_BLOCK", 128)
        call = functools.partial(packed_attention.pl.pallas_call, interpret=True)
        patch.setattr(packed_attention.pl, "pallas_call", call)

        def instead(*arrays, implementation, **options):
            assert implementation == "cudnn"
            return usual(*arrays, implementation="xla", **options)

        patch.setattr(jax.nn, "dot_product_attention", instead)
        yield


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("bfloat16", 2e-2)])
def test_result_and_gradients_equal_those_by_hand(implementation, dtype, tolerance):
    arrays = [np.array(jnp.asarray(array, dtype), np.float32) for array in inputs()]
    arrays[3] *= REAL_RS[:, :, None, None]  # as in training: nothing is asked of padding
    given = (jnp.asarray(array, dtype) for array in arrays)
    for got, expected in zip(
        compiled(*given, SEGMENTS_RS, implementation), by_hand(*arrays), strict=True
    ):
        assert got.dtype == dtype
        got = np.asarray(got, np.float64)
        assert np.isfinite(got).all()
        error = np.abs(got - expected)[REAL_RS].max()
        assert error <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("implementation", ["xla", "looped", "cudnn", "packed"])
def test_windows_equal_those_by_hand(implementation):
    """The reach is an array, as in a scan over layers."""
    query, key, value, wanted = inputs()
    arrays = (query, key, value, wanted * REAL_RS[:, :, None, None])
    for reach in (0, 5, LENGTH):
        found = compiled(*arrays, SEGMENTS_RS, implementation, np.int32(reach))
        for got, expected in zip(found, by_hand(*arrays, reach=reach), strict=True):
            error = np.abs(np.asarray(got) - expected)[REAL_RS].max()
            assert error <= 3e-6 * max(1, np.abs(expected).max())


def test_splash_refuses_windows():
    with pytest.raises(ConfigError, match=r"train\.attention: splash .* no windows"):
        compiled(*inputs(), SEGMENTS_RS, "splash", np.int32(5))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_text_reaches_no_other(implementation):
    """Its numbers change no other's result, and a wish about its result no other's gradient."""
    arrays = inputs()
    own_RS = (SEGMENTS_RS == 3) & (np.arange(ROWS) == 0)[:, None]
    chosen = own_RS[:, :, None, None]
    changed = [array + chosen for array in arrays[:3]]
    before, *_ = compiled(*arrays, SEGMENTS_RS, implementation)
    after, *_ = compiled(*changed, arrays[3], SEGMENTS_RS, implementation)
    moved_RS = (np.asarray(before) != np.asarray(after)).any((2, 3))
    assert (moved_RS == own_RS).all()
    _, *gradients = compiled(*arrays[:3], arrays[3] * chosen, SEGMENTS_RS, implementation)
    for gradient in gradients:
        assert ((np.asarray(gradient) != 0).any((2, 3)) == own_RS).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_stay_finite(implementation):
    query, key, value, wanted = inputs()
    arrays = (query * 1e3, key * 1e3, value, wanted)
    mixed, *gradients = compiled(*arrays, SEGMENTS_RS, implementation)
    np.testing.assert_allclose(np.asarray(mixed)[REAL_RS], by_hand(*arrays)[0][REAL_RS], atol=1e-4)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("implementation", ["looped", "splash"])
def test_in_a_shard_map_that_checks_varying_axes(implementation):
    """As in the training step: parameters cast to varying, their gradients added up at the end."""
    axes = ("data", "fsdp")
    mesh = jax.make_mesh((2, 1), axes, axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def local(scale, segments_RS, wanted, *arrays, implementation):
        def total(scale):
            def layer(scale):
                query, key, value = arrays
                return attend(scale * query, key, value, segments_RS, implementation)

            return jnp.sum(jax.checkpoint(layer)(scale) * wanted)

        scale = jax.lax.pcast(scale, axes, to="varying")
        return jax.lax.psum(jax.grad(total)(scale), axes)

    def gradient(implementation):
        mapped = jax.shard_map(
            functools.partial(local, implementation=implementation),
            in_specs=(P(), *[P(axes)] * 5),
            out_specs=P(),
        )
        arrays = [array[:2, :128, :1] for array in inputs()]
        return jax.jit(mapped)(jnp.float32(0.7), SEGMENTS_RS[:2, :128], arrays[3], *arrays[:3])

    with jax.set_mesh(mesh):
        found, wanted = gradient(implementation), gradient("xla")
    assert abs(wanted) > 1
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_blocks_of_splash(monkeypatch):
    monkeypatch.setattr(splash, "_LARGEST_BLOCK", 512)
    assert [splash._block(length) for length in (128, 256, 384, 512, 640, 768, 1024)] == [
        128, 256, 384, 512, 128, 384, 512,
    ]  # fmt: skip
