import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judged import pair, rated
from rewardserve.evaluation.data import pairs_of
from rewardserve.evaluation.disagreement import auroc, disagreement


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=20))
def test_auroc_is_what_all_comparisons_give_one_by_one(rows):
    signal, wrong = np.array([s for s, _ in rows], dtype=float), np.array([w for _, w in rows])
    found = auroc(signal, wrong)
    compared = [(a > b) + (a == b) / 2 for a in signal[wrong] for b in signal[~wrong]]
    assert found is None if not compared else found == pytest.approx(np.mean(compared))


def prompts_of(informative: bool):
    rng = np.random.default_rng(0)
    prompts = []
    for number in range(400):
        right = rng.random() < 0.7
        std = (0.2 if right else 1.0) + rng.random() if informative else rng.random()
        prompts.append(rated([1, 0] if right else [0, 1], [1, 0], str(number), members=[(std, -std), (0.5, 0.5)]))
    return prompts


def test_members_that_disagree_where_they_err_are_told_from_those_that_do_not():
    found = disagreement(pairs_of(prompts_of(informative=True)))
    assert found.auroc > 0.8 and found.auroc_of_small_margin == 0.5, "all margins are alike"
    assert found.curve[0].accuracy.value == pytest.approx(0.7, abs=0.06)
    assert found.curve[-1].accuracy.value > 0.95 and found.curve[-1].accuracy.num_pairs == 40
    silent = disagreement(pairs_of(prompts_of(informative=False)))
    assert 0.4 < silent.auroc < 0.6 and 0.4 < silent.auroc_beyond_margin < 0.6


def test_what_members_tell_is_seen_though_they_differ_most_where_margins_are_large():
    rng, prompts = np.random.default_rng(0), []
    for number in range(400):
        large = rng.random() < 0.5
        right = rng.random() < (0.95 if large else 0.5)
        sign, apart = 1 if right else -1, (3 if large else 0) + (0.1 if right else 0.3)
        margin = sign * (5 + rng.random() if large else 1 + rng.random() / 10)
        prompts.append(rated([margin, 0], [1, 0], str(number), members=[(margin + apart, margin - apart), (0.0, 0.0)]))
    found = disagreement(pairs_of(prompts))
    assert found.auroc_beyond_margin > 0.95
    assert found.auroc_of_std < 0.5


def test_a_member_whose_scores_all_lie_higher_than_anothers_does_not_disagree_with_it():
    found = pairs_of([rated([1, 0], [1, 0], members=[(3.0, 13.0), (1.0, 11.0)])])
    assert found.members.tolist() == [[2.0, 2.0]]
    found = pairs_of([rated([1, 0], [1, 0], members=[(3.0, 13.0), (1.0, 13.0)])])
    assert found.members.tolist() == [[2.0, 0.0]]


def test_members_that_differ_in_how_sure_they_are_of_the_same_order_hardly_disagree():
    """Of large margins the std is large too, and says nothing; of the probabilities it is small."""
    right = [rated([6, 0], [1, 0], str(n), members=[(4.0, 8.0), (0.0, 0.0)]) for n in range(20)]
    wrong = [rated([0, 1], [1, 0], f"w{n}", members=[(0.0, 0.0), (-0.5, 2.5)]) for n in range(5)]
    found = disagreement(pairs_of([*right, *wrong]))
    assert found.auroc_of_std == 0.0
    assert found.auroc_of_preferences == 1.0


def test_a_single_model_and_one_that_is_always_right_have_none():
    assert disagreement(pairs_of([pair(1.0), pair(-1.0)])) is None
    assert disagreement(pairs_of([rated([1, 0], [1, 0], members=[(1.0, 2.0), (0.0, 3.0)])])) is None
