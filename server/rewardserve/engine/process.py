"""An engine in a child process, and its supervisor.

The front never runs the model: a CUDA fault poisons its process and only a restart heals it, and two busy Python
programs should not share one interpreter lock. The supervisor restarts a child that died and hands it once more what
was in flight (scoring is a pure function, so doing it twice is safe); what was in flight at two deaths is failed with
UNAVAILABLE, since it may be what kills.
"""

import asyncio
import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from rewardserve.engine.base import EngineInfo, EngineListener, EngineRequest, EngineResult
from rewardserve.engine.child_process import ChildProcess
from rewardserve.engine.launch import Launcher
from rewardserve.engine.messages import (
    POISONED_EXIT,
    Batch,
    Cancel,
    CannotLoad,
    Done,
    Loading,
    Ping,
    Pong,
    Ready,
    Score,
    Stop,
    ToParent,
    Updated,
    UpdateWeights,
)
from rewardserve.engine.native.options import NativeOptions
from rewardserve.engine.vllm_options import VllmOptions
from rewardserve.errors import (
    BACK_SOON_S,
    DeadlineExceeded,
    EngineDied,
    LoadFailed,
    OptionsDoNotFit,
    RewardServeError,
    Unavailable,
)

log = logging.getLogger(__name__)

RESTART_BACKOFF_S = (0.0, 1.0, 2.0, 5.0, 10.0)
RESTART_WINDOW_S = 300.0
LAST_WORD_S = 2.0  # from the end of a process that ends well until what it said is given up


@dataclass(slots=True, eq=False)
class _InFlight:
    request: EngineRequest
    future: asyncio.Future[EngineResult]
    num_attempts: int = 1


