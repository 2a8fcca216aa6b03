"""Implementations of attention inside the training step: scanned, rematerialised, parameters
gathered layer by layer, in a `shard_map` that checks along which axes arrays vary."""

import re

import jax
import jax.numpy as jnp
import pytest

from arcticjax import errors
from arcticjax.models import attention
from arcticjax.models.encoder import Encoder
from arcticjax.parallel import mesh as meshes
from arcticjax.parallel.sharding import make_sharding
from arcticjax.step import train as steps
from tests import tiny
from tests.step.parts import OBJECTIVE

pytestmark = pytest.mark.usefixtures("quick_compiler")
ROW_LENGTH = 256  # not 128, the width of what splash keeps of the softmax
KERNELS = {
    "cudnn": ("cuda", r"@__cudnn\$fmhaScaleBiasSoftmax\(", r"@__cudnn\$fmhaScaleBiasSoftmaxBack"),
    "packed": ("cuda", r'"attention_mix"', r'"attention_differentiate_keys"'),
    "splash": ("tpu", r'kernel_name = "splash_mha_fwd', r'kernel_name = "splash_mha_dkv'),
}
# Options, parameters shared by, and how often the forward kernel is in the program; the backward
# kernel is once. Encoding again takes the forward kernel again, and so does a layer of which the
# backward pass finds too little: splash keeps what it needs for that to itself.
WAYS = {
    "one pass": ({"passes": "one", "remat": "dots"}, 2, {"cudnn": 1, "packed": 1, "splash": 2}),
    "two passes": ({"passes": "two", "remat": "none"}, 1, {"cudnn": 2, "packed": 2, "splash": 2}),
    "gathered": ({"passes": "two", "remat": "full"}, 2, {"cudnn": 3, "packed": 3, "splash": 3}),
}


@pytest.fixture(scope="module")
def cudnn_at_hand():
    """As if cuDNN were installed; programs can be lowered for it and not run."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
        yield


def lowered(implementation, fsdp, **options):
    """The gradient of a tiny step on four devices, as StableHLO for the implementation's
    platform."""
    encoder, builder = Encoder(tiny.SPEC), tiny.builder(4, row_length=ROW_LENGTH)
    mesh = meshes.make_mesh(4 // fsdp, fsdp)
    encoding = steps.Encoding(
        encoder, "mean", dtype=jnp.bfloat16, attention=implementation, **options
    )
    arrays = {"params": encoder.abstract(), "loss": OBJECTIVE.init()}
    with jax.set_mesh(mesh):
        sharding = make_sharding(arrays, mesh)
        kept = steps.kept_shapes(encoding, builder.shapes, sharding)
        program = jax.jit(steps.make_gradient(encoding, OBJECTIVE, builder.shapes, sharding))
        traced = program.trace(arrays, kept, builder(0).arrays)
        return traced.lower(lowering_platforms=(KERNELS[implementation][0],)).as_text()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("implementation", KERNELS)
def test_the_step_holds_the_kernels_and_no_scores(implementation, way, cudnn_at_hand):
    options, fsdp, forward = WAYS[way]
    text = lowered(implementation, fsdp, **options)
    _, *kernels = KERNELS[implementation]
    assert [len(re.findall(kernel, text)) for kernel in kernels] == [forward[implementation], 1]
    assert f"x{tiny.SPEC.num_heads}x{ROW_LENGTH}x{ROW_LENGTH}x" not in text


def test_what_cudnn_is_given(cudnn_at_hand):
    """Rows as they lie, the mask as the one array over pairs of tokens, statistics in float32."""
    rows = jax.ShapeDtypeStruct((4, 256, 12, 32), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((4, 256), jnp.int32)

    def gradient(segments_RS, *arrays):
        return jax.vjp(lambda *some: attention.attend(*some, segments_RS, "cudnn"), *arrays)[1](
            arrays[0]
        )

    traced = jax.jit(gradient).trace(segments, rows, rows, rows)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    forward, backward = (
        next(line for line in text.splitlines() if re.search(kernel, line)).rsplit(" : ", 1)[1]
        for kernel in KERNELS["cudnn"][1:]
    )
    array, mask, statistics = "tensor<4x256x12x32xbf16>", "tensor<4x1x256x256xbf16>", "x12x256xf32>"
    given, made = forward.split(" -> ")
    assert given.count(array) == 3 and given.count(mask) == 1 and given.count("tensor<") == 4
    assert "tensor<4x12x256x32xbf16>" in made and f"tensor<4{statistics}" in made
    given, made = backward.split(" -> ")
    assert given.count(array) == 5 and given.count(mask) == 1 and f"tensor<4{statistics}" in given
    assert made.count("tensor<4x12x256x32xbf16>") == 3


def test_without_cudnn():
    rows = jnp.zeros((1, 8, 2, 8), jnp.bfloat16)
    with pytest.raises(errors.ConfigError, match=r"train\.attention: cudnn cannot run.*to xla"):
        attention.attend(rows, rows, rows, jnp.ones((1, 8), jnp.int32), "cudnn")
