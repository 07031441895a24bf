"""What passing traffic says of the policy that makes it: signs of reward hacking. Observes, alters nothing.

Sums, of which Prometheus makes slopes and correlations over any window (docs/alerts.yml): within a group, so that what
is the prompt's, and not the response's, counts for nothing.
"""

import math
from collections.abc import Sequence

from rewardserve.metrics import ModelMetrics
from rewardserve.types import ScoreResult


def observe_traffic(metrics: ModelMetrics, result: ScoreResult) -> None:
    """Feeds the series of lengths, spreads, and how scores go with lengths."""
    items = [item for group in result.groups for item in group.items if item.score is not None]
    metrics.response_tokens.observe_all([item.num_response_tokens for item in items])
    metrics.score_std.observe_all([item.std for item in items if item.std is not None and math.isfinite(item.std)])
    if truncated := sum([item.truncated for item in items]):
        metrics.truncated.inc(truncated)
    score_squares = length_squares = products = 0.0
    spreads = []
    for group in result.groups:
        scores = [item.score for item in group.items if item.score is not None]
        if len(scores) < 2:
            continue
        lengths = [item.num_response_tokens for item in group.items if item.score is not None]
        of_scores, of_lengths, of_both = _deviations(scores, lengths)
        spreads.append(math.sqrt(of_scores / len(scores)))
        score_squares += of_scores
        length_squares += of_lengths
        products += of_both
    metrics.group_std.observe_all(spreads)
    metrics.score_squares.inc(score_squares)
    metrics.length_squares.inc(length_squares)
    metrics.products.inc(products)


def _deviations(scores: Sequence[float], lengths: Sequence[int]) -> tuple[float, float, float]:
    """Sums of squared deviations of scores and of lengths from their means, and of both's products.

    In one loop: the event loop waits for it, and of groups of a few a list for each sum took half as long again.
    """
    # Of equal scores there is no spread at all, whatever their mean is rounded to.
    mean = scores[0] if scores.count(scores[0]) == len(scores) else sum(scores) / len(scores)
    mean_length = sum(lengths) / len(lengths)
    of_scores = of_lengths = of_both = 0.0
    for score, length in zip(scores, lengths, strict=True):
        of_score, of_length = score - mean, length - mean_length
        of_scores += of_score * of_score
        of_lengths += of_length * of_length
        of_both += of_score * of_length
    return of_scores, of_lengths, of_both
