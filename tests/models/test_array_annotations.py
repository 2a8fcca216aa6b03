"""The shapes written in the signatures are those that flow: checked with jaxtyping and beartype."""

import beartype
import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from arcticjax.models import activations, attention, encoder, packing, pooling
from arcticjax.models.spec import ModelSpec

MODULES = (activations, attention, encoder, packing, pooling)


@pytest.fixture
def check(monkeypatch):
    """A decorator that checks annotations, whose names exist for type checkers only."""
    for module in MODULES:
        for name in ("Array", "Bool", "Float", "Int"):
            monkeypatch.setattr(module, name, getattr(jaxtyping, name), raising=False)
    return jaxtyping.jaxtyped(typechecker=beartype.beartype)


def test_annotations_hold_and_reject_other_shapes(check):
    starts_RK = jnp.array([[0, 5], [0, 8]])
    lengths_RK = jnp.array([[5, 3], [8, 0]])
    segments_RS, _ = check(packing.segments_and_positions)(starts_RK, lengths_RK, 8)
    hidden_RSD = jnp.ones((2, 8, 4))
    pool = check(pooling.pool)
    for kind in ("cls", "mean", "last"):
        check(pooling.normalize)(pool(hidden_RSD, starts_RK, lengths_RK, kind))
    with pytest.raises(jaxtyping.TypeCheckError):
        pool(hidden_RSD, starts_RK, lengths_RK[:1], "cls")
    heads_RSHK = hidden_RSD.reshape(2, 8, 2, 2)
    attend = check(attention.attend)
    attend(heads_RSHK, heads_RSHK, heads_RSHK, segments_RS)
    with pytest.raises(jaxtyping.TypeCheckError):
        attend(heads_RSHK, heads_RSHK[:, :4], heads_RSHK, segments_RS)


def test_encoder_annotations_hold(check):
    spec = ModelSpec(
        vocab_size=9, hidden_size=4, num_layers=1, num_heads=2, intermediate_size=8, max_positions=8
    )
    model = encoder.Encoder(spec)
    tokens_RS = jnp.zeros((2, 8), jnp.int32)
    table_RK = jnp.ones((2, 3), jnp.int32)
    vectors = jax.eval_shape(
        lambda params: check(encoder.Encoder.embed)(
            model, params, tokens_RS, table_RK, table_RK, pooling="mean"
        ),
        model.abstract(),
    )
    assert vectors.shape == (2, 3, 4)
    with pytest.raises(jaxtyping.TypeCheckError):
        check(encoder.Encoder.hidden)(model, {}, tokens_RS, tokens_RS[:, :3], tokens_RS)
