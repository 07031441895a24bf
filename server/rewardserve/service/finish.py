"""What the engine gave for a response -> the score that is answered: reduced, weighted, normalised, calibrated.

In this order; each only where it is configured or the checkpoint brings it. The raw score stays in the reply.
"""

import hashlib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rewardserve.engine.base import ADAPTED, EngineInfo, EngineItem
from rewardserve.errors import InvalidRequest, LoadFailed
from rewardserve.evaluation import calibration_file
from rewardserve.evaluation.calibration_file import (
    BESIDE,
    Affine,
    BadCalibration,
    Calibration,
    Isotonic,
    Origin,
    Temperature,
    log_odds,
)
from rewardserve.postprocess.reduce import reduce_steps
from rewardserve.types import FINISHED, ItemCode, ItemFailure, ScoreKind, ScoreRequest, StepReduction

log = logging.getLogger(__name__)

MAX_SCORE = 3.4028234663852886e38  # of fp32, in which scores are answered; what is beyond would be infinite there


@dataclass(frozen=True, slots=True)
class Finishing:
    """How the scores of one model, or of an ensemble, are finished, as configured."""

    calibration: Calibration | None = None
    origin: Origin | None = None  # of the calibration
    length_penalty: float = 0.0  # taken off for each token of the response
    weights: Mapping[str, float] = field(default_factory=dict)  # of attributes, instead of the model's own score
    looks_beside: bool = False  # for a calibration in the checkpoint's folder, where none is given for the version

    def version_of(self, version: str) -> str:
        """What scores of that version, finished like this, are of: equal versions give equal scores."""
        changing = None if isinstance(self.calibration, Isotonic) else self.calibration
        told = (changing, self.length_penalty, sorted(self.weights.items()))
        if told == (None, 0.0, []):
            return version
        return version + FINISHED + hashlib.blake2b(repr(told).encode(), digest_size=4).hexdigest()

    @property
    def curve(self) -> Callable[[float], float] | None:
        """From a margin to the probability that the first is preferred, where a curve was fitted."""
        return self.calibration.probability if isinstance(self.calibration, Isotonic) else None

    @property
    def is_changing(self) -> bool:
        """Whether `finished` changes a score."""
        return isinstance(self.calibration, Temperature | Affine) or bool(self.length_penalty)

    def finished(self, score: float, is_probability: bool, num_response_tokens: int) -> float:
        """Calibrated, less the penalty. Of a probability it is the log-odds that are changed, where anything is."""
        if not self.is_changing:
            return score
        score = log_odds(score) if is_probability else score
        match self.calibration:
            case Temperature(temperature):
                score /= temperature
            case Affine() as affine:
                score = affine.score(score)
        return score - self.length_penalty * num_response_tokens

    def check(self, name: str, info: EngineInfo, source: str = "") -> "Finishing":
        """What of it is for this version, loaded from `source`.

        Raises LoadFailed for attributes that the model does not have, and for a file beside it that is no calibration.
        """
        if unknown := sorted(set(self.weights) - set(info.attributes)):
            known = ", ".join(info.attributes) or "none"
            raise LoadFailed(f"--attribute-weights of '{name}': no attribute {', '.join(unknown)}; it has {known}")
        found = None if self._is_of([info.version]) else self.beside(source)
        if found is not None:
            return replace(self, calibration=found[0], origin=found[1]).of(name, info.version)
        return self.of(name, info.version)

    def beside(self, source: str) -> tuple[Calibration, Origin] | None:
        """What lies beside a checkpoint, if it is looked for: it is of the model's own score, not of other weights.

        Raises LoadFailed for a file that is no calibration.
        """
        path = Path(source) / BESIDE
        is_there = self.looks_beside and not self.weights and os.path.isfile(path)  # False for what is no path, too
        return read_calibration(path) if is_there else None

    def of(self, name: str, version: str, alike: Sequence[str] = ()) -> "Finishing":
        """Without a calibration that was fitted to another version, none of those `alike` either."""
        if self.origin is None or self._is_of([version, *alike]):
            return self
        log.warning(
            "%s is served uncalibrated: the calibration was fitted to version %s, and this is %s",
            *(name, self.origin.version, version),
        )
        return replace(self, calibration=None, origin=None)

    def _is_of(self, versions: Sequence[str]) -> bool:
        """How an adapter is applied changes the rounding of scores, and no curve that was fitted to them."""
        told = None if self.origin is None else self.origin.version.removesuffix(ADAPTED)
        return any(version.removesuffix(ADAPTED) == told for version in versions)


