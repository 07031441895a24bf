"""Gives up what has not ended by its deadline."""

import asyncio
import heapq
import time
from types import TracebackType

from rewardserve.errors import DeadlineExceeded

TICK_S = 0.01  # how late a deadline may be noticed
MAX_STALE_TICKS = 1000


class Deadlines:
    """One timer for all. Deadlines are seldom reached, and a timer for each cost as much as encoding a request does.

    Those of the same tick wait together; the ticks are a heap, rid of those that wait for nobody now and then. Lives on
    the event loop.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, set[Deadline]] = {}  # by tick
        self._ticks: list[int] = []  # a heap
        self._timer: asyncio.TimerHandle | None = None
        self._timer_tick = 0

    def until(self, deadline: float | None) -> "Deadline":
        """`with deadlines.until(...)`: raises DeadlineExceeded where the block awaits. CLOCK_MONOTONIC, seconds."""
        return Deadline(self, deadline)

    def add(self, tick: int, deadline: "Deadline") -> None:
        if tick not in self._waiting:
            self._waiting[tick] = set()
            heapq.heappush(self._ticks, tick)
            if self._timer is None or tick < self._timer_tick:
                self._set_timer(tick)
        self._waiting[tick].add(deadline)

    def discard(self, tick: int, deadline: "Deadline") -> None:
        waiting = self._waiting.get(tick)
        if waiting is None:
            return
        waiting.discard(deadline)
        if not waiting:
            del self._waiting[tick]
            if len(self._ticks) > 2 * len(self._waiting) + MAX_STALE_TICKS:
                self._ticks = list(self._waiting)
                heapq.heapify(self._ticks)

    def _set_timer(self, tick: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay = tick * TICK_S - time.monotonic()
        self._timer_tick = tick
        self._timer = asyncio.get_running_loop().call_later(max(0.0, delay), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = time.monotonic()
        while self._ticks and (self._ticks[0] * TICK_S <= now or self._ticks[0] not in self._waiting):
            for deadline in self._waiting.pop(heapq.heappop(self._ticks), ()):
                deadline.pass_by()
        if self._ticks:
            self._set_timer(self._ticks[0])


class Deadline:
    """One block's. Like asyncio.timeout it cancels the task, and tells that cancellation from anybody else's."""

    __slots__ = ("_cancelling", "_deadlines", "_passed", "_task", "_tick")

    def __init__(self, deadlines: Deadlines, deadline: float | None) -> None:
        self._deadlines = deadlines
        self._tick = None if deadline is None else int(deadline / TICK_S) + 1
        self._passed = False

    def __enter__(self) -> None:
        if self._tick is None:
            return
        if self._tick * TICK_S <= time.monotonic():
            raise DeadlineExceeded("the deadline passed before the work began")
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._deadlines.add(self._tick, self)

    def pass_by(self) -> None:
        self._passed = True
        self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._tick is None:
            return
        self._deadlines.discard(self._tick, self)
        cancelled_by_others = self._passed and self._task.uncancel() > self._cancelling
        if self._passed and not cancelled_by_others and kind is asyncio.CancelledError:
            raise DeadlineExceeded("the deadline passed before the scores were there") from None
