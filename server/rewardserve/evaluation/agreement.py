"""Whether scores order responses as the people, or the judge, who rated them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from rewardserve.evaluation.data import Floats, ScoredPrompt, number_prompts
from rewardserve.evaluation.intervals import Estimate, mean, means_per_prompt


@dataclass(frozen=True, slots=True)
class Agreement:
    """Rank correlations, from -1 to 1. Those of a prompt are what a ranking or GRPO makes use of.

    Across prompts a score has a meaning only if the model was trained for it: Bradley-Terry fixes differences within
    one.
    """

    spearman: Estimate  # mean over prompts
    kendall: Estimate  # mean over prompts, of tau-b, which allows for ties
    spearman_across_prompts: float  # of all responses together
    kendall_across_prompts: float
    num_responses: int


def agreement(prompts: Sequence[ScoredPrompt], seed: int) -> Agreement | None:
    """Of rated prompts whose ratings are not all the same; None if there is none. Equal scores correlate by 0."""
    rated = [prompt for prompt in prompts if prompt.is_rated and varies(prompt.ratings)]
    if not rated:
        return None
    of_rows = [(spearman(each.scores, each.ratings), _kendall(each.scores, each.ratings)) for each in rated]
    spearmans, kendalls = means_per_prompt(np.array(of_rows), number_prompts(rated)).T
    scores, ratings = (np.concatenate([getattr(each, name) for each in rated]) for name in ("scores", "ratings"))
    found = mean(spearmans, seed), mean(kendalls, seed)
    assert found[0] is not None and found[1] is not None
    return Agreement(*found, spearman(scores, ratings), _kendall(scores, ratings), len(scores))


def varies(values: Floats) -> bool:
    return len(values) > 1 and bool(np.any(values != values[0]))


def spearman(a: Floats, b: Floats) -> float:
    """Pearson's correlation of the ranks, ties sharing theirs (Spearman, 1904); 0 where one of them never changes."""
    if not varies(a) or not varies(b):
        return 0.0
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def _kendall(a: Floats, b: Floats) -> float:
    if not varies(a) or not varies(b):
        return 0.0
    return float(stats.kendalltau(a, b, variant="b").statistic)
