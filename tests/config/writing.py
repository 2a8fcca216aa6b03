"""The smallest config, and what a config that is refused reports."""

import pytest

from arcticjax.config import load_config
from arcticjax.errors import ConfigError

MINIMAL = """\
run:
  directory: runs/x
model:
  init: some/model
data:
  sources:
    - name: web
      path: web.parquet
optimizer:
  learning_rate: 1e-5
train:
  total_steps: 100
  global_batch: 64
"""


def report(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def replaced(old, new):
    assert MINIMAL.count(old) == 1
    return MINIMAL.replace(old, new)
