"""Names of leaves and the table of their differences."""

from collections import namedtuple

import jax
import numpy as np
import pytest

from arcticjax.checkpoint.leaves import describe_leaves, difference_table, name_leaves, nest

Moments = namedtuple("Moments", ["mu", "nu"])


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, np.float32)


def test_leaves_are_named_by_their_path_in_tree_order():
    tree = {"b": (Moments(1, {"x": 2}), None), "a": [3], "empty": {}}
    named = name_leaves(tree)
    assert named == {"a/0": 3, "b/0/mu": 1, "b/0/nu/x": 2}
    assert list(named.values()) == jax.tree.leaves(tree)
    assert nest(named) == {"a": {"0": 3}, "b": {"0": {"mu": 1, "nu": {"x": 2}}}}


@pytest.mark.parametrize("tree", [{"a/b": 1}, {"a.b": 1}, {"": 1}, 1, {"a": {1: 1, "1": 1}}])
def test_names_that_would_be_ambiguous_are_refused(tree):
    with pytest.raises(ValueError):
        name_leaves(tree)


def test_the_table_shows_missing_extra_and_changed_leaves_and_is_bounded():
    stored = describe_leaves({"same": shape(2), "gone": shape(3), "grown": shape(4, 5)})
    wanted = describe_leaves({"same": shape(2), "new": shape(), "grown": shape(4, 6)})
    assert difference_table(stored, stored) is None
    assert difference_table(stored, wanted).splitlines() == [
        "3 of 4 leaves differ",
        "  leaf   stored        wanted",
        "  new    -             float32[]",
        "  grown  float32[4,5]  float32[4,6]",
        "  gone   float32[3]    -",
    ]
    many = describe_leaves({f"leaf{number}": shape(1) for number in range(100)})
    lines = difference_table(many, {}).splitlines()
    assert len(lines) == 23 and lines[-1] == "  ... and 80 more"
