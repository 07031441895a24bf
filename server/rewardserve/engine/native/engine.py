"""The Engine protocol in this process: for the offline CLI and for tests. A server runs the loop in a child instead."""

import asyncio

from rewardserve.engine.base import EngineInfo, EngineListener, EngineRequest, EngineResult
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.loop import EngineLoop
from rewardserve.engine.native.options import NativeOptions
from rewardserve.engine.native.scheduler import Outcome
from rewardserve.errors import DeadlineExceeded, Unavailable


class NativeEngine:
    def __init__(self, options: NativeOptions) -> None:
        self._options = options
        self._pending: dict[str, asyncio.Future[EngineResult]] = {}
        self._loop: EngineLoop | None = None

    async def start(self, listener: EngineListener) -> EngineInfo:
        events = asyncio.get_running_loop()
        loop = EngineLoop(
            lambda: load_runner(self._options),
            self._options.max_batch_sequences,
            on_outcome=lambda outcome: events.call_soon_threadsafe(self._resolve, outcome),
            on_batch=lambda report: events.call_soon_threadsafe(listener.on_batch, report),
            on_info=lambda info: events.call_soon_threadsafe(listener.on_up, info),
            on_poisoned=lambda reason: events.call_soon_threadsafe(self._die, listener, reason),
        )
        info = await asyncio.to_thread(loop.start)
        self._loop = loop
        return info

    async def score(self, request: EngineRequest) -> EngineResult:
        if self._loop is None:
            raise Unavailable("the engine is not running")
        future: asyncio.Future[EngineResult] = asyncio.get_running_loop().create_future()
        self._pending[request.request_id] = future
        try:
            self._loop.submit(request)
            return await future
        except asyncio.CancelledError:
            self._loop.cancel(request.request_id)
            raise
        finally:
            self._pending.pop(request.request_id, None)

    async def update_weights(self, source: str) -> EngineInfo:
        if self._loop is None:
            raise Unavailable("the engine is not running")
        return await asyncio.wrap_future(self._loop.update_weights(source))

    async def stop(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            await asyncio.to_thread(loop.stop)
        self._fail_pending("the engine was stopped")

    def _resolve(self, outcome: Outcome) -> None:
        future = self._pending.get(outcome.request_id)
        if future is None or future.done():
            return
        if outcome.result is not None:
            future.set_result(outcome.result)
        elif outcome.expired:
            future.set_exception(DeadlineExceeded("the deadline passed while the request was queued"))
        else:
            future.set_exception(Unavailable("the request was cancelled"))

    def _die(self, listener: EngineListener, reason: str) -> None:
        self._loop = None
        self._fail_pending(reason)
        listener.on_failed(reason)

    def _fail_pending(self, reason: str) -> None:
        for future in self._pending.values():
            if not future.done():
                future.set_exception(Unavailable(reason))
