"""Planning for a slice sets variables for jax, which other tests must not see."""

import os

import pytest


@pytest.fixture(autouse=True)
def own_environment():
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
