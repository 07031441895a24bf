"""How sure a figure is. Pairs of one prompt are not independent, so prompts are what is counted and drawn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rewardserve.evaluation.data import Floats

CONFIDENCE = 0.95
NUM_RESAMPLES = 1000  # the ends of an interval then move by a few hundredths of its width from seed to seed


@dataclass(frozen=True, slots=True)
class Share:
    """How often the preferred response has the higher score; a tie counts one half."""

    value: float
    low: float
    high: float
    num_pairs: int
    num_prompts: int
    num_ties: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its interval; None for the interval of a single prompt, which tells nothing of others."""

    value: float
    low: float | None
    high: float | None
    num_prompts: int


def wins(margins: Floats) -> Floats:
    """1 where the preferred response has the higher score, 0 where it has the lower, one half for a tie."""
    return (1.0 + np.sign(margins)) / 2.0


def share(margins: Floats, prompts: NDArray[np.int64]) -> Share | None:
    """Of the pairs with these margins [num_pairs], which belong to `prompts` [num_pairs]; None if there is none.

    Wilson's interval (1927) of the effective number of pairs: Kish's design effect (Survey Sampling, 1965) says how
    many independent pairs would be as good, with the jackknife's variance between prompts of a ratio (Tukey, 1958);
    Student's t of so many prompts stands for the normal quantile (Korn and Graubard, 1998). Unlike a bootstrap it has a
    width where all pairs are won.
    """
    if not len(margins):
        return None
    won, counts = per_prompt(wins(margins), prompts)
    value = float(won.sum() / counts.sum())
    low, high = _wilson(value, _effective_number(won, counts), len(counts))
    return Share(value, low, high, len(margins), len(counts), int(np.count_nonzero(margins == 0)))


def per_prompt(values: Floats, prompts: Sequence[int] | NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Of values [num_rows, ...] the sums [num_prompts, ...] over the rows of each prompt, and how many these are."""
    _, places = np.unique(prompts, return_inverse=True)
    counts = np.bincount(places).astype(float)
    sums = np.zeros((len(counts), *values.shape[1:]))
    np.add.at(sums, places, values)
    return sums, counts


def means_per_prompt(values: Floats, prompts: Sequence[int]) -> Floats:
    """[num_prompts, ...] of [num_rows, ...]: a prompt may have several rows."""
    sums, counts = per_prompt(values, prompts)
    return (sums.T / counts).T


def _effective_number(won: Floats, counts: Floats) -> float:
    """Never above the number of pairs, nor below 1."""
    num_pairs, num_prompts = counts.sum(), len(counts)
    value = won.sum() / num_pairs
    if value in (0.0, 1.0):
        return float(num_prompts)  # there is no variance to see: as if pairs of one prompt were one
    if num_prompts == 1:
        return 1.0
    # A prompt is held against the others: one that has most of the pairs is never far from the mean of all.
    left_out = (won - value * counts) / (num_pairs - counts)
    variance = (num_prompts - 1) / num_prompts * (left_out**2).sum()
    return float(np.clip(value * (1 - value) / max(variance, 1e-12), 1.0, num_pairs))


def _wilson(value: float, number: float, num_prompts: int) -> tuple[float, float]:
    if num_prompts == 1:
        return 0.0, 1.0
    z = stats.t.ppf((1 + CONFIDENCE) / 2, num_prompts - 1)
    centre = (value + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * (value * (1 - value) / number + z**2 / (4 * number**2)) ** 0.5
    return min(max(0.0, float(centre - half)), value), max(min(1.0, float(centre + half)), value)


def difference(a: Share, b: Share) -> Estimate:
    """a - b, of different prompts: Newcombe's hybrid score interval (1998, method 10)."""
    value = a.value - b.value
    below = ((a.value - a.low) ** 2 + (b.high - b.value) ** 2) ** 0.5
    above = ((a.high - a.value) ** 2 + (b.value - b.low) ** 2) ** 0.5
    return Estimate(value, value - below, value + above, a.num_prompts + b.num_prompts)


def resamples(num_prompts: int, seed: int) -> Iterator[Floats]:
    """How often each prompt is drawn [num_prompts], in each bootstrap sample (Efron, 1979)."""
    rng = np.random.default_rng(seed)
    for _ in range(NUM_RESAMPLES):
        yield np.bincount(rng.integers(0, num_prompts, num_prompts), minlength=num_prompts).astype(float)


def ends(values: Floats) -> tuple[Floats, Floats]:
    """The percentile interval of bootstrap values [num_resamples, ...]; a value that is NaN is left out."""
    low, high = np.nanquantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high


def mean(values: Floats, seed: int) -> Estimate | None:
    """Of a figure that each prompt has [num_prompts], by the bootstrap over prompts; None if there is none."""
    if not len(values):
        return None
    if len(values) == 1:
        return Estimate(float(values[0]), None, None, 1)
    low, high = ends(np.array([counts @ values / len(values) for counts in resamples(len(values), seed)]))
    return Estimate(float(values.mean()), float(low), float(high), len(values))
