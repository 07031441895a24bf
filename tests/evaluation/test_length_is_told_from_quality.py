import numpy as np
import pytest
from judged import pair, rated
from rewardserve.evaluation.data import pairs_of
from rewardserve.evaluation.length import LengthBias, length_bias


def bias(prompts) -> LengthBias:
    return length_bias(prompts, pairs_of(prompts), seed=0)


def prompts_of(score, num=150, seed=0):
    """Six responses each, their quality and their length drawn independently."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(num):
        quality, lengths = rng.normal(size=6), np.round(np.exp(rng.normal(6, 0.8, 6))).astype(int)
        found.append(rated(score(quality, np.log2(lengths)), quality, str(number), lengths=lengths.tolist()))
    return found


def test_a_model_of_length_alone_is_found_out():
    found = bias(prompts_of(lambda quality, doublings: 3 * doublings))
    assert found.score_with_characters.value == pytest.approx(1.0)
    assert found.score_per_doubling == pytest.approx(3.0, rel=0.01)
    assert found.preferred_is_longer.value == 1.0 and found.preferred_is_shorter.value == 0.0
    assert found.balanced.value == 0.5
    assert 0.4 < found.length_removed.value < 0.6, "nothing is left of it"


def test_a_model_of_quality_alone_is_untouched():
    found = bias(prompts_of(lambda quality, doublings: quality))
    assert found.balanced.value == 1.0 and found.length_removed.value > 0.95
    assert abs(found.score_with_characters.value) < 0.1 and abs(found.score_per_doubling) < 0.1


def test_quality_behind_length_comes_out_when_length_is_removed():
    found = bias(prompts_of(lambda quality, doublings: quality + 2 * doublings))
    assert found.length_removed.value > 0.95
    assert found.balanced.value == (found.preferred_is_longer.value + found.preferred_is_shorter.value) / 2 < 0.8
    assert found.balanced.low < found.balanced.value < found.balanced.high


def test_a_bias_of_those_who_rated_is_shown_beside_the_models():
    found = bias([rated([1, 2, 3], [1, 2, 3], str(n), lengths=[10, 20, 40]) for n in range(5)])
    assert found.rating_with_characters.value == found.score_with_characters.value == pytest.approx(1.0)
    assert found.score_with_tokens.value == pytest.approx(1.0)
    assert found.longer_is_better.value == 1.0 and found.preferred_is_shorter is None and found.balanced is None


def test_lengths_within_a_tenth_are_alike():
    prompts = [pair(1.0, "a", lengths=(100, 91)), pair(1.0, "b", lengths=(100, 89)), pair(1.0, "c", lengths=(89, 100))]
    found = bias(prompts)
    counts = [each.num_pairs for each in (found.alike, found.preferred_is_longer, found.preferred_is_shorter)]
    assert counts == [1, 1, 1]


def test_the_curve_rises_for_a_model_of_length_and_has_all_responses():
    prompts = prompts_of(lambda quality, doublings: doublings)
    curve = bias(prompts).curve
    assert sum(each.num_responses for each in curve) == 6 * 150
    assert np.all(np.diff([each.doublings for each in curve]) > 0)
    assert np.all(np.diff([each.score for each in curve]) > 0)


def test_equal_and_empty_responses_are_no_error():
    found = bias([pair(1.0, lengths=(0, 0)), pair(1.0, "q", lengths=(0, 5))])
    assert found.score_per_doubling == pytest.approx(-1.0 / np.log2(6)) and found.alike.num_pairs == 1
