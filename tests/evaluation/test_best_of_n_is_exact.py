from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judged import pair, rated
from rewardserve.evaluation.best_of_n import best_of_n, expected_best

ROWS = st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 20)), min_size=2, max_size=9)


def columns(rows):
    return np.array(rows, dtype=float).T


@given(ROWS)
def test_it_is_what_all_draws_give_one_by_one(rows):
    scores, ratings = columns(rows)
    found = expected_best(scores, ratings, len(rows))
    for n in range(1, len(rows) + 1):
        kept = []
        for drawn in combinations(range(len(rows)), n):
            best = max(scores[i] for i in drawn)
            kept.append(np.mean([ratings[i] for i in drawn if scores[i] == best]))
        assert found[n - 1] == pytest.approx(np.mean(kept), abs=1e-9)


@given(ROWS)
def test_it_lies_between_the_worst_choice_and_the_oracle(rows):
    scores, ratings = columns(rows)
    found = expected_best(scores, ratings, len(rows))
    oracle, worst = expected_best(ratings, ratings, len(rows)), expected_best(-ratings, ratings, len(rows))
    assert np.all(worst <= found + 1e-9) and np.all(found <= oracle + 1e-9)
    assert found[0] == pytest.approx(ratings.mean()), "one drawn is any of them"
    assert np.all(np.diff(oracle) >= -1e-9), "more to choose from is never worse for the oracle"


@given(ROWS)
def test_no_monotone_transform_of_the_scores_changes_it(rows):
    scores, ratings = columns(rows)
    assert np.array_equal(expected_best(2.0**scores, ratings, len(rows)), expected_best(scores, ratings, len(rows)))


def test_equal_scores_choose_like_chance():
    found = expected_best(np.zeros(6), np.arange(6.0), 6)
    assert found == pytest.approx(np.full(6, 2.5))


def test_many_responses_are_no_overflow():
    ratings = np.random.default_rng(0).random(2000)
    found = expected_best(ratings, ratings, 64)
    assert np.all(np.isfinite(found)) and found[63] == pytest.approx(64 / 65, abs=0.01)


def test_a_perfect_model_gains_all_and_a_random_one_nothing():
    rng = np.random.default_rng(0)
    ratings = rng.random((200, 8))
    perfect = best_of_n([rated(row, row, str(i)) for i, row in enumerate(ratings)], seed=0)
    assert perfect.share_of_oracle.value == pytest.approx(1.0) and len(perfect.curve) == 8
    assert perfect.curve[-1].rating == pytest.approx(ratings.max(axis=1).mean())
    chance = best_of_n([rated(rng.random(8), row, str(i)) for i, row in enumerate(ratings)], seed=0)
    gain = chance.curve[-1].gain
    assert gain.low < 0 < gain.high and abs(chance.share_of_oracle.value) < 0.15
    turned = best_of_n([rated(-row, row, str(i)) for i, row in enumerate(ratings)], seed=0)
    assert turned.share_of_oracle.value < -0.9


def test_every_n_is_of_the_same_prompts():
    prompts = [rated(range(n), range(n), f"{i}") for i, n in enumerate((2, 4, 8, 8))]
    found = best_of_n(prompts, seed=0)
    assert len(found.curve) == 8 and found.num_prompts == 2, "half of the prompts have 8"
    found = best_of_n([*prompts, rated(range(3), range(3), "3")], seed=0)
    assert len(found.curve) == 4 and found.num_prompts == 3


def test_where_nothing_is_rated_or_all_alike_there_is_nothing_to_gain():
    assert best_of_n([pair(1.0), rated([1], [1])], seed=0) is None
    alike = best_of_n([rated([1, 2], [5, 5])], seed=0)
    assert alike.share_of_oracle is None and alike.curve[0].gain.low is None


@pytest.mark.parametrize("rating", [0.1, 0.3, 0.7, 2.34, 3.19, 4.9])
def test_a_rounding_is_nothing_to_gain(rating):
    alike = [rated(range(n), [rating] * n, f"{n}") for n in range(3, 9)]
    assert best_of_n(alike, seed=0).share_of_oracle is None
    found = best_of_n([*alike, rated(range(8), [rating] * 7 + [rating + 1], "x")], seed=0)
    assert found.share_of_oracle.low == pytest.approx(1.0) and found.share_of_oracle.high == pytest.approx(1.0)
