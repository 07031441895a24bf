"""A share of live requests, scored again by the model that is to come: do the two rank alike?"""

import asyncio
import logging
import math
import random
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from rewardserve.types import ScoreRequest, ScoreResult

log = logging.getLogger(__name__)
MAX_UNDER_WAY = 4  # requests: the shadow must not take the machine from those who wait for an answer


class Shadow:
    """Compares until `target` requests are compared. Lives on the event loop."""

    def __init__(
        self, score: Callable[[ScoreRequest], Awaitable[ScoreResult]], share: float, target: int, seed: int = 0
    ) -> None:
        self._score, self._share, self._target = score, share, target
        self._random = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()
        self._done = asyncio.Event()
        self.num_requests = self.num_failed = 0
        self.failure = ""  # the last one's reason
        self.groups: list[list[tuple[float, float]]] = []  # of each: (score as answered, score to come)

    def offer(self, request: ScoreRequest, answered: ScoreResult) -> None:
        """A request that was answered; the answer has been given, nobody waits for this."""
        if self._done.is_set() or len(self._tasks) >= MAX_UNDER_WAY or self._random.random() >= self._share:
            return
        task = asyncio.get_running_loop().create_task(self._compare(request, answered))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait(self, timeout_s: float) -> None:
        """Until enough was compared, or no longer."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._done.wait()
        except TimeoutError:
            self._done.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _compare(self, request: ScoreRequest, answered: ScoreResult) -> None:
        try:
            result = await self._score(replace(request, deadline=None))  # its caller has gone
        except Exception as error:
            log.warning("a shadowed request failed: %s", error)
            self._failed(str(error))
        else:
            for ours, theirs in zip(answered.groups, result.groups, strict=True):
                pairs: list[tuple[float, float]] = []
                self.groups.append(pairs)
                for old, new in zip(ours.items, theirs.items, strict=True):
                    if old.score is not None and new.score is not None:
                        pairs.append((old.score, new.score))
                    elif old.score is not None:
                        self._failed("it has no score" if new.failure is None else new.failure.message)
        self.num_requests += 1
        if self.num_requests >= self._target:
            self._done.set()

    def _failed(self, reason: str) -> None:
        self.num_failed += 1
        self.failure = reason


def mean_rank_correlation(groups: Sequence[Sequence[tuple[float, float]]]) -> float | None:
    """Within groups, and the mean of that: scores rank responses to one prompt. Between prompts they differ anyway, and
    two models would agree in that who disagree about every response. Of single responses only, there is none but that
    of all together. None if it is not defined.
    """
    within = [found for pairs in groups if (found := rank_correlation(pairs)) is not None]
    if within or any(len(pairs) > 1 for pairs in groups):
        return statistics.fmean(within) if within else None
    return rank_correlation([pair for pairs in groups for pair in pairs])


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rho, with mean ranks for ties (Spearman 1904): Pearson's r of the ranks. None if it is not defined."""
    if len(pairs) < 2:
        return None
    a, b = (_ranks([pair[i] for pair in pairs]) for i in (0, 1))
    mean = (len(pairs) + 1) / 2
    da, db = [x - mean for x in a], [x - mean for x in b]
    norm = math.sqrt(math.fsum(x * x for x in da) * math.fsum(x * x for x in db))
    return math.fsum(x * y for x, y in zip(da, db, strict=True)) / norm if norm else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    begin = 0
    while begin < len(order):
        end = begin
        while end < len(order) and values[order[end]] == values[order[begin]]:
            end += 1
        for index in order[begin:end]:
            ranks[index] = (begin + end + 1) / 2
        begin = end
    return ranks
