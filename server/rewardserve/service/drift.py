"""How far a model's scores have come from what they were when all was well."""

import json
import logging
import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from rewardserve.errors import LoadFailed
from rewardserve.json_object import once_each
from rewardserve.service.finish import applied

log = logging.getLogger(__name__)

NUM_BINS = 10
MIN_REFERENCE = 200  # scores: twenty in each bin
WINDOW = 2_000  # scores that are compared with the reference: the last ones
MIN_SEEN = 200  # of them, for a drift to be told
HOW_TO_MAKE = "rewardserve score writes such a file"


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
        for version, numbers in _rows(path):
            versions.add(version)
            scores += numbers
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


def _rows(path: Path) -> Iterator[tuple[str, list[float]]]:
    """Version and scores of each row."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line, object_pairs_hook=once_each)
                version, scores = row["version"], row["scores"]
                if not isinstance(version, str) or not isinstance(scores, list):
                    raise ValueError
                yield version, [_finite(score) for score in scores if score is not None]
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                raise LoadFailed(f"{path} line {number} is no row of scores; {HOW_TO_MAKE}") from None


def _finite(score: object) -> float:
    """Raises ValueError, OverflowError."""
    if type(score) not in (float, int) or not math.isfinite(number := float(score)):
        raise ValueError
    return number


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

    def observe(self, version: str, scores: Iterable[float], alike: Set[str] = frozenset()) -> None:
        """Scores of another version than the reference's say nothing of the traffic.

        How adapters are applied changes roundings only. `alike` are versions that differ in this, of an ensemble, whose
        own does not show it.
        """
        of = self._reference.version
        if applied(version) != applied(of) and of not in alike:
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
