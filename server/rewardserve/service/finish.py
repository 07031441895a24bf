"""What the engine gave for a response -> the score that is answered."""

from rewardserve.engine.base import EngineInfo, EngineItem
from rewardserve.errors import InvalidRequest
from rewardserve.postprocess.reduce import reduce_steps
from rewardserve.types import ScoreKind, ScoreRequest, StepReduction


class Finish:
    """One request's way from raw scores to final ones."""

    def __init__(self, info: EngineInfo, reduction: StepReduction) -> None:
        self.info = info
        self._reduction = reduction
        self._is_normalized = (info.shift, info.scale) != (0.0, 1.0)

    @property
    def kind(self) -> ScoreKind:
        """What the final scores mean."""
        if self._is_normalized:
            return ScoreKind.NORMALIZED
        return ScoreKind.PROBABILITY if self.info.is_probability else ScoreKind.RAW_LOGIT

    def __call__(self, item: EngineItem) -> tuple[float, float]:
        """(raw, final) of an item that has a score."""
        assert item.score is not None
        raw = reduce_steps(item.steps, self._reduction) if item.steps else item.score
        return raw, (raw - self.info.shift) / self.info.scale if self._is_normalized else raw


def check_steps(request: ScoreRequest, info: EngineInfo) -> None:
    """Raises InvalidRequest where steps are asked of a model that cannot be read at their ends."""
    if request.by_step and info.steps is None and not info.reads_single_states:
        raise InvalidRequest(
            "options.granularity", f"{info.architecture} reads more than a response's last token; it has no step scores"
        )
