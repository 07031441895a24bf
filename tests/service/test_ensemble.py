"""What members said becomes one answer: folded, then calibrated as the ensemble's own, by steps where these agree."""

import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry
from rewardserve.evaluation.calibration_file import Affine, Isotonic, Origin, Temperature, log_odds
from rewardserve.metrics import Metrics, ModelMetrics
from rewardserve.service.ensemble import Ensemble, combine
from rewardserve.service.finish import Finishing
from rewardserve.types import (
    Aggregate,
    GroupScore,
    How,
    ItemCode,
    ItemFailure,
    ItemScore,
    ScoreKind,
    ScoreRequest,
    ScoreResult,
    Timings,
)

REQUEST = ScoreRequest("r", "both", ())
VERSIONS = (("a", "a-1"), ("b", "b-1"))


def both(finishing: Finishing = Finishing()) -> Ensemble:  # noqa: B008, it is frozen
    metrics = ModelMetrics(Metrics(CollectorRegistry()), "both")
    return Ensemble("both", ("a", "b"), Aggregate(How.MEAN), metrics, finishing)


VERSION = both().version(VERSIONS)
ORIGIN = Origin("both", VERSION, "pairs.jsonl", 10, 5)


def item(score: float, **values) -> ItemScore:
    return replace(ItemScore(score, None, 3, 10, 0, False, raw=score), **values)


def combined(items: Sequence[ItemScore], ensemble: Ensemble, **options) -> tuple[ItemScore, ScoreResult]:
    results = [
        ScoreResult("", name, version, (GroupScore("", (each,)),), Timings(0, 0, 0, 0, 0))
        for (name, version), each in zip(VERSIONS, items, strict=True)
    ]
    result = combine(ensemble, replace(REQUEST, **options), results)
    return result.groups[0].items[0], result


@pytest.mark.parametrize("failed", [0, 1])
def test_a_failed_item_tells_the_tokens_that_a_scored_one_would(failed: int) -> None:
    counts = {"num_prompt_tokens": 7, "num_response_tokens": 40, "num_cached_tokens": 3, "truncated": True}
    parts = [item(1.0, num_cached_tokens=5), item(2.0, **counts)]
    scored, _ = combined(parts, both())
    failure = ItemFailure(ItemCode.OUT_OF_RANGE, "too long")
    parts[failed] = replace(parts[failed], score=None, raw=None, failure=failure)
    found, _ = combined(parts, both())
    assert found == replace(scored, score=None, raw=None, failure=found.failure, std=None, members=None)
    assert found.failure.message == f"member '{'ab'[failed]}': too long"
    assert all(getattr(found, name) == value for name, value in counts.items())


@pytest.mark.parametrize(
    ("finishing", "finished"),
    [
        (Finishing(Temperature(2.0), ORIGIN), lambda score: score / 2),
        (Finishing(Affine(3.0, -1.0), ORIGIN), lambda score: 3 * score - 1),
        (Finishing(length_penalty=0.25), lambda score: score - 2.5),
    ],
)
def test_what_is_configured_for_the_ensemble_finishes_all_but_the_members(finishing, finished) -> None:
    found, result = combined([item(1.0), item(5.0)], both(finishing))
    assert (found.score, found.raw, found.kind) == (finished(3.0), 3.0, ScoreKind.NORMALIZED)
    assert (found.members.mean, found.members.min) == (finished(3.0), finished(1.0))
    assert found.std == pytest.approx(statistics.pstdev([finished(1.0), finished(5.0)]))
    assert found.members.scores == (1.0, 5.0)
    assert result.version.startswith(VERSION) and result.version != VERSION


def test_probabilities_are_calibrated_by_their_log_odds() -> None:
    items = [item(score, kind=ScoreKind.PROBABILITY) for score in (0.5, 0.9)]
    found, _ = combined(items, both(Finishing(Temperature(2.0), ORIGIN)))
    assert found.score == pytest.approx(log_odds(0.7) / 2) and found.kind is ScoreKind.NORMALIZED
    assert found.std == pytest.approx(log_odds(0.9) / 4)


