import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from judged import bradley_terry, pairs
from rewardserve.evaluation.calibration import calibration, curve, errors, fit, probabilities
from rewardserve.evaluation.calibration_file import KINDS
from scipy.special import expit

MARGINS = arrays(np.float64, st.integers(1, 40), elements=st.floats(-20, 20))


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_a_known_temperature_is_found_again(temperature):
    margins = bradley_terry(20_000, temperature)
    assert fit("temperature", margins, 0.0).temperature == pytest.approx(temperature, rel=0.05)


def test_scores_that_are_log_odds_are_as_sure_as_right():
    found = calibration(pairs(bradley_terry(4000, 1.0)), 0.0, seed=0)
    assert found.raw.ece < 2.5 * found.ece_by_chance and found.temperature == pytest.approx(1.0, rel=0.1)
    for each in found.curve:
        assert each.low <= each.confidence <= each.high
        assert abs(each.accuracy.value - each.confidence) < 0.08


def test_too_sure_a_model_is_seen_and_every_fit_mends_it():
    found = calibration(pairs(bradley_terry(4000, 6.0)), 0.0, seed=0)
    assert found.raw.ece > 0.1 and found.ece.low <= found.raw.ece <= found.ece.high
    assert set(found.fitted) == {"temperature", "affine", "isotonic"}
    for kind, fitted in found.fitted.items():
        assert fitted.ece < 0.04 and fitted.log_loss < found.raw.log_loss and fitted.brier < found.raw.brier, kind


def test_the_errors_are_those_reckoned_by_hand():
    """Two pairs of 0.9, one right; two of 0.6, both right."""
    found = errors(np.array([0.9, 0.1, 0.6, 0.6]))
    assert found.ece == pytest.approx((2 * 0.4 + 2 * 0.4) / 4)
    assert found.brier == pytest.approx((0.01 + 0.81 + 0.16 + 0.16) / 4)
    assert found.log_loss == pytest.approx(-(math.log(0.9) + math.log(0.1) + 2 * math.log(0.6)) / 4)


def test_opposite_errors_do_not_cancel_across_bins():
    """Sure of 0.55 and always right, sure of 0.95 and right half of the time: none on the whole, and much in each."""
    found = errors(np.array([0.55] * 8 + [0.95] * 4 + [0.05] * 4))
    assert found.ece == pytest.approx(0.45)


@given(MARGINS, MARGINS)
def test_a_fit_says_of_many_margins_what_it_says_of_each(margins, at):
    at = np.concatenate([at, margins])  # those on the curve's points, too
    for kind in KINDS:
        fitted = fit(kind, margins, 0.3)
        each = [fitted.probability(margin) for margin in at.tolist()]
        assert probabilities(fitted, at) == pytest.approx(np.array(each), rel=1e-12)


@given(MARGINS)
def test_an_isotonic_fit_never_falls_and_is_symmetric(margins):
    fitted = fit("isotonic", margins, 0.0)
    at = np.linspace(-25, 25, 201)
    found = probabilities(fitted, at)
    assert np.all(np.diff(found) >= -1e-12)
    assert found + found[::-1] == pytest.approx(np.ones(201))
    assert found.min() > 0 and found.max() < 1


@given(MARGINS)
def test_a_temperature_is_a_finite_number_above_zero(margins):
    assert 0 < fit("temperature", margins, 0.0).temperature < math.inf


def test_always_right_is_not_infinitely_sure():
    for kind in ("temperature", "affine", "isotonic"):
        assert 0.9 < fit(kind, np.full(100, 2.0), 0.0).probability(2.0) < 1.0


def test_an_affine_fit_is_the_temperature_with_the_mean_score_at_zero():
    margins = bradley_terry(500, 3.0)
    affine, temperature = fit("affine", margins, 7.0), fit("temperature", margins, 7.0)
    assert affine.score(7.0) == pytest.approx(0.0)
    assert affine.score(8.0) - affine.score(6.0) == pytest.approx(2 / temperature.temperature)
    assert affine.probability(1.3) == pytest.approx(temperature.probability(1.3))


def test_an_isotonic_fit_sees_what_no_temperature_can():
    """Right of any small margin as often as of any large one."""
    rng = np.random.default_rng(0)
    margins = rng.uniform(0.1, 8, 4000) * np.where(rng.random(4000) < 0.8, 1, -1)
    found = calibration(pairs(margins), 0.0, seed=0).fitted
    assert found["isotonic"].ece < 0.03 < found["temperature"].ece


def test_a_fit_is_judged_on_prompts_it_has_not_seen():
    """All pairs of a prompt have one margin and are right together or wrong together: whoever has seen some of them
    knows the others, so that folds which cut through prompts would show the error of a fit that has seen all."""
    rng = np.random.default_rng(0)
    both = pairs(np.tile(rng.uniform(0.5, 3, 30) * rng.choice([-1, 1], 30), 20), num_prompts=30)
    fitted = fit("isotonic", both.margin, 0.0)
    seen = errors(np.array([fitted.probability(margin) for margin in both.margin.tolist()]))
    unseen = calibration(both, 0.0, seed=0).fitted["isotonic"]
    assert unseen.log_loss > 1.2 * seen.log_loss


def test_a_curve_has_only_bins_with_pairs_and_all_pairs():
    found = curve(pairs([0.01, 0.02, 9.0, -9.0, 0.0]))
    assert [each.accuracy.num_pairs for each in found] == [3, 2]
    assert [(each.low, each.high) for each in found] == [(0.5, 0.55), (0.95, 1.0)]
    assert found[1].confidence == pytest.approx(expit(9.0)) and found[1].accuracy.value == 0.5


def test_one_prompt_is_too_few_for_a_fit_to_be_judged():
    found = calibration(pairs([1.0, -1.0, 2.0], num_prompts=1), 0.0, seed=0)
    assert found.fitted == {} and found.ece.low is None
