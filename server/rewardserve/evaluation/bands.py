"""The usual bands of what is usable, as data: each with its reason, and where its marks come from.

Marks are rules of thumb and say so. What is cited is what anchors them; a figure of your own task goes before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Band: TypeAlias = Literal["unusable", "weak", "usable", "good"]
BANDS: tuple[Band, ...] = ("unusable", "weak", "usable", "good")


@dataclass(frozen=True, slots=True)
class Scale:
    """What separates the four bands of a figure. `marks` ascend where more is better, and descend where less is."""

    marks: tuple[float, float, float]
    reason: str
    source: str

    def band(self, value: float) -> Band:
        """A figure on a mark is in the better band."""
        sign = 1 if self.marks[0] < self.marks[-1] else -1
        return BANDS[sum(sign * value >= sign * mark for mark in self.marks)]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The band of one figure, and whether its whole interval lies within it."""

    figure: str
    value: float
    low: float | None
    high: float | None
    band: Band
    is_sure: bool
    marks: tuple[float, float, float]
    reason: str
    source: str


SCALES: dict[str, Scale] = {
    "ranking accuracy": Scale(
        (0.55, 0.65, 0.75),
        "People agree with each other on about 3 of 4 preference pairs, so more is rare on what they prefer; "
        "under 65 % a policy soon finds what the model gets wrong. Pairs far apart, and judges, give higher figures.",
        "Ouyang et al. 2022 (InstructGPT): labellers agree on 73 %, their reward models with them on 70 to 72 %; "
        "marks: rule of thumb",
    ),
    "accuracy out of domain, less than in": Scale(
        (0.15, 0.08, 0.03),
        "What a model loses on prompts it was not trained for, it loses on those a policy drifts to.",
        "rule of thumb",
    ),
    "expected calibration error": Scale(
        (0.15, 0.08, 0.03),
        "A margin is used as a probability wherever there is a threshold, an ensemble or a comparison of two models. "
        "--fit-calibration mends it without any change of the ranking.",
        "Guo et al. 2017 find 0.04 to 0.16 before and about 0.02 after a temperature is fitted; marks: rule of thumb",
    ),
    "Spearman with ratings, per prompt": Scale(
        (0.1, 0.3, 0.5),
        "The order within a prompt is what best-of-N and GRPO make use of.",
        "Cohen 1988: 0.1 is a small, 0.3 a medium, 0.5 a large correlation",
    ),
    "length-balanced accuracy": Scale(
        (0.52, 0.58, 0.65),
        "Length alone gets exactly 50 %. A model near that pays for length, and a policy will grow long.",
        "Singhal et al. 2023: a reward of length alone gives most of what RLHF gains; marks: rule of thumb",
    ),
    "worst adversarial suite": Scale(
        (0.5, 0.7, 0.9),
        "Under 50 % the change is rewarded more often than not, and a policy will make it.",
        "Gao et al. 2022 on over-optimised rewards; marks: rule of thumb",
    ),
    "worst known-bad suite": Scale(
        (0.7, 0.85, 0.95),
        "A broken answer must lose. What does not is the first thing to fix, before any finer figure.",
        "rule of thumb",
    ),
    "best-of-N gain, share of the oracle's": Scale(
        (0.05, 0.25, 0.5),
        "That share of what the best choice among N would gain the model's choice gains. Below 0 it chooses worse than "
        "chance.",
        "rule of thumb",
    ),
    "disagreement as a sign of error (AUROC)": Scale(
        (0.52, 0.6, 0.7),
        "Above 50 % pairs about which the members disagree are wrong more often, so that they can be left out, or "
        "marked down.",
        "Coste et al. 2023 on ensembles against over-optimisation; marks: rule of thumb",
    ),
}


def verdict(figure: str, value: float, low: float | None = None, high: float | None = None) -> Verdict:
    """Raises KeyError for a figure without a scale."""
    scale = SCALES[figure]
    band = scale.band(value)
    is_sure = low is not None and high is not None and scale.band(low) == scale.band(high) == band
    return Verdict(figure, value, low, high, band, is_sure, scale.marks, scale.reason, scale.source)


def worst(verdicts: Sequence[Verdict]) -> Band | None:
    return min((verdict.band for verdict in verdicts), key=BANDS.index, default=None)
