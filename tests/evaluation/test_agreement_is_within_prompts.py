import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judged import pair, rated
from rewardserve.evaluation.agreement import agreement, spearman
from scipy import stats

COLUMNS = st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 4)), min_size=3, max_size=12)


@given(COLUMNS)
def test_one_prompts_correlations_are_scipys(rows):
    scores, ratings = np.array(rows, dtype=float).T
    found = agreement([rated(scores, ratings)], seed=0)
    if len(set(ratings)) == 1:
        assert found is None
    elif len(set(scores)) == 1:
        assert found.spearman.value == found.kendall.value == 0.0, "equal scores say nothing"
    else:
        assert found.spearman.value == pytest.approx(stats.spearmanr(scores, ratings).statistic)
        assert found.kendall.value == pytest.approx(stats.kendalltau(scores, ratings).statistic)


@given(COLUMNS)
def test_no_monotone_transform_changes_them(rows):
    scores, ratings = np.array(rows, dtype=float).T
    assert agreement([rated(2.0**scores, ratings)], seed=0) == agreement([rated(scores, ratings)], seed=0)


def test_a_prompts_level_does_not_matter_within_and_does_across():
    """Each prompt in perfect order, the scores of the second far above: ratings of the two are alike."""
    prompts = [rated([1, 2, 3], [1, 2, 3], "a"), rated([103, 102, 101], [3, 2, 1], "b")]
    found = agreement(prompts, seed=0)
    assert found.spearman.value == found.kendall.value == pytest.approx(1.0)
    assert found.spearman_across_prompts < 0.6 and found.num_responses == 6


def test_pairs_and_prompts_rated_all_alike_have_none():
    assert agreement([pair(1.0), rated([1, 2], [5, 5])], seed=0) is None


def test_two_columns_that_never_change_are_no_error():
    assert spearman(np.ones(4), np.arange(4.0)) == 0.0
