"""An event loop on a thread of its own, so that blocking code can run coroutines, even from inside another loop."""

import asyncio
import concurrent.futures
import contextlib
import os
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from rewardserve.client.errors import RewardClientError

Result = TypeVar("Result")
NOTICE_S = 0.5  # within which an interrupt is noticed


class LoopThread:
    """Starts at construction. A daemon: a forgotten one does not keep the interpreter from exiting."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()  # no coroutine is handed over once stop() has begun, or it would never end
        self._stopping = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result], timeout_s: float | None = None) -> Result:
        """Its result. Interrupted (KeyboardInterrupt), it cancels the coroutine; so it does after `timeout_s`.

        Raises RuntimeError where the thread has been stopped, or was left behind in the parent of a forked process, or
        is the caller itself, which would wait for itself for ever (the garbage collector may run finalizers there).
        """
        if os.getpid() != self._pid:  # not even the lock: a thread may have held it that is not here to let it go
            coroutine.close()
            raise RuntimeError("the client was made in another process")
        with self._lock:
            if self._stopping or not self._thread.is_alive() or threading.current_thread() is self._thread:
                coroutine.close()
                raise RuntimeError("the client is closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return _result(future, timeout_s)
        except concurrent.futures.CancelledError:
            raise RewardClientError("the client was closed during the call") from None
        except BaseException:
            future.cancel()
            raise

    def stop(self, timeout_s: float) -> None:
        """Cancels what still runs and waits for the thread to end, at most so long. May be called again."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if not self._stopping and self._thread.is_alive():
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._stopping = True
        if threading.current_thread() is not self._thread:  # the garbage collector may call from anywhere
            self._thread.join(timeout_s)

    def _main(self) -> None:
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(_cancel_all())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()


def _result(future: concurrent.futures.Future[Result], timeout_s: float | None) -> Result:
    """Waits a little at a time: a signal that comes just before a wait begins is noticed only when it ends."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        slice_s = NOTICE_S if deadline is None else min(NOTICE_S, max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(concurrent.futures.TimeoutError):
            return future.result(slice_s)
        if future.done():  # the result itself was a TimeoutError, or came just now
            return future.result()
        if deadline is not None and time.monotonic() >= deadline:
            raise concurrent.futures.TimeoutError


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
