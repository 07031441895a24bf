"""From what the engine gave to what is answered: each station does what it says, in its order, and raw stays raw."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from rewardserve.engine.base import EngineInfo, EngineItem
from rewardserve.engine.fake import fake_info
from rewardserve.errors import InvalidRequest, LoadFailed
from rewardserve.evaluation import calibration_file
from rewardserve.evaluation.calibration_file import BESIDE, Affine, Isotonic, Origin, Temperature
from rewardserve.service.finish import Finish, Finishing, check_steps, read_calibration
from rewardserve.types import JudgeFormat, ScoreKind, ScoreRequest, StepFormat, StepReduction

INFO = fake_info()
ORIGIN = Origin("m", "v1", "pairs.jsonl", 10, 5)


def finished(item: EngineItem, finishing: Finishing = Finishing(), info: EngineInfo = INFO, tokens: int = 7):  # noqa: B008
    finish = Finish(info, finishing.check("m", info), StepReduction.MEAN)
    return (*finish(item, tokens), finish.kind)


def test_without_anything_the_raw_score_is_the_score() -> None:
    assert finished(EngineItem(1.5)) == (1.5, 1.5, ScoreKind.RAW_LOGIT)
    info = replace(INFO, is_probability=True)
    assert finished(EngineItem(0.2, steps=(0.2, 0.6)), info=info) == (0.4, 0.4, ScoreKind.PROBABILITY)


@pytest.mark.parametrize(
    ("calibration", "wanted"),
    [(Temperature(2.0), 0.75), (Affine(2.0, -1.0), 2.0), (Isotonic((0.0, 1.0), (0.5, 0.9)), 1.5)],
)
def test_a_calibration_makes_the_score_or_leaves_it_and_makes_probabilities(calibration, wanted: float) -> None:
    raw, score, kind = finished(EngineItem(1.5), Finishing(calibration, ORIGIN))
    assert (raw, score) == (1.5, wanted)
    is_curve = isinstance(calibration, Isotonic)
    assert kind is (ScoreKind.RAW_LOGIT if is_curve else ScoreKind.NORMALIZED)
    curve = Finish(INFO, Finishing(calibration, ORIGIN), StepReduction.MIN).curve
    assert (curve(0.5) == pytest.approx(0.7)) if is_curve else curve is None


def test_what_is_calibrated_of_a_probability_are_its_log_odds() -> None:
    info = replace(INFO, is_probability=True)
    raw, score, kind = finished(EngineItem(0.9), Finishing(Temperature(2.0), ORIGIN), info)
    assert (raw, kind) == (0.9, ScoreKind.NORMALIZED) and score == pytest.approx(math.log(9) / 2)
    for certain in (0.0, 1.0):
        assert math.isfinite(finished(EngineItem(certain), Finishing(Temperature(2.0), ORIGIN), info)[1])
    _, penalised, kind = finished(EngineItem(0.9), Finishing(length_penalty=0.1), info, tokens=3)
    assert penalised == pytest.approx(math.log(9) - 0.3) and kind is ScoreKind.NORMALIZED
    normalized = replace(info, shift=0.5, scale=0.5)  # which is no probability any more
    assert finished(EngineItem(0.9), Finishing(Temperature(2.0), ORIGIN), normalized)[1] == pytest.approx(0.4)


def test_a_calibration_beside_the_checkpoint_is_taken_where_none_is_given_for_its_version(tmp_path: Path) -> None:
    calibration_file.write(tmp_path / BESIDE, Temperature(4.0), ORIGIN)
    given = Finishing(Temperature(2.0), ORIGIN, looks_beside=True)

    def found(finishing: Finishing, version: str = "v1") -> object:
        return finishing.check("m", replace(INFO, version=version), str(tmp_path)).calibration

    assert found(Finishing(looks_beside=True)) == Temperature(4.0)
    assert found(Finishing()) is None
    assert found(given) == Temperature(2.0)
    assert found(replace(given, origin=replace(ORIGIN, version="v0"))) == Temperature(4.0)  # as after a swap
    assert found(Finishing(looks_beside=True), version="v2") is None
    weighted = Finishing(looks_beside=True, weights={"good": 1.0})  # another sum than what was fitted to
    assert weighted.check("m", replace(INFO, attributes=("good",)), str(tmp_path)).calibration is None
    (tmp_path / BESIDE).write_text("{}")
    with pytest.raises(LoadFailed, match=BESIDE):
        found(Finishing(looks_beside=True))


def test_a_calibration_of_another_version_is_not_applied(caplog: pytest.LogCaptureFixture) -> None:
    finishing = Finishing(Temperature(2.0), replace(ORIGIN, version="v0"), length_penalty=0.1)
    assert finished(EngineItem(1.5), finishing)[:2] == (1.5, pytest.approx(0.8))
    assert "v0" in caplog.text and "v1" in caplog.text


def test_the_checkpoints_normaliser_then_the_calibration_then_the_penalty() -> None:
    info = replace(INFO, shift=0.5, scale=0.25)
    raw, score, kind = finished(
        EngineItem(1.5), Finishing(Temperature(2.0), ORIGIN, length_penalty=0.01), info, tokens=50
    )
    assert (raw, kind) == (1.5, ScoreKind.NORMALIZED) and score == pytest.approx((1.5 - 0.5) / 0.25 / 2 - 0.5)


def test_weighted_attributes_take_the_place_of_the_models_own_score() -> None:
    info = replace(INFO, attributes=("good", "safe", "short"), shift=3.0)
    item = EngineItem(9.0, attributes=(1.0, 2.0, 4.0))
    assert finished(item, Finishing(weights={"good": 0.5, "short": -1.0}), info)[:2] == (9.0, pytest.approx(-3.5))
    with pytest.raises(LoadFailed, match="no attribute kind; it has good, safe, short"):
        finished(item, Finishing(weights={"kind": 1.0}), info)


@pytest.mark.parametrize(
    "info",
    [
        replace(INFO, judge=JudgeFormat("{prompt} {response}")),
        replace(INFO, appended=7),
        replace(INFO, attributes=("good",)),
        replace(INFO, reads_single_states=False),
    ],
)
def test_steps_are_refused_where_a_steps_end_is_not_what_the_model_reads(info: EngineInfo) -> None:
    asked = ScoreRequest("", "", (), by_step=True)
    with pytest.raises(InvalidRequest, match="no step scores"):
        check_steps(asked, info)
    check_steps(replace(asked, by_step=False), info)
    check_steps(asked, replace(info, steps=StepFormat()))


def test_a_file_that_is_no_calibration_is_named(tmp_path: Path) -> None:
    calibration_file.write(tmp_path / "right.json", Temperature(1.5), ORIGIN)
    assert read_calibration(tmp_path / "right.json") == (Temperature(1.5), ORIGIN)
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(LoadFailed, match=r"wrong.json: format"):
        read_calibration(tmp_path / "wrong.json")
    with pytest.raises(LoadFailed, match="--fit-calibration"):
        read_calibration(tmp_path / "nowhere.json")


def test_scores_that_are_finished_otherwise_are_of_another_version() -> None:
    def version(finishing: Finishing) -> str:
        return Finish(INFO, finishing.check("m", INFO), StepReduction.MIN).version

    one, other = Finishing(Temperature(2.0), ORIGIN), Finishing(Temperature(2.5), ORIGIN)
    penalty = Finishing(length_penalty=0.1)
    assert version(Finishing()) == "v1"
    assert version(Finishing(Isotonic((0.0, 1.0), (0.5, 0.9)), ORIGIN)) == "v1"  # which is for Compare alone
    assert len({version(each) for each in (Finishing(), one, other, penalty)}) == 4
    assert version(one) == version(Finishing(Temperature(2.0), replace(ORIGIN, num_pairs=11)))
    of_another = Finishing(Temperature(2.0), replace(ORIGIN, version="v0"))
    assert version(of_another) == "v1"  # it is not applied


@pytest.mark.parametrize(("fitted", "served"), [("v1-bf16", "v1-bf16-adapted"), ("v1-bf16-adapted", "v1-bf16")])
def test_a_calibration_is_for_an_adapter_however_it_is_applied(fitted: str, served: str) -> None:
    finishing = Finishing(Temperature(2.0), replace(ORIGIN, version=fitted))
    assert finished(EngineItem(1.0), finishing, replace(INFO, version=served))[1] == 0.5
    assert finished(EngineItem(1.0), finishing, replace(INFO, version="v1-int8"))[1] == 1.0


@pytest.mark.parametrize(
    ("finishing", "wanted"),
    [
        (Finishing(), 2.0),
        (Finishing(Temperature(4.0), ORIGIN, length_penalty=0.1), 0.5),
        (Finishing(Affine(3.0, 1.0), ORIGIN), 6.0),
        (Finishing(weights={"good": 1.0}), None),
    ],
)
def test_the_models_own_std_is_in_the_units_of_its_final_score(finishing: Finishing, wanted: float | None) -> None:
    info = replace(INFO, attributes=("good",), shift=7.0, scale=0.25)
    item = EngineItem(1.5, attributes=(1.0,), std=0.5)
    assert Finish(info, finishing, StepReduction.MIN).std(item) == wanted
    assert Finish(info, finishing, StepReduction.MIN).std(replace(item, std=None)) is None


def test_a_product_is_refused_of_steps_that_are_no_probabilities() -> None:
    asked = ScoreRequest("", "", (), by_step=True, step_reduction=StepReduction.PRODUCT)
    logits = replace(INFO, steps=StepFormat())
    for request, info in ((asked, INFO), (asked, logits), (replace(asked, by_step=False), logits)):
        with pytest.raises(InvalidRequest, match="use MIN, MEAN or LAST") as refused:
            check_steps(request, info)
        assert refused.value.field == "options.step_reduction"
    check_steps(asked, replace(logits, is_probability=True))
    check_steps(replace(asked, by_step=False), INFO)  # there are no steps, and nothing is multiplied
