import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judged import pair, rated
from rewardserve.evaluation.agreement import agreement, spearman
from rewardserve.evaluation.best_of_n import best_of_n
from rewardserve.evaluation.data import pairs_of
from rewardserve.evaluation.length import length_bias
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


def test_rows_of_one_prompt_are_one_prompt_to_every_interval() -> None:
    """Fifty rows of each of ten prompts tell no more of other prompts than ten do."""
    rng = np.random.default_rng(0)
    groups = []
    for prompt in range(10):
        right = prompt % 2 * 2 - 1  # all rows of a prompt agree, or all disagree
        for _ in range(50):
            lengths = (rng.permutation(4) + 1).tolist()
            groups.append(rated(right * np.arange(4.0), np.arange(4.0), f"p{prompt}", lengths=lengths))
    found, best = agreement(groups, 0), best_of_n(groups, 0)
    length = length_bias(groups, pairs_of(groups), 0).score_with_characters
    assert found is not None and best is not None
    assert found.spearman.num_prompts == best.num_prompts == 10
    assert found.spearman.high - found.spearman.low > 0.8
    assert best.curve[-1].gain.high - best.curve[-1].gain.low > 0.8
    assert length.num_prompts == 10
