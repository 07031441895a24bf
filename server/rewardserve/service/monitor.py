"""What passing traffic says of the policy that makes it: signs of reward hacking, and drift. Observes, alters nothing.

Sums, of which Prometheus makes slopes and correlations over any window (docs/alerts.yml): within a group, so that what
is the prompt's, and not the response's, counts for nothing.
"""

import json
import logging
import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewardserve.engine.base import ADAPTED
from rewardserve.errors import LoadFailed
from rewardserve.metrics import ModelMetrics
from rewardserve.types import FINISHED, ItemScore, ScoreResult

log = logging.getLogger(__name__)

NUM_BINS = 10
MIN_REFERENCE = 200  # scores: twenty in each bin
WINDOW = 2_000  # scores that are compared with the reference: the last ones
MIN_SEEN = 200  # of them, for a drift to be told
HOW_TO_MAKE = "rewardserve score writes such a file"


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


@dataclass(frozen=True, slots=True)
class Reference:
    """How scores of one version are spread where all was well."""

    version: str
    edges: tuple[float, ...]  # between bins: about deciles, each midway between two scores that there were
    shares: tuple[float, ...]  # of the scores in each bin, of which there is one more


def read_reference(path: Path) -> Reference:
    """From the output of `rewardserve score`. Raises LoadFailed naming file, line and what is wrong."""
    scores: list[float] = []
    versions: set[str] = set()
    try:
        for row in _rows(path):
            versions.add(row["version"])
            scores += [float(score) for score in row["scores"] if score is not None]
    except OSError as error:
        raise LoadFailed(f"{path}: {error.strerror}; {HOW_TO_MAKE}") from error
    if len(versions) > 1:
        raise LoadFailed(f"{path}: holds scores of several versions, {', '.join(sorted(versions))}; give those of one")
    if len(scores) < MIN_REFERENCE:
        raise LoadFailed(f"{path}: holds {len(scores)} scores; a reference has at least {MIN_REFERENCE}")
    edges = _edges(scores)
    if not edges:
        raise LoadFailed(f"{path}: all {len(scores)} scores are the same, {scores[0]:g}; no drift could be told")
    counts = [0] * (len(edges) + 1)
    for score in scores:
        counts[bisect_left(edges, score)] += 1
    return Reference(versions.pop(), edges, _shares(counts))


def _edges(scores: Sequence[float]) -> tuple[float, ...]:
    """No score that comes back, in whatever precision, lies on one: many may be the same.

    Where a decile falls among equal scores the edge is on that side of them that is nearer.
    """
    ordered, total = sorted(scores), len(scores)
    found = set()
    for number in range(1, NUM_BINS):
        decile = number * total // NUM_BINS
        ends = bisect_left(ordered, ordered[decile - 1]), bisect_right(ordered, ordered[decile - 1])
        ranks = [rank for rank in ends if 0 < rank < total]
        if ranks:
            rank = min(ranks, key=lambda rank: abs(rank - decile))
            found.add((ordered[rank - 1] + ordered[rank]) / 2)
    return tuple(sorted(found))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                numbers = [score for score in row["scores"] if score is not None]
                are_scores = isinstance(row["scores"], list) and all(type(n) in (float, int) for n in numbers)
                if not are_scores or not all(map(math.isfinite, numbers)) or not isinstance(row["version"], str):
                    raise ValueError
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                raise LoadFailed(f"{path} line {number} is no row of scores; {HOW_TO_MAKE}") from None
            yield row


def _shares(counts: Sequence[int]) -> tuple[float, ...]:
    """Half a score is added to each bin, so that none is empty."""
    total = sum(counts) + 0.5 * len(counts)
    return tuple((count + 0.5) / total for count in counts)


class Drift:
    """How far the last scores of a model are from its reference: the population stability index over deciles.

    The sum of (p - q) ln(p / q) over the bins (Siddiqi, Credit Risk Scorecards, 2006): 0 for equal shares; by the usual
    bands below 0.1 is no change and above 0.25 a great one. Without any drift it is about 0.005, by chance.
    """

    def __init__(self, name: str, reference: Reference) -> None:
        self._name, self._reference = name, reference
        self._bins: deque[int] = deque()
        self._counts = [0] * len(reference.shares)
        self._others: set[str] = set()  # versions that were told of

    def observe(self, version: str, scores: Iterable[float]) -> None:
        """Scores of another version than the reference's say nothing of the traffic."""
        if _how_scored(version) != _how_scored(self._reference.version):
            self._forget(version)
            return
        for score in scores:
            number = bisect_left(self._reference.edges, score)
            self._bins.append(number)
            self._counts[number] += 1
            if len(self._bins) > WINDOW:
                self._counts[self._bins.popleft()] -= 1

    def value(self) -> float:
        """NaN until there are enough scores."""
        if len(self._bins) < MIN_SEEN:
            return math.nan
        pairs = zip(_shares(self._counts), self._reference.shares, strict=True)
        return sum((now - then) * math.log(now / then) for now, then in pairs)

    def _forget(self, version: str) -> None:
        self._bins.clear()
        self._counts = [0] * len(self._counts)
        if version not in self._others:
            log.warning(
                "%s: no drift is told: --drift-reference is of version %s, and this is %s",
                *(self._name, self._reference.version, version),
            )
        self._others.add(version)


def _how_scored(version: str) -> str:
    """Without what says how an adapter is applied: that changes roundings only."""
    loaded, finished, how = version.partition(FINISHED)
    return loaded.removesuffix(ADAPTED) + finished + how
