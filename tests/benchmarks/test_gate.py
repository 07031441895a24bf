"""No speed on a red gate."""

import math

import gate
import pytest
from gate import RedGate

EXACT = [[0.0, 1.0], [2.0, -1.0]]


def off_by(error: float) -> list[list[float]]:
    return [[score + error for score in group] for group in EXACT]


def test_rounding_passes_and_nonsense_does_not() -> None:
    found = gate.check({"hf_padded": off_by(0.01), "close": off_by(0.02), "far": off_by(0.06)}, EXACT)
    assert [found[name].right for name in ("hf_padded", "close", "far")] == [True, True, False]
    assert found["far"].mean_abs_err == pytest.approx(0.06)


def test_without_padded_hugging_face_the_spread_decides() -> None:
    found = gate.check({"close": off_by(0.06), "far": off_by(0.2)}, EXACT)
    assert (found["close"].right, found["far"].right) == (True, False)


def test_padded_hugging_face_gives_no_licence_when_it_is_wrong_itself() -> None:
    found = gate.check({"hf_padded": off_by(0.5), "ours": off_by(0.5)}, EXACT)
    assert not found["hf_padded"].right and not found["ours"].right


@pytest.mark.parametrize(
    "scores", [[], [[0.0], [2.0, -1.0]], [[math.nan, 1.0], [2.0, -1.0]], [[None, 1.0], [2.0, -1.0]]]
)
def test_a_missing_score_is_wrong(scores: list[list[float]]) -> None:
    assert not gate.check({"ours": scores}, EXACT)["ours"].right


def test_only_ours_closes_the_gate() -> None:
    found = gate.check({"hf_padded": off_by(0.01), "ours": off_by(0.01), "peer": off_by(9.0)}, EXACT)
    gate.refuse(found, ["ours"], "ppo")
    with pytest.raises(RedGate, match="ppo: peer is off by 9"):
        gate.refuse(found, ["peer"], "ppo")