class EngineProcess:
    """The Engine protocol over a supervised child."""

    def __init__(
        self,
        options: NativeOptions | VllmOptions,
        name: str,
        launcher: Launcher,
        stall_timeout_s: float = 600.0,
        log_format: str = "text",
        log_level: str = "info",
        resubmit: bool = True,
    ) -> None:
        """A child that is silent for `stall_timeout_s` while it loads, or does not answer, is killed and restarted.

        `resubmit`: what was in flight when it died goes to the one that comes after it. Else it fails with EngineDied
        at once, and whoever has another engine may turn to that.
        """
        self._launcher = launcher
        self._options = options
        self._name = name
        self._stall_timeout_s = stall_timeout_s
        self._log_options = (log_format, log_level, name)
        self._listener = EngineListener()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToParent] = msgspec.msgpack.Decoder(ToParent)
        self._flights: dict[str, _InFlight] = {}
        self._deaths: deque[float] = deque()
        self._info: EngineInfo | None = None
        self._child: ChildProcess | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = False
        self._resubmits = resubmit
        self._clearing: asyncio.Future[None] | None = None
        self._asked_at: float | None = None  # when the ping that has no answer yet was sent
        self._updating: asyncio.Future[Updated] | None = None

    @property
    def pid(self) -> int | None:
        """Of the child, while it is up."""
        return self._child.process.pid if self._child is not None else None

    async def start(self, listener: EngineListener) -> EngineInfo:
        self._listener = listener
        launching = asyncio.create_task(self._launch())
        self._tasks = [launching]
        try:
            await launching
        except asyncio.CancelledError:
            if not self._stopped:
                raise
        if self._stopped:
            raise Unavailable(f"model '{self._name}' was unloaded while it was loading")
        assert self._info is not None
        self._tasks = [asyncio.create_task(self._supervise()), asyncio.create_task(self._watch_for_stall())]
        return self._info

    async def score(self, request: EngineRequest) -> EngineResult:
        if self._child is None:
            raise self._is_restarting()
        flight = _InFlight(request, asyncio.get_running_loop().create_future())
        self._flights[request.request_id] = flight
        try:
            self._child.send(self._encoder.encode(Score(request)))
            return await flight.future
        except asyncio.CancelledError:
            if self._child is not None:
                self._child.send(self._encoder.encode(Cancel(request.request_id)))
            raise
        finally:
            self._flights.pop(request.request_id, None)

    async def update_weights(self, source: str) -> EngineInfo:
        if self._child is None:
            raise self._is_restarting()
        if self._updating is not None:
            raise LoadFailed(f"model '{self._name}' is taking over other weights already")
        self._updating = asyncio.get_running_loop().create_future()
        try:
            self._child.send(self._encoder.encode(UpdateWeights(source)))
            updated = await self._updating
        finally:
            self._updating = None
        if updated.info is None:
            raise LoadFailed(updated.reason)
        self._info = updated.info
        self._options = replace(self._options, source=source)  # what a restart is to load
        return updated.info

    def _is_restarting(self) -> Unavailable:
        return Unavailable(f"the engine of model '{self._name}' is restarting; try again in a few seconds", BACK_SOON_S)

    def restart_with(self, sources: Sequence[str]) -> None:
        """What is loaded if it dies: models over one backbone, in the order of their variants."""
        assert isinstance(self._options, NativeOptions)
        self._options = replace(self._options, source=sources[0], beside=tuple(sources[1:]))

    async def stop(self) -> None:
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._clearing is not None:
            await self._clearing
        if self._updating is not None and not self._updating.done():
            self._updating.set_exception(Unavailable(f"model '{self._name}' was unloaded"))
        child, self._child = self._child, None
        if child is not None:
            await child.end(self._encoder.encode(Stop()))
        self._fail_flights(Unavailable(f"model '{self._name}' was unloaded"))

    # -- life and death --------------------------------------------------------------------------------------------

    async def _launch(self) -> None:
        """Starts a child and waits until it is ready. Raises LoadFailed or EngineDied."""
        child = await ChildProcess.spawn(self._launcher, self._options, self._log_options)
        try:
            first = await self._first_message(child)
        except BaseException:
            await child.kill()
            raise
        if isinstance(first, CannotLoad):
            await child.kill()
            raise (OptionsDoNotFit if first.of_options else LoadFailed)(first.reason)
        assert isinstance(first, Ready)
        self._info = first.info
        self._asked_at = None
        self._child = child
        child.listen(lambda message: self._hear(child, message))

    async def _first_message(self, child: ChildProcess) -> ToParent:
        """What comes of loading. Raises EngineDied when the child dies over it, or says nothing for too long."""
        death = asyncio.ensure_future(child.process.wait())
        try:
            while isinstance(message := await self._next_message(child, death), Loading):
                pass
            return message
        finally:
            death.cancel()
            await asyncio.gather(death, return_exceptions=True)

    async def _next_message(self, child: ChildProcess, death: asyncio.Future[int]) -> ToParent:
        message = asyncio.ensure_future(child.next_message())
        try:
            await asyncio.wait((message, death), return_when=asyncio.FIRST_COMPLETED, timeout=self._stall_timeout_s)
            if death.done() and death.result() == 0:  # it went by itself, having said why: that may be under way still
                await asyncio.wait((message,), timeout=LAST_WORD_S)
            if message.done():
                return self._decoder.decode(message.result())
            if death.done():
                raise EngineDied(f"the engine of model '{self._name}' {_cause(death.result())} while loading")
            raise EngineDied(
                f"the engine of model '{self._name}' was silent for {self._stall_timeout_s:.0f} s while loading"
            )
        finally:
            message.cancel()
            await asyncio.gather(message, return_exceptions=True)

    async def _supervise(self) -> None:
        try:
            await self._keep_up()
        except Exception as error:  # a bug; those who wait would wait for ever, and the next death go unnoticed
            log.critical("the supervisor of model '%s' died", self._name, exc_info=True)
            reason = f"the engine of model '{self._name}' cannot be kept up: {type(error).__name__}: {error}"
            child, self._child = self._child, None
            self._fail_flights(EngineDied(reason))
            self._listener.on_failed(reason)
            if child is not None:
                await child.kill()

    async def _keep_up(self) -> None:
        while True:
            assert self._child is not None
            child = self._child
            code = await child.process.wait()
            child.drain()  # what it still said counts
            self._child = None
            self._clearing = asyncio.ensure_future(child.kill())  # and what it leaves behind: seconds, of vLLM
            reason = f"the engine of model '{self._name}' {_cause(code)}"
            log.error("%s with %d requests in flight", reason, len(self._flights))
            if self._updating is not None and not self._updating.done():
                self._updating.set_exception(EngineDied(f"{reason} while it took over other weights"))
            self._listener.on_down(reason)
            if self._resubmits:
                self._fail_flights(
                    EngineDied(f"{reason} twice with this request in flight"), lambda flight: flight.num_attempts >= 2
                )
            else:
                self._fail_flights(EngineDied(f"{reason} with this request in flight"))
            await asyncio.shield(self._clearing)
            if not await self._restart(reason):
                return

    async def _restart(self, reason: str) -> bool:
        """True when a new child is up and has what was in flight; False when it died too often."""
        while True:
            now = time.monotonic()
            self._deaths.append(now)
            while self._deaths[0] < now - RESTART_WINDOW_S:
                self._deaths.popleft()
            if len(self._deaths) > len(RESTART_BACKOFF_S):
                final = f"{reason}; given up after {len(self._deaths) - 1} restarts in {RESTART_WINDOW_S:.0f} s"
                log.critical("%s", final)
                self._fail_flights(EngineDied(final))
                self._listener.on_failed(final)
                return False
            await asyncio.sleep(RESTART_BACKOFF_S[len(self._deaths) - 1])
            before = self._info
            try:
                await self._launch()
            except (RewardServeError, OSError) as error:
                reason = str(error)
                log.error("restart failed: %s", reason)
                continue
            assert self._info is not None and before is not None
            self._fail_changed(before, self._info, reason)
            self._listener.on_up(self._info)
            self._resubmit()
            return True

    def _resubmit(self) -> None:
        for flight in list(self._flights.values()):
            flight.num_attempts += 1
            if self._child is not None:
                self._child.send(self._encoder.encode(Score(flight.request)))

    def _fail_changed(self, before: EngineInfo, now: EngineInfo, reason: str) -> None:
        """What is in flight to a model that came back as another version."""

        def is_changed(flight: _InFlight) -> bool:
            variant = flight.request.variant
            return before.of(variant).version != now.of(variant).version

        self._fail_flights(EngineDied(f"{reason}, and its checkpoint has changed since the request came"), is_changed)

    def _fail_flights(self, error: RewardServeError, which: Callable[[_InFlight], bool] = lambda flight: True) -> None:
        for flight in self._flights.values():
            if which(flight) and not flight.future.done():
                flight.future.set_exception(error)

    async def _watch_for_stall(self) -> None:
        """What it says of its own accord is no sign of life: it takes and gives up work while its device hangs."""
        while True:
            await asyncio.sleep(self._stall_timeout_s / 10)
            child = self._child
            if child is None:
                continue
            child.drain()  # if it was this process that was held up, the answer is here
            if self._asked_at is None:
                self._asked_at = time.monotonic()
                child.send(self._encoder.encode(Ping()))
            elif (silent_s := time.monotonic() - self._asked_at) > self._stall_timeout_s:
                log.error("the engine of model '%s' was silent for %.0f s; killing it", self._name, silent_s)
                self._asked_at = None
                child.strike()

    # -- messages --------------------------------------------------------------------------------------------------

    def _hear(self, child: ChildProcess, message: bytes) -> None:
        """Who cannot be understood would leave callers waiting: it is ended, and so is made good."""
        try:
            self._handle(self._decoder.decode(message))
        except Exception:
            log.exception("a message of the engine of model '%s' cannot be handled; restarting it", self._name)
            child.strike()

    def _handle(self, message: ToParent) -> None:
        match message:
            case Done():
                self._resolve(message)
            case Pong():
                self._asked_at = None
            case Batch(report):
                self._listener.on_batch(report)
            case Updated():
                if self._updating is not None and not self._updating.done():
                    self._updating.set_result(message)
            case Ready(info):  # it fell back to another path
                self._info = info
                self._listener.on_up(info)

    def _resolve(self, done: Done) -> None:
        flight = self._flights.get(done.request_id)
        if flight is None or flight.future.done():
            return
        if done.result is not None:
            flight.future.set_result(done.result)
        elif done.expired:
            flight.future.set_exception(DeadlineExceeded("the deadline passed while the request was queued"))


def _cause(code: int) -> str:
    if code < 0:
        named = {number.value: number.name for number in signal.Signals}  # not every signal of Linux has a name
        return f"was killed by {named.get(-code, f'signal {-code}')}"
    if code == POISONED_EXIT:
        return "ended because its device, or a process of its own, cannot go on"
    return f"ended with exit code {code}"
