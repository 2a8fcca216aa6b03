"""Schedules and decay, against their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from arcticjax.config.schema import OptimizerConfig
from arcticjax.step import optimizer


def rates(total, **fields):
    schedule = optimizer.make_schedule(OptimizerConfig(learning_rate=1.0, **fields), total)
    return np.array([float(schedule(step)) for step in range(total)])


def test_linear_with_warm_up():
    np.testing.assert_allclose(
        rates(10, schedule="linear", warmup_steps=4),
        [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
        rtol=1e-6,
    )


def test_one_step_of_warm_up_is_the_peak():
    np.testing.assert_allclose(rates(3, schedule="constant", warmup_steps=1), [1, 1, 1])


def test_final_fraction():
    assert rates(100, schedule="linear", final_fraction=0.1)[-1] == pytest.approx(0.1 + 0.9 / 100)
    assert rates(100, schedule="cosine", final_fraction=0.1)[-1] == pytest.approx(0.1, abs=1e-3)


def test_cosine_is_half_way_down_in_the_middle():
    assert rates(100, schedule="cosine")[50] == pytest.approx(0.5, abs=1e-6)


def test_warm_up_stable_decay():
    found = rates(20, schedule="wsd", warmup_steps=2, decay_steps=5)
    np.testing.assert_allclose(found[1:15], 1)
    np.testing.assert_allclose(found[15:], [1, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)


def test_biases_and_scales_are_not_decayed():
    params = {
        "a": {"kernel": jnp.ones(2), "bias": jnp.ones(2)},
        "norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
        "token": jnp.ones(2),
        "loss": {"log_temperature": jnp.ones(())},
    }
    make = optimizer.make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), 10)
    zero = {
        "a": {"kernel": jnp.zeros(2), "bias": jnp.zeros(2)},
        "norm": {"scale": jnp.zeros(2), "bias": jnp.zeros(2)},
        "token": jnp.zeros(2),
        "loss": {"log_temperature": jnp.zeros(())},
    }
    changes, _ = make.update(zero, make.init(params), params)
    assert float(changes["a"]["kernel"][0]) == pytest.approx(-0.05)
    assert float(changes["token"][0]) == pytest.approx(-0.05)
    assert float(changes["a"]["bias"][0]) == float(changes["norm"]["scale"][0]) == 0.0
    assert float(changes["loss"]["log_temperature"]) == 0.0


def test_layers_learn_at_decaying_shares_and_frozen_ones_stay():
    pieces = {
        "params": {
            "embeddings": {"token": jnp.ones((1, 3))},
            "layers": {"kernel": jnp.ones((4, 3))},
        },
        "loss": {"log_temperature": jnp.ones((1, 1))},
    }
    config = OptimizerConfig(learning_rate=1.0, layer_decay=0.5)
    shares = optimizer.rate_shares(config, pieces)
    assert shares["params"]["layers"]["kernel"][:, 0].tolist() == [0.125, 0.25, 0.5, 1.0]
    assert shares["params"]["embeddings"]["token"] == 0.0625
    assert shares["loss"]["log_temperature"] == 1.0

    frozen = OptimizerConfig(
        learning_rate=1.0, freeze_embeddings=True, freeze_layers=2, weight_decay=0.5
    )
    make = optimizer.make_optimizer(frozen, 10)
    changes, _ = make.update(pieces, make.init(pieces), pieces)
    moved = np.abs(np.asarray(changes["params"]["layers"]["kernel"])).sum(axis=1) > 0
    assert moved.tolist() == [False, False, True, True]
    assert not np.any(changes["params"]["embeddings"]["token"])
    assert np.all(changes["loss"]["log_temperature"])
    gradients = optimizer.without_frozen(frozen, pieces)
    assert np.asarray(gradients["params"]["layers"]["kernel"])[:, 0].tolist() == [0, 0, 1, 1]
    assert not np.any(gradients["params"]["embeddings"]["token"])