def applied(version: str, adapted: str = "") -> str:
    """As if its adapter, if it has one, were applied in the way that `adapted` says: as ADAPTED does, or not so."""
    loaded, finished, how = version.partition(FINISHED)
    return loaded.removesuffix(ADAPTED) + adapted + finished + how


def read_calibration(path: Path) -> tuple[Calibration, Origin]:
    """Raises LoadFailed naming the file, and the field that is wrong."""
    try:
        return calibration_file.read(path)
    except OSError as error:
        raise LoadFailed(f"{path}: {error.strerror}; rewardserve eval --fit-calibration writes such a file") from error
    except BadCalibration as error:
        raise LoadFailed(str(error)) from error


class Finish:
    """One request's way from raw scores to final ones."""

    def __init__(self, info: EngineInfo, finishing: Finishing, reduction: StepReduction) -> None:
        self.info = info
        self._finishing = finishing
        self._reduction = reduction
        self._weights = [finishing.weights.get(name, 0.0) for name in info.attributes] if finishing.weights else []
        self._is_normalized = (info.shift, info.scale) != (0.0, 1.0) and not self._weights
        self._is_probability = info.is_probability and not self._is_normalized and not self._weights
        self._is_changed = self._is_normalized or finishing.is_changing or bool(self._weights)

    @property
    def version(self) -> str:
        return self._finishing.version_of(self.info.version)

    @property
    def kind(self) -> ScoreKind:
        """What the final scores mean."""
        if self._is_changed:
            return ScoreKind.NORMALIZED
        if self.info.judge is not None and self.info.judge.verdict is not None:
            return ScoreKind.RATING
        return ScoreKind.PROBABILITY if self.info.is_probability else ScoreKind.RAW_LOGIT

    @property
    def curve(self) -> Callable[[float], float] | None:
        """As in `Finishing`."""
        return self._finishing.curve

    def __call__(self, item: EngineItem, num_response_tokens: int) -> tuple[float, float]:
        """(raw, final) of an item that has a score."""
        assert item.score is not None
        raw = reduce_steps(item.steps, self._reduction) if item.steps else item.score
        if not self._is_changed:
            return raw, raw
        score = raw
        if self._weights:
            score = math.fsum(weight * value for weight, value in zip(self._weights, item.attributes, strict=True))
        if self._is_normalized:
            score = (score - self.info.shift) / self.info.scale
        return raw, self._finishing.finished(score, self._is_probability, num_response_tokens)

    def std(self, item: EngineItem) -> float | None:
        """The model's own uncertainty of the final score, in its units; None where it has none, or of another sum."""
        if item.std is None or self._weights or (self._is_probability and self._finishing.is_changing):
            return None
        std = item.std / self.info.scale if self._is_normalized else item.std
        match self._finishing.calibration:
            case Temperature(temperature):
                return std / temperature
            case Affine(scale=scale):
                return std * scale
        return std


def not_finite(score: float) -> ItemFailure | None:
    """Why a final score cannot be answered; None for one that is a number in fp32."""
    if abs(score) <= MAX_SCORE:
        return None
    message = f"the final score is {score:g}, which is no finite number in fp32"
    return ItemFailure(ItemCode.INTERNAL, message, is_of_the_score=True)


def check_steps(request: ScoreRequest, info: EngineInfo) -> None:
    """Raises InvalidRequest where steps are asked of a model that cannot be read at their ends, and for a product of
    steps that are no probabilities."""
    if not request.by_step and info.steps is None:
        return
    if reason := _why_no_steps(info):
        raise InvalidRequest("options.granularity", f"{info.architecture} {reason}; it has no step scores")
    if request.step_reduction is StepReduction.PRODUCT and not info.is_probability:  # (-5) x (-5) is more than 2 x 1
        raise InvalidRequest(
            "options.step_reduction",
            f"{request.step_reduction} (PRODUCT) is of probabilities, and what {info.architecture} gives for a step is "
            "none; use MIN, MEAN or LAST",
        )


def _why_no_steps(info: EngineInfo) -> str | None:
    if info.steps is not None:
        return None
    if info.judge is not None:
        return "is a judge, which is read where its answer would begin"
    if info.appended is not None:
        return f"is read at token {info.appended}, which ends a response and no step"
    if info.attributes or not info.reads_single_states:
        return "reads more than a response's last token, or another"
    return None
