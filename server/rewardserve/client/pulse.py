"""Whether the host at the other end of a connection is still there. Knows neither channels nor what goes through them.

A host that loses power closes no connection, and TCP takes many minutes to say so. Calls that fail by their deadline do
not say so either: those of a slow server do the same. So where an answer is owed and nothing came for SILENCE_S, the
other end is asked for its health; what answers that, with whatever, is slow and is waited for.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import TracebackType

from rewardserve.client.errors import DeadlineExceeded

SILENCE_S = 5.0
ANSWER_S = 5.0  # for the answer about its health, which is behind what is being sent to the server already


class Pulse:
    """Of one connection. `with pulse:` is around everything that waits for an answer of it.

    `is_there` asks for its health, and says whether there was an answer within so many seconds; `give_up` is called
    once, where there was none, and nothing else came meanwhile. Belongs to one event loop.
    """

    def __init__(self, is_there: Callable[[float], Awaitable[bool]], give_up: Callable[[], Awaitable[None]]) -> None:
        self._is_there = is_there
        self._give_up = give_up
        self._num_waiting = 0
        self._silent_since_s: float | None = None  # on the monotonic clock; None while no answer is owed
        self._timer: asyncio.TimerHandle | None = None  # one for all that wait: they are many, and seldom wait long
        self._asking: asyncio.Task[None] | None = None
        self.is_gone = False

    def __enter__(self) -> None:
        self._num_waiting += 1
        if self._silent_since_s is None:
            self._silent_since_s = time.monotonic()
            self._watch(SILENCE_S)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._num_waiting -= 1
        if not _is_silence(error):
            self._hear()

    def stop(self) -> None:
        """The connection is being closed."""
        if self._timer is not None:
            self._timer.cancel()
        if self._asking is not None:
            self._asking.cancel()

    def _hear(self) -> None:
        self._silent_since_s = time.monotonic() if self._num_waiting else None

    def _watch(self, after_s: float) -> None:
        if self._timer is None and self._asking is None and not self.is_gone:
            self._timer = asyncio.get_running_loop().call_later(after_s, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._silent_since_s is None:
            return
        left_s = self._silent_since_s + SILENCE_S - time.monotonic()
        if left_s > 0:
            self._watch(left_s)
        else:
            self._asking = asyncio.get_running_loop().create_task(self._ask(self._silent_since_s))

    async def _ask(self, silent_since_s: float) -> None:
        if await self._is_there(ANSWER_S):
            self._hear()
        if self._silent_since_s == silent_since_s:
            self.is_gone = True
            await self._give_up()
        self._asking = None
        if self._silent_since_s is not None:
            self._watch(SILENCE_S)


def _is_silence(error: BaseException | None) -> bool:
    """Whether a call ended without a word from the other end: its time was up, or its caller left."""
    if isinstance(error, DeadlineExceeded):
        return not error.is_reply
    return isinstance(error, asyncio.CancelledError)
