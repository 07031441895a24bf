"""Requests in flight: until when, what is left of each, and how they ended. Loads no torch."""

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from rewardserve.engine.base import EngineGroup, EngineItem, EngineRequest, EngineResult, Outcome
from rewardserve.engine.native.sequence import Group, Sequence

DEADLINES_KEPT = 1024  # of requests that have ended, at least, before they are looked through


@dataclass(slots=True, eq=False)
class _Job:
    request: EngineRequest
    groups: list[Group]
    received_at: float
    num_unfinished: int  # groups
    started_at: float | None = None


class Jobs:
    """By their ids."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._jobs: dict[str, _Job] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._outcomes: list[Outcome] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._jobs

    def requests(self) -> list[EngineRequest]:
        """In the order they came."""
        return [job.request for job in self._jobs.values()]

    def add(self, request: EngineRequest, groups: list[Group]) -> None:
        """`groups` are the request's own. Its id must not be in flight already."""
        assert request.request_id not in self._jobs
        self._jobs[request.request_id] = _Job(request, groups, self._clock(), len(groups))
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.request_id))
            if len(self._deadlines) > 2 * len(self._jobs) + DEADLINES_KEPT:
                self._forget_deadlines()

    def _forget_deadlines(self) -> None:
        """Of requests that have ended: those that are given hours would be remembered for hours."""
        self._deadlines = [(r.deadline, r.request_id) for r in self.requests() if r.deadline is not None]
        heapq.heapify(self._deadlines)

    def expired(self) -> Iterator[str]:
        """Those whose deadline has passed. Each is to be dropped before the next is asked for."""
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            job = self._jobs.get(request_id)  # or one that came later, with the same id
            if job is not None and job.request.deadline is not None and job.request.deadline <= now:
                yield request_id

    def begin(self, request_ids: Iterable[str]) -> None:
        """A forward with something of theirs starts now: queueing ends for them."""
        now = self._clock()
        for request_id in request_ids:
            job = self._jobs.get(request_id)
            if job is not None and job.started_at is None:
                job.started_at = now

    def drop(self, request_id: str, expired: bool) -> list[Group]:
        """Ends a request without a result. Returns its groups, which belong to nobody now."""
        groups = self._jobs.pop(request_id).groups
        for group in groups:
            group.dropped = True
        self._outcomes.append(Outcome(request_id, None, expired))
        return groups

    def finish_if_done(self, group: Group) -> None:
        """Counts a group that is finished, once; with the last of its request's the request ends."""
        if group.dropped or not group.finished:
            return
        job = self._jobs[group.request_id]
        job.num_unfinished -= 1
        if job.num_unfinished == 0:
            del self._jobs[group.request_id]
            self._outcomes.append(Outcome(group.request_id, self._result(job)))

    def _result(self, job: _Job) -> EngineResult:
        started = job.received_at if job.started_at is None else job.started_at
        groups = tuple(EngineGroup(tuple(map(_item, group.sequences)), group.num_cached) for group in job.groups)
        return EngineResult(groups, queue_s=started - job.received_at, compute_s=self._clock() - started)

    def take_outcomes(self) -> list[Outcome]:
        """Requests that ended since the last call."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def check(self) -> list[Group]:
        """Asserts that every request has a group to wait for. Returns all their groups."""
        for request_id, job in self._jobs.items():
            assert job.num_unfinished == sum(not group.finished for group in job.groups) > 0, request_id
        return [group for job in self._jobs.values() for group in job.groups]


def _item(sequence: Sequence) -> EngineItem:
    reading = sequence.reading
    if reading is None:
        return EngineItem(None, sequence.failure)
    return EngineItem(reading.score, None, reading.attributes, reading.steps, reading.std)
