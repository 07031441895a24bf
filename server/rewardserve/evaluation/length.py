"""How much of a ranking is length: whether the model likes what is long, and what it can do beyond that."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rewardserve.evaluation.agreement import spearman, varies
from rewardserve.evaluation.data import Floats, Pairs, ScoredPrompt, number_prompts
from rewardserve.evaluation.intervals import (
    Estimate,
    Share,
    ends,
    mean,
    means_per_prompt,
    per_prompt,
    resamples,
    share,
    wins,
)

ALIKE = 0.1  # lengths that differ by at most this share of the longer one
NUM_STEPS = 8  # of the curve, each of as many responses


@dataclass(frozen=True, slots=True)
class ScoreAtLength:
    """Responses that are about equally long, compared with the others to their prompt."""

    doublings: float  # mean log2 of characters, less the mean over the prompt's responses
    score: float  # mean score, less the mean over the prompt's responses
    num_responses: int


@dataclass(frozen=True, slots=True)
class LengthBias:
    """Lengths are in characters unless tokens are named. A rank correlation is the mean of those within a prompt."""

    score_with_characters: Estimate | None
    score_with_tokens: Estimate | None
    rating_with_characters: Estimate | None  # of rated prompts: that much those who rated liked length themselves
    longer_is_better: Share  # accuracy of "the longer one is preferred"
    preferred_is_longer: Share | None  # accuracy of the model on such pairs
    preferred_is_shorter: Share | None
    alike: Share | None  # lengths within 10 % of each other
    balanced: Estimate | None  # mean of the two before: length alone would get exactly one half
    length_removed: Share  # accuracy of what is left of a score when its best guess from the length is taken away
    score_per_doubling: float  # that guess
    curve: tuple[ScoreAtLength, ...]


def length_bias(prompts: Sequence[ScoredPrompt], pairs: Pairs, seed: int) -> LengthBias:
    """Needs at least one pair."""
    ratio = (pairs.preferred_characters - pairs.other_characters) / np.maximum(
        np.maximum(pairs.preferred_characters, pairs.other_characters), 1
    )
    longer, shorter = ratio > ALIKE, ratio < -ALIKE
    doublings, scores = _within_prompts(prompts)
    slope = _slope(doublings, scores)
    by_length = share(ratio, pairs.prompt)
    left = share(pairs.margin - slope * _doublings_between(pairs), pairs.prompt)
    assert by_length is not None and left is not None, "no pair"
    return LengthBias(
        _mean(_correlations(prompts, "num_characters"), seed),
        _mean(_correlations(prompts, "num_tokens"), seed),
        _mean(_rating_correlations(prompts), seed),
        by_length,
        share(pairs.margin[longer], pairs.prompt[longer]),
        share(pairs.margin[shorter], pairs.prompt[shorter]),
        share(pairs.margin[~longer & ~shorter], pairs.prompt[~longer & ~shorter]),
        _balanced(pairs, longer, shorter, seed),
        left,
        slope,
        _curve(doublings, scores),
    )


def _mean(found: Iterable[tuple[ScoredPrompt, float]], seed: int) -> Estimate | None:
    """Over prompts, of what was found in each of their rows."""
    rows = list(found)
    if not rows:
        return None
    numbers = number_prompts([row for row, _ in rows])
    return mean(means_per_prompt(np.array([value for _, value in rows]), numbers), seed)


def _correlations(prompts: Sequence[ScoredPrompt], length: str) -> Iterator[tuple[ScoredPrompt, float]]:
    for prompt in prompts:
        lengths = np.array([getattr(response, length) for response in prompt.responses], dtype=float)
        if varies(lengths):
            yield prompt, spearman(prompt.scores, lengths)


def _rating_correlations(prompts: Sequence[ScoredPrompt]) -> Iterator[tuple[ScoredPrompt, float]]:
    for prompt in prompts:
        if prompt.is_rated and varies(prompt.ratings) and varies(lengths := _characters(prompt)):
            yield prompt, spearman(prompt.ratings, lengths)


def _characters(prompt: ScoredPrompt) -> Floats:
    return np.array([response.num_characters for response in prompt.responses], dtype=float)


def _doublings_between(pairs: Pairs) -> Floats:
    """log2 of how many times longer the preferred response is. One is added to a length, for it may be 0."""
    return np.log2((pairs.preferred_characters + 1) / (pairs.other_characters + 1))


def _within_prompts(prompts: Sequence[ScoredPrompt]) -> tuple[Floats, Floats]:
    """log2 lengths and scores of all responses [num_responses], each less the mean over its prompt's."""
    numbers = np.repeat(number_prompts(prompts), [len(prompt.responses) for prompt in prompts])
    doublings = np.concatenate([np.log2(_characters(prompt) + 1) for prompt in prompts])
    scores = np.concatenate([prompt.scores for prompt in prompts])
    return _centred(doublings, numbers), _centred(scores, numbers)


def _centred(values: Floats, prompts: NDArray[np.int64]) -> Floats:
    sums, counts = per_prompt(values, prompts)
    return values - (sums / counts)[np.unique(prompts, return_inverse=True)[1]]


def _slope(doublings: Floats, scores: Floats) -> float:
    """Of the least-squares line within prompts; 0 where all lengths are the same."""
    spread = float((doublings**2).sum())
    return float((doublings * scores).sum() / spread) if spread else 0.0


def _balanced(pairs: Pairs, longer: NDArray[np.bool_], shorter: NDArray[np.bool_], seed: int) -> Estimate | None:
    if not longer.any() or not shorter.any():
        return None
    known, places = np.unique(pairs.prompt, return_inverse=True)
    won = wins(pairs.margin)
    sums = np.array([np.bincount(places, values * won, minlength=len(known)) for values in (longer, shorter)])
    counts = np.array([np.bincount(places, values, minlength=len(known)) for values in (longer, shorter)])
    value = float((sums.sum(1) / counts.sum(1)).mean())
    if len(known) == 1:
        return Estimate(value, None, None, 1)
    with np.errstate(invalid="ignore"):  # a sample without any pair of one sort has no value, and is left out
        drawn = np.array([((sums @ times) / (counts @ times)).mean() for times in resamples(len(known), seed)])
    low, high = ends(drawn)
    return Estimate(value, float(low), float(high), len(known))


def _curve(doublings: Floats, scores: Floats) -> tuple[ScoreAtLength, ...]:
    parts = np.array_split(np.argsort(doublings, kind="stable"), min(NUM_STEPS, len(doublings)))
    return tuple(ScoreAtLength(float(doublings[part].mean()), float(scores[part].mean()), len(part)) for part in parts)
