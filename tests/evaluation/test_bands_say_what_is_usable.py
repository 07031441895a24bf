from itertools import pairwise

import pytest
from rewardserve.evaluation.bands import BANDS, SCALES, verdict


@pytest.mark.parametrize("figure", SCALES)
def test_every_scale_has_its_reason_its_source_and_marks_in_order(figure):
    scale = SCALES[figure]
    assert len(scale.reason) > 20 and scale.source
    rises = [a < b for a, b in pairwise(scale.marks)]
    assert all(rises) or not any(rises)


@pytest.mark.parametrize(
    ("figure", "values"),
    [("ranking accuracy", (0.5, 0.6, 0.7, 0.8)), ("expected calibration error", (0.3, 0.1, 0.05, 0.01))],
)
def test_better_figures_are_in_better_bands_whichever_way_is_better(figure, values):
    assert [verdict(figure, value).band for value in values] == list(BANDS)


def test_a_figure_on_a_mark_is_in_the_better_band():
    assert verdict("ranking accuracy", 0.75).band == "good"
    assert verdict("expected calibration error", 0.03).band == "good"


def test_a_verdict_is_sure_where_its_interval_lies_in_one_band():
    assert verdict("ranking accuracy", 0.7, 0.66, 0.74).is_sure
    assert not verdict("ranking accuracy", 0.7, 0.66, 0.76).is_sure
    assert not verdict("ranking accuracy", 0.7).is_sure
