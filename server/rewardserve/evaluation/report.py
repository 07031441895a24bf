"""All findings of an evaluation as one tree of values, and as the JSON that is written of it."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rewardserve.evaluation import bands
from rewardserve.evaluation.agreement import Agreement, agreement
from rewardserve.evaluation.bands import Verdict, verdict
from rewardserve.evaluation.best_of_n import BestOfN, best_of_n
from rewardserve.evaluation.calibration import CalibrationFigures, calibration
from rewardserve.evaluation.data import ScoredPrompt, pairs_of
from rewardserve.evaluation.disagreement import Disagreement, disagreement
from rewardserve.evaluation.length import LengthBias, length_bias
from rewardserve.evaluation.ranking import Ranking, ranking
from rewardserve.evaluation.suites import Suite

FORMAT = "rewardserve.evaluation.v1"


class NothingToJudge(ValueError):
    """There is no pair; the message says what would make one."""


@dataclass(frozen=True, slots=True)
class About:
    """What the figures depend on."""

    date: str
    rewardserve: str
    model: str
    version: str
    input: str
    input_sha256: str  # of its lines, uncompressed
    min_gap: float
    overflow: str
    seed: int
    in_domain: tuple[str, ...]
    num_rows: int
    num_responses: int  # scored, those of the suites not counted
    num_failed: int  # without a score, those of the suites included
    num_truncated: int
    kind: str = "raw_logit"  # what a score means; probabilities are judged by their log-odds


@dataclass(frozen=True, slots=True)
class Report:
    """What None means for a part is said where the part is declared."""

    about: About
    ranking: Ranking
    calibration: CalibrationFigures
    agreement: Agreement | None
    length: LengthBias
    suites: tuple[Suite, ...]
    best_of_n: BestOfN | None
    disagreement: Disagreement | None
    verdicts: tuple[Verdict, ...]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: every number is finite."""
        values = {"format": FORMAT, **asdict(self)}
        assert all(map(math.isfinite, _numbers(values))), "a figure that is no number"
        return values


def build(
    about: About,
    prompts: Sequence[ScoredPrompt],
    suites: Sequence[Suite] = (),
    in_domain: Collection[str] = (),
) -> Report:
    """Raises NothingToJudge."""
    prompts = [prompt for prompt in prompts if prompt.responses]
    pairs = pairs_of(prompts, about.min_gap)
    if not len(pairs):
        raise NothingToJudge(
            "no two scored responses to a prompt are judged to differ by more than --min-gap; "
            "lower it, or give rows of several rated responses, or of chosen and rejected"
        )
    seed = about.seed
    parts = (
        ranking(pairs, in_domain),
        calibration(pairs, mean_score(prompts), seed),
        agreement(prompts, seed),
        length_bias(prompts, pairs, seed),
        tuple(suites),
        best_of_n(prompts, seed),
        disagreement(pairs),
    )
    return Report(about, *parts, tuple(_verdicts(*parts)))


def mean_score(prompts: Sequence[ScoredPrompt]) -> float:
    """Mean over prompts of the mean over their responses."""
    return float(np.mean([prompt.scores.mean() for prompt in prompts if prompt.responses]))


def _verdicts(
    ranked: Ranking,
    calibrated: CalibrationFigures,
    agreed: Agreement | None,
    length: LengthBias,
    suites: tuple[Suite, ...],
    best: BestOfN | None,
    disagreed: Disagreement | None,
) -> Iterator[Verdict]:
    """Of each figure that has a scale, in the order of `bands.SCALES`."""
    found: dict[str, tuple[float, float | None, float | None]] = {}

    def judge(figure: str, estimate: Any) -> None:
        if estimate is not None:
            found[figure] = (estimate.value, estimate.low, estimate.high)

    judge("ranking accuracy", ranked.accuracy)
    judge("accuracy out of domain, less than in", ranked.spillover and ranked.spillover.difference)
    judge("expected calibration error", calibrated.ece)
    judge("Spearman with ratings, per prompt", agreed and agreed.spearman)
    judge("length-balanced accuracy", length.balanced)
    for kind, figure in (("adversarial", "worst adversarial suite"), ("known_bad", "worst known-bad suite")):
        judge(figure, min((each.untouched_wins for each in suites if each.kind == kind), key=_value, default=None))
    judge("best-of-N gain, share of the oracle's", best and best.share_of_oracle)
    if disagreed is not None:
        found["disagreement as a sign of error (AUROC)"] = (disagreed.auroc_of_preferences, None, None)
    for figure in bands.SCALES:
        if figure in found:
            yield verdict(figure, *found[figure])


def _value(estimate: Any) -> float:
    return estimate.value


def _numbers(values: Any) -> Iterator[float]:
    match values:
        case dict():
            for value in values.values():
                yield from _numbers(value)
        case list() | tuple():
            for value in values:
                yield from _numbers(value)
        case float():
            yield values
