"""Rows of tokens, against a plain loop."""

import numpy as np
import pytest

from arcticjax import errors
from arcticjax.data.assemble import Template, fill_rows


def test_fill_rows_equals_a_plain_loop():
    template = Template(start_id=101, prompt=np.array([7, 8]), end_id=102, longest=10)
    texts = [np.arange(20, 20 + n, dtype=np.int32) for n in (0, 1, 6, 7, 40)]
    lengths = template.lengths([len(text) for text in texts])
    assert lengths.tolist() == [4, 5, 10, 10, 10]
    rows = np.zeros((4, 16), np.int32)
    positions = np.array([0, 4, 16, 32, 48])
    fill_rows(rows, texts, positions, template)
    wanted = np.zeros(64, np.int32)
    for text, position in zip(texts, positions, strict=True):
        tokens = [101, 7, 8, *text[:6], 102]
        wanted[position : position + len(tokens)] = tokens
    assert (rows.ravel() == wanted).all()


def test_a_cap_without_room_for_text_is_refused():
    with pytest.raises(errors.ConfigError, match="cap of 4 tokens leaves no room"):
        Template(start_id=1, prompt=np.array([5, 6]), end_id=2, longest=4)
