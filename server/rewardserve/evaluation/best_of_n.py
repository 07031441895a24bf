"""What is gained when n responses are drawn and the one with the best score is kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from rewardserve.evaluation.agreement import varies
from rewardserve.evaluation.data import Floats, ScoredPrompt, number_prompts
from rewardserve.evaluation.intervals import Estimate, ends, means_per_prompt, resamples

MAX_N = 64


@dataclass(frozen=True, slots=True)
class BestOf:
    """Mean ratings over prompts, of the one of `n` responses that each way would keep."""

    n: int
    rating: float  # the best scored
    random: float  # any of them
    oracle: float  # the best rated
    gain: Estimate  # rating less random


@dataclass(frozen=True, slots=True)
class BestOfN:
    curve: tuple[BestOf, ...]  # n = 1, 2, ...
    num_prompts: int
    share_of_oracle: Estimate | None  # of what is to be gained at the largest n; None where there is nothing to gain


def best_of_n(prompts: Sequence[ScoredPrompt], seed: int) -> BestOfN | None:
    """Of the rated prompts with enough responses: as many as at least half of those with two have, and at most 64.

    So each n is of the same prompts. None if no prompt has two rated responses.
    """
    rated = [prompt for prompt in prompts if prompt.is_rated and len(prompt.responses) > 1]
    if not rated:
        return None
    sizes = sorted((len(prompt.responses) for prompt in rated), reverse=True)
    largest = min(sizes[(len(sizes) - 1) // 2], MAX_N)
    rated = [prompt for prompt in rated if len(prompt.responses) >= largest]
    numbers = number_prompts(rated)
    by_score = np.array([expected_best(each.scores, each.ratings, largest) for each in rated])
    by_rating = np.array([expected_best(each.ratings, each.ratings, largest) for each in rated])
    random = np.array([each.ratings.mean() for each in rated])
    by_score, by_rating, random = (means_per_prompt(figure, numbers) for figure in (by_score, by_rating, random))
    gains = by_score - random[:, None]
    differ = means_per_prompt(np.array([varies(each.ratings) for each in rated], dtype=float), numbers) > 0
    to_gain = np.where(differ, by_rating[:, -1] - random, 0.0)  # where they do not, a difference is one of rounding
    curve = tuple(
        BestOf(n + 1, float(by_score[:, n].mean()), float(random.mean()), float(by_rating[:, n].mean()), gain)
        for n, gain in enumerate(_estimates(gains, seed))
    )
    return BestOfN(curve, len(gains), _share(gains[:, -1], to_gain, seed))


def expected_best(scores: Floats, ratings: Floats, largest: int) -> Floats:
    """Expected rating of the best scored of n responses drawn without replacement, for n = 1 .. largest: [largest].

    Exact: of N responses in ascending order of score the i-th is the best of n drawn in C(i - 1, n - 1) of C(N, n)
    cases. Responses of equal score are as likely kept as each other, so each counts with their mean rating.
    """
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    fair = (np.bincount(places, ratings) / counts)[places]
    ascending = fair[np.argsort(scores, kind="stable")]
    total = len(scores)
    i, n = np.arange(1, total + 1)[None, :], np.arange(1, largest + 1)[:, None]
    ways = np.exp(_log_choose(i - 1, n - 1) - _log_choose(total, n))  # [largest, total]; 0 where i < n
    return ways @ ascending / ways.sum(axis=1)


def _log_choose(a: np.ndarray | int, b: np.ndarray) -> Floats:
    """-inf where there is no way."""
    a, b = np.broadcast_arrays(np.asarray(a, dtype=float), np.asarray(b, dtype=float))
    possible = b <= a
    a, left = np.where(possible, a, 0.0), np.where(possible, a - b, 0.0)
    return np.where(possible, gammaln(a + 1) - gammaln(np.where(possible, b, 0.0) + 1) - gammaln(left + 1), -np.inf)


def _estimates(gains: Floats, seed: int) -> list[Estimate]:
    """The mean of each column of [num_prompts, largest]."""
    num_prompts, values = len(gains), gains.mean(axis=0)
    if num_prompts == 1:
        return [Estimate(float(value), None, None, 1) for value in values]
    low, high = ends(np.array([counts @ gains / num_prompts for counts in resamples(num_prompts, seed)]))
    return [Estimate(*map(float, each), num_prompts) for each in zip(values, low, high, strict=True)]


def _share(gains: Floats, to_gain: Floats, seed: int) -> Estimate | None:
    """Of the sums of both [num_prompts]."""
    if to_gain.sum() <= 0:
        return None
    value = float(gains.sum() / to_gain.sum())
    if len(gains) == 1:
        return Estimate(value, None, None, 1)
    drawn = [(counts @ gains, counts @ to_gain) for counts in resamples(len(gains), seed)]
    low, high = ends(np.array([gained / most if most > 0 else np.nan for gained, most in drawn]))
    return Estimate(value, float(low), float(high), len(gains))
