"""What passing traffic says of the policy that makes it: signs of reward hacking. Observes, alters nothing.

Sums, of which Prometheus makes slopes and correlations over any window (docs/alerts.yml): within a group, so that what
is the prompt's, and not the response's, counts for nothing.
"""

import math
from collections.abc import Sequence

from rewardserve.metrics import ModelMetrics
from rewardserve.types import ItemScore, ScoreResult


def observe_traffic(metrics: ModelMetrics, result: ScoreResult) -> None:
    """Feeds the series of lengths, spreads, and how scores go with lengths."""
    items = [item for group in result.groups for item in group.items if item.score is not None]
    metrics.response_tokens.observe_all([item.num_response_tokens for item in items])
    metrics.score_std.observe_all([item.std for item in items if item.std is not None and math.isfinite(item.std)])
    if truncated := sum([item.truncated for item in items]):
        metrics.truncated.inc(truncated)
    score_squares = length_squares = products = 0.0
    for group in result.groups:
        scored = [item for item in group.items if item.score is not None]
        if len(scored) < 2:
            continue
        of_scores, of_lengths, of_both = _deviations(scored)
        metrics.group_std.observe(math.sqrt(of_scores / len(scored)))
        score_squares += of_scores
        length_squares += of_lengths
        products += of_both
    metrics.score_squares.inc(score_squares)
    metrics.length_squares.inc(length_squares)
    metrics.products.inc(products)


def _deviations(items: Sequence[ItemScore]) -> tuple[float, float, float]:
    """Sums over the items: squared deviations of scores and of lengths from their means, and both's products."""
    scores = [item.score for item in items if item.score is not None]
    lengths = [item.num_response_tokens for item in items]
    # Of equal scores there is no spread at all, whatever their mean is rounded to.
    mean = scores[0] if scores.count(scores[0]) == len(scores) else sum(scores) / len(scores)
    mean_length = sum(lengths) / len(lengths)
    of_scores, of_lengths = [score - mean for score in scores], [length - mean_length for length in lengths]
    return (
        sum([x * x for x in of_scores]),
        sum([y * y for y in of_lengths]),
        sum([x * y for x, y in zip(of_scores, of_lengths, strict=True)]),
    )
