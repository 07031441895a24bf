"""Who is served next: higher priority first; between equals, every client gets its fair share of tokens.

Self-clocked fair queueing (Golestani, INFOCOM 1994). Work of a client starts, in virtual time, when the client's
earlier work has finished or now, whichever is later; what would finish first is served first. So one client's small
request does not wait behind another's huge one, and equal requests are served in the order they came. Huge work is
served a quantum at a time, its next quantum competing anew.
"""

import heapq
from collections.abc import Iterator
from typing import Generic, TypeVar

Work = TypeVar("Work")
MAX_CLIENTS = 4096  # whose service is remembered while the queue is never empty


class _Entry(Generic[Work]):
    __slots__ = ("arrival", "cost", "finish", "priority", "removed", "start", "work")

    def __init__(self, work: Work, priority: int, start: float, cost: int, arrival: int) -> None:
        self.work, self.priority, self.start, self.cost, self.arrival = work, priority, start, cost, arrival
        self.finish = 0.0
        self.removed = False

    def __lt__(self, other: "_Entry[Work]") -> bool:
        return (-self.priority, self.finish, self.arrival) < (-other.priority, other.finish, other.arrival)


class FairQueue(Generic[Work]):
    """Work items are told apart by identity. All calls are O(log n)."""

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._heap: list[_Entry[Work]] = []
        self._entries: dict[int, _Entry[Work]] = {}
        self._client_finish: dict[str, float] = {}
        self._now = 0.0
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, work: Work) -> bool:
        return id(work) in self._entries

    def __iter__(self) -> Iterator[Work]:
        return iter([entry.work for entry in self._entries.values()])

    def add(self, work: Work, client: str, cost: int, priority: int) -> None:
        """`cost` in tokens."""
        start = max(self._now, self._client_finish.get(client, 0.0))
        self._client_finish[client] = start + cost
        if len(self._client_finish) > MAX_CLIENTS:
            self._forget_clients()
        entry = _Entry(work, priority, start, cost, self._arrivals)
        self._arrivals += 1
        self._entries[id(work)] = entry
        self._push(entry)

    def peek(self) -> Work | None:
        """What is to be served next, left in the queue."""
        while self._heap and self._heap[0].removed:
            heapq.heappop(self._heap)
        return self._heap[0].work if self._heap else None

    @property
    def highest_priority(self) -> int | None:
        """Of what is to be served next."""
        return None if self.peek() is None else self._heap[0].priority

    def charge(self, work: Work, tokens: int) -> None:
        """`tokens` of an item were served, and there are more: it competes anew with what is left."""
        old = self._entries[id(work)]
        old.removed = True
        self._now = max(self._now, old.start)
        entry = _Entry(work, old.priority, old.start + tokens, max(1, old.cost - tokens), old.arrival)
        self._entries[id(work)] = entry
        self._push(entry)

    def remove(self, work: Work) -> None:
        """Served whole, or dropped."""
        entry = self._entries.pop(id(work))
        self._now = max(self._now, entry.start)
        entry.removed = True
        if not self._entries:  # an idle queue owes nobody anything
            self._heap.clear()
            self._client_finish.clear()
            self._now = 0.0

    def _forget_clients(self) -> None:
        """Every connection is a client; those that were served least are forgotten, which costs nobody much."""
        by_finish = sorted(self._client_finish.items(), key=lambda item: item[1])
        self._client_finish = dict(by_finish[MAX_CLIENTS // 2 :])

    def _push(self, entry: _Entry[Work]) -> None:
        entry.finish = entry.start + min(entry.cost, self._quantum)
        heapq.heappush(self._heap, entry)
