"""Scored prompts made of plain numbers."""

from collections.abc import Sequence

import numpy as np
from rewardserve.evaluation.data import Pairs, Scored, ScoredPrompt, pairs_of
from rewardserve.evaluation.report import About

ABOUT = About("2026-01-01", "0.1", "rm", "v1", "in.jsonl", "00", 0.0, "error", 0, (), 1, 2, 0, 0)


def rated(
    scores: Sequence[float],
    ratings: Sequence[float],
    prompt: str = "p",
    domain: str = "all",
    lengths: Sequence[int] | None = None,
    members: Sequence[tuple[float, ...]] | None = None,
) -> ScoredPrompt:
    lengths = lengths if lengths is not None else [10] * len(scores)
    found = members if members is not None else [None] * len(scores)
    items = [
        Scored(float(score), length, length // 4, float(rating), of_members)
        for score, rating, length, of_members in zip(scores, ratings, lengths, found, strict=True)
    ]
    return ScoredPrompt(prompt, domain, tuple(items))


def pair(
    margin: float, prompt: str = "p", domain: str = "all", lengths: tuple[int, int] = (10, 10), gap: float | None = None
) -> ScoredPrompt:
    responses = Scored(float(margin), lengths[0], 2), Scored(0.0, lengths[1], 2)
    return ScoredPrompt(prompt, domain, responses, gap)


def pairs(margins: Sequence[float], num_prompts: int | None = None) -> Pairs:
    """Of as many prompts as there are margins, or of `num_prompts` in turn."""
    of = len(margins) if num_prompts is None else num_prompts
    return pairs_of([pair(margin, str(index % of)) for index, margin in enumerate(margins)])


def bradley_terry(num: int, temperature: float, seed: int = 0) -> np.ndarray:
    """Margins of preferred over other responses, [num], of a model whose scores are `temperature` times log-odds."""
    rng = np.random.default_rng(seed)
    log_odds = rng.normal(0, 2, num)
    first_is_preferred = rng.random(num) < 1 / (1 + np.exp(-log_odds))
    return temperature * np.where(first_is_preferred, log_odds, -log_odds)
