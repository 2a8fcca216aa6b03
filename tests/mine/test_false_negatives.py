"""Signs by which a candidate is suspicious, on texts whose answer is plain."""

import pytest

from arcticjax.mine.false_negatives import Estimate, signs

LONG = "the cranes sleep standing on one leg in shallow water during the night far from foxes"
POSITIVES = [LONG, "forty two"]


@pytest.mark.parametrize(
    "candidate, score, expected",
    [
        ("another thing altogether", 0.1, []),
        (LONG.upper() + "!", 0.1, ["same text"]),
        ("how do cranes sleep", 0.1, ["same text"]),
        (LONG + " indeed", 0.1, ["near-duplicate", "contains the answer"]),
        (LONG.replace("foxes", "dogs"), 0.1, ["near-duplicate"]),
        ("the answer is forty-two, they said", 0.1, ["contains the answer"]),
        ("forty twofold", 0.1, []),
        ("another thing altogether", 0.6, ["above the positive"]),
        ("another thing altogether", 0.5, []),
        ("Forty two.", 0.9, ["same text", "above the positive"]),
    ],
)
def test_signs(candidate, score, expected):
    assert signs("How do cranes sleep?", POSITIVES, 0.5, [candidate], [score]) == [expected]


def test_counts():
    estimate = Estimate()
    estimate.add([["same text", "above the positive"], [], ["near-duplicate"]])
    estimate.add([[], ["near-duplicate"]])
    head, first, second, last = estimate.table()
    assert head == [
        "rank", "candidates", "same text", "near-duplicate", "contains the answer",
        "above the positive", "any",
    ]  # fmt: skip
    assert first == ["1", "2", "50.00 %", "0.00 %", "0.00 %", "50.00 %", "50.00 %"]
    assert second == ["2 to 5", "3", "0.00 %", "66.67 %", "0.00 %", "0.00 %", "66.67 %"]
    assert last[:4] == ["queries with one", "2", "50.00 %", "100.00 %"]