@pytest.mark.parametrize(
    ("kinds", "how", "wanted"),
    [
        ((ScoreKind.PROBABILITY, ScoreKind.PROBABILITY), How.MEAN, ScoreKind.PROBABILITY),
        ((ScoreKind.PROBABILITY, ScoreKind.RAW_LOGIT), How.MEAN, ScoreKind.NORMALIZED),
        ((ScoreKind.RAW_LOGIT, ScoreKind.RAW_LOGIT), How.MEAN, ScoreKind.RAW_LOGIT),
        ((ScoreKind.PROBABILITY, ScoreKind.PROBABILITY), How.MEAN_LESS_STD, ScoreKind.NORMALIZED),
        ((ScoreKind.RAW_LOGIT, ScoreKind.RAW_LOGIT), How.MEAN_LESS_STD, ScoreKind.RAW_LOGIT),
    ],
)
def test_it_is_a_probability_only_if_it_must_be_one(kinds, how: How, wanted: ScoreKind) -> None:
    ensemble = both()
    ensemble.aggregate = Aggregate(how, 1.0)
    items = [item(score, kind=kind) for score, kind in zip((0.2, 0.9), kinds, strict=True)]
    assert combined(items, ensemble)[0].kind is wanted


@pytest.mark.parametrize("adapted", [False, True])
def test_a_calibration_holds_however_members_apply_their_adapters(adapted: bool) -> None:
    versions = [(("a", "a-1-bf16"), ("b", "b-1-bf16")), (("a", "a-1-bf16-adapted"), ("b", "b-1-bf16-adapted"))]
    fitted, served = versions if adapted else versions[::-1]
    ensemble = both(Finishing(Temperature(2.0), replace(ORIGIN, version=both().version(fitted))))
    version, finishing = ensemble.finishing(served)
    assert (version, finishing.calibration) == (both().version(served), Temperature(2.0))
    _, of_another = ensemble.finishing((("a", "a-2-bf16"), ("b", "b-1-bf16")))
    assert of_another.calibration is None


def test_a_curve_leaves_scores_as_they_are_and_comes_with_them() -> None:
    found, result = combined([item(1.0), item(5.0)], both(Finishing(Isotonic((0.0, 1.0), (0.5, 0.9)), ORIGIN)))
    assert (found.score, found.kind, result.version) == (3.0, ScoreKind.RAW_LOGIT, VERSION)
    assert result.curve is not None and result.curve(1.0) == 0.9


def test_a_calibration_is_not_applied_once_a_member_is_another(caplog: pytest.LogCaptureFixture) -> None:
    ensemble = both(Finishing(Temperature(2.0), replace(ORIGIN, version="ensemble-of-others")))
    for _ in range(3):
        found, result = combined([item(1.0), item(5.0)], ensemble)
        assert (found.score, result.version) == (3.0, VERSION)
    assert caplog.text.count("served uncalibrated") == 1 and "ensemble-of-others" in caplog.text


def test_steps_are_folded_one_by_one() -> None:
    items = [item(1.0, steps=(1.0, 4.0)), item(2.0, steps=(3.0, 2.0))]
    found, _ = combined(items, both(), by_step=True)
    assert (found.steps, found.score) == ((2.0, 3.0), 1.5)  # each member has made its own score of its own steps


def test_members_that_see_other_steps_fail_the_item_where_steps_are_asked_for() -> None:
    items = [item(1.0, steps=(1.0, 4.0)), item(2.0, steps=(3.0,))]
    found, _ = combined(items, both(), by_step=True)
    assert found.score is None and "'a' 2, 'b' 1" in found.failure.message
    unasked, _ = combined([items[0], item(2.0)], both())
    assert (unasked.score, unasked.steps) == (1.5, ())


@pytest.mark.parametrize("finishing", [Finishing(Affine(1e10, 0.0), ORIGIN), Finishing(Affine(1e300, 0.0), ORIGIN)])
def test_what_fp32_cannot_hold_is_a_failure_and_no_score(finishing: Finishing) -> None:
    found, _ = combined([item(1e30), item(3e30)], both(finishing))
    assert found.score is None and found.raw is None
    assert found.failure.code is ItemCode.INTERNAL and "no finite number" in found.failure.message


def test_a_spread_subtracted_too_often_to_be_held_is_a_failure() -> None:
    ensemble = both()
    ensemble.aggregate = Aggregate(How.MEAN_LESS_STD, 1e39)
    assert combined([item(1.0), item(3.0)], ensemble)[0].failure.code is ItemCode.INTERNAL
    assert combined([item(1.0), item(1.0)], ensemble)[0].score == 1.0
