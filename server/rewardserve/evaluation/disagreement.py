"""Whether an ensemble's members disagree where it errs, so that their disagreement can be acted upon."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.special import expit

from rewardserve.evaluation.data import Floats, Pairs
from rewardserve.evaluation.intervals import Share, share

ALIKE_PARTS = 20  # of the pairs, by margin
KEPT = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True, slots=True)
class Kept:
    """Accuracy on the pairs about which the members agree best."""

    share_of_pairs: float
    accuracy: Share


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Chances that a wrong pair has the larger signal than a right one; 0.5 is none.

    Members differ most in score where margins are large, and so right: the bare std of their margins may say nothing.
    What they differ about is which response is preferred, as in Christiano et al. (2017, arXiv:1706.03741, section
    2.2.4) and Gleave and Irving (2022, arXiv:2203.07472).
    """

    auroc: float  # of the std of the members' margins over the margin: how far they differ for what they decide
    auroc_of_preferences: float  # of the std of the members' probabilities that the first response is preferred
    auroc_of_std: float  # of the std of their margins alone
    auroc_beyond_margin: float | None  # of the std, among pairs of about the same margin: what it tells besides
    auroc_of_small_margin: float  # of -|margin|, which a single model has too
    curve: tuple[Kept, ...]


def disagreement(pairs: Pairs) -> Disagreement | None:
    """None where responses have no std, or where not both right and wrong pairs are there. Ties are left out."""
    if pairs.members is None:
        return None
    decided = pairs.margin != 0
    margin, members, prompt = pairs.margin[decided], pairs.members[decided], pairs.prompt[decided]
    std, of_preferences = members.std(1), expit(members).std(1)
    wrong, relative = margin < 0, std / np.abs(margin)
    signals = (relative, of_preferences, std, -np.abs(margin))
    found, preferences, bare, without = (auroc(signal, wrong) for signal in signals)
    if found is None or preferences is None or bare is None or without is None:
        return None
    agreed = np.argsort(relative, kind="stable")
    curve = []
    for part in KEPT:
        kept = agreed[: max(1, round(part * len(agreed)))]
        accuracy = share(margin[kept], prompt[kept])
        assert accuracy is not None
        curve.append(Kept(part, accuracy))
    beyond = _auroc_among_alike(std, wrong, np.abs(margin))
    return Disagreement(found, preferences, bare, beyond, without, tuple(curve))


def _auroc_among_alike(signal: Floats, wrong: NDArray[np.bool_], size: Floats) -> float | None:
    """As `auroc`, of the comparisons within parts of as many pairs each, by size; None where there is none."""
    better = comparisons = 0.0
    for part in np.array_split(np.argsort(size, kind="stable"), ALIKE_PARTS):
        among = wrong[part]
        found, count = auroc(signal[part], among), int(among.sum()) * int((~among).sum())
        if found is not None:
            better, comparisons = better + found * count, comparisons + count
    return better / comparisons if comparisons else None


def auroc(signal: Floats, wrong: NDArray[np.bool_]) -> float | None:
    """Chance that a wrong pair has the larger signal than a right one, ties one half: Mann and Whitney's U (1947) over
    the number of such comparisons. None where all are right, or all wrong."""
    num_wrong, num_right = int(wrong.sum()), int((~wrong).sum())
    if not num_wrong or not num_right:
        return None
    ranks = stats.rankdata(signal)
    u = ranks[wrong].sum() - num_wrong * (num_wrong + 1) / 2
    return float(u / (num_wrong * num_right))
