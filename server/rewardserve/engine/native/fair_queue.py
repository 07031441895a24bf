"""Who is served next: higher priority first; between equals, every client gets its fair share of tokens.

Self-clocked fair queueing (Golestani, INFOCOM 1994), at each priority by itself. Work of a client starts, in virtual
time, when what the client was served before has finished or, if it had nothing waiting, now, whichever is later; what
would finish first is served first. So one client's small request does not wait behind another's huge one, and equal
requests are served in the order they came. Huge work is served a quantum at a time, its next quantum competing anew.

Only the first of a client's work has a place in virtual time, and only what is served takes the client further: work
that is dropped while it waits leaves the client as if it had never come.
"""

import heapq
import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Work = TypeVar("Work")
Rank = tuple[int, int, int, str]  # the smallest is served first: -priority, finish, arrival; and whose it is
MAX_CLIENTS = 4096  # whose service is remembered while the queue is never empty
MAX_OUTDATED = 64  # ranks in the heap, beside as many as there are flows


@dataclass(slots=True, eq=False)
class _Flow(Generic[Work]):
    """What one client has waiting at one priority, in the order it came. Never empty."""

    priority: int
    client: str
    start: int  # virtual time, in tokens: what is first starts then
    waiting: "OrderedDict[int, _Entry[Work]]" = field(default_factory=OrderedDict)
    rank: Rank | None = None


@dataclass(slots=True, eq=False)
class _Entry(Generic[Work]):
    work: Work
    flow: _Flow[Work]
    cost: int  # tokens still to be served, as far as is known
    arrival: int


class FairQueue(Generic[Work]):
    """Work items are told apart by identity. All calls are O(log n)."""

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self.period = 0  # a new one begins when nobody waits; what was charged in one is nothing to the next
        self._entries: dict[int, _Entry[Work]] = {}
        self._flows: dict[tuple[int, str], _Flow[Work]] = {}
        self._heap: list[Rank] = []  # of every flow, among ranks that flows had before
        self._finish: dict[tuple[int, str], int] = {}  # of clients that have nothing waiting
        self._now: defaultdict[int, int] = defaultdict(int)  # by priority: the start of what was served last
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, work: Work) -> bool:
        return id(work) in self._entries

    def __iter__(self) -> Iterator[Work]:
        return iter([entry.work for entry in self._entries.values()])

    def add(self, work: Work, client: str, cost: int, priority: int) -> None:
        """`cost` in tokens, by which it is ranked; what is paid is what `charge` says."""
        key = (priority, client)
        if key not in self._flows:
            start = max(self._now[priority], self._finish.pop(key, 0))
            self._flows[key] = _Flow(priority, client, start)
        flow = self._flows[key]
        flow.waiting[id(work)] = self._entries[id(work)] = _Entry(work, flow, cost, next(self._arrivals))
        self._place(flow)

    def peek(self) -> Work | None:
        """What is to be served next, left in the queue."""
        flow = self._first()
        return None if flow is None else _first_of(flow).work

    @property
    def highest_priority(self) -> int | None:
        """Of what is to be served next."""
        flow = self._first()
        return None if flow is None else flow.priority

    def charge(self, work: Work, tokens: int) -> None:
        """`tokens` of an item were served: it competes anew with what is left, until it is removed."""
        entry = self._entries[id(work)]
        flow = entry.flow
        self._now[flow.priority] = max(self._now[flow.priority], flow.start)
        flow.start += tokens
        entry.cost = max(1, entry.cost - tokens)
        self._place(flow)

    def give_back(self, work: Work, tokens: int, cost: int) -> None:
        """`tokens` that were charged for an item came to nothing: it is its client's first again, with `cost` left."""
        entry = self._entries[id(work)]
        entry.flow.start -= tokens
        entry.cost = cost
        entry.flow.waiting.move_to_end(id(work), last=False)
        self._place(entry.flow)

    def refund(self, client: str, priority: int, tokens: int) -> None:
        """`tokens` that were charged came to nothing, and what they were charged for is not wanted any more."""
        key = (priority, client)
        if key in self._flows:
            self._flows[key].start -= tokens
            self._place(self._flows[key])
        elif key in self._finish:
            self._finish[key] -= tokens

    def remove(self, work: Work) -> None:
        """Served whole, or dropped: what was not charged is not paid."""
        flow = self._entries.pop(id(work)).flow
        del flow.waiting[id(work)]
        if flow.waiting:
            self._place(flow)
        elif self._entries:
            del self._flows[flow.priority, flow.client]
            self._finish[flow.priority, flow.client] = flow.start
            if len(self._finish) > MAX_CLIENTS:
                self._forget_clients()
        else:  # an idle queue owes nobody anything
            for everything in (self._flows, self._heap, self._finish, self._now):
                everything.clear()
            self.period += 1

    def _forget_clients(self) -> None:
        """Every connection is a client; those that were served least are forgotten, which costs nobody much."""
        by_finish = sorted(self._finish.items(), key=lambda item: item[1])
        self._finish = dict(by_finish[MAX_CLIENTS // 2 :])

    def _first(self) -> _Flow[Work] | None:
        while self._heap:
            priority, client = -self._heap[0][0], self._heap[0][3]
            flow = self._flows.get((priority, client))
            if flow is not None and flow.rank == self._heap[0]:
                return flow
            heapq.heappop(self._heap)
        return None

    def _place(self, flow: _Flow[Work]) -> None:
        """By its first item as it is now."""
        first = _first_of(flow)
        rank = (-flow.priority, flow.start + min(first.cost, self._quantum), first.arrival, flow.client)
        if rank == flow.rank:
            return
        flow.rank = rank
        heapq.heappush(self._heap, rank)
        if len(self._heap) > 2 * len(self._flows) + MAX_OUTDATED:
            self._heap = [flow.rank for flow in self._flows.values() if flow.rank is not None]
            heapq.heapify(self._heap)


def _first_of(flow: _Flow[Work]) -> _Entry[Work]:
    return next(iter(flow.waiting.values()))
