"""A native engine in a child process, and its supervisor.

The front never runs the model: a CUDA fault poisons its process and only a restart heals it, and two busy Python
programs should not share one interpreter lock. The supervisor restarts a child that died and hands it once more what
was in flight (scoring is a pure function, so doing it twice is safe); what was in flight at two deaths is failed with
UNAVAILABLE, since it may be what kills.
"""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import msgspec
import zmq
import zmq.asyncio

from rewardserve.engine.base import EngineInfo, EngineListener, EngineRequest, EngineResult
from rewardserve.engine.messages import POISONED_EXIT, Batch, Cancel, CannotLoad, Done, Ready, Score, Stop, ToParent
from rewardserve.engine.native.options import NativeOptions
from rewardserve.errors import DeadlineExceeded, EngineDied, LoadFailed, RewardServeError, Unavailable

log = logging.getLogger(__name__)

RESTART_BACKOFF_S = (0.0, 1.0, 2.0, 5.0, 10.0)
RESTART_WINDOW_S = 300.0


@dataclass(slots=True, eq=False)
class _InFlight:
    request: EngineRequest
    future: asyncio.Future[EngineResult]
    num_attempts: int = 1


class EngineProcess:
    """The Engine protocol over a supervised child."""

    def __init__(
        self,
        options: NativeOptions,
        name: str,
        stall_timeout_s: float = 600.0,
        log_format: str = "text",
        log_level: str = "info",
    ) -> None:
        """A child that has work but is silent for `stall_timeout_s` is killed and restarted."""
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
        self._child: _Child | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._heard_at = 0.0

    @property
    def pid(self) -> int | None:
        """Of the child, while it is up."""
        return self._child.process.pid if self._child is not None else None

    async def start(self, listener: EngineListener) -> EngineInfo:
        self._listener = listener
        await self._launch()
        assert self._info is not None
        self._tasks = [asyncio.create_task(self._supervise()), asyncio.create_task(self._watch_for_stall())]
        return self._info

    async def score(self, request: EngineRequest) -> EngineResult:
        if self._child is None:
            raise Unavailable(f"the engine of model '{self._name}' is restarting; try again in a few seconds")
        if not self._flights:
            self._heard_at = time.monotonic()  # it had no reason to speak before
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

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        child, self._child = self._child, None
        if child is not None:
            await child.end(self._encoder.encode(Stop()))
        self._fail_flights(Unavailable(f"model '{self._name}' was unloaded"))

    # -- life and death --------------------------------------------------------------------------------------------

    async def _launch(self) -> None:
        """Starts a child and waits until it is ready. Raises LoadFailed or EngineDied."""
        child = await _Child.spawn(self._options, self._log_options)
        try:
            first = await self._first_message(child)
        except BaseException:
            await child.kill()
            raise
        if isinstance(first, CannotLoad):
            await child.kill()
            raise LoadFailed(first.reason)
        assert isinstance(first, Ready)
        self._info = first.info
        self._heard_at = time.monotonic()
        self._child = child
        child.reader = asyncio.create_task(self._read(child))

    async def _first_message(self, child: "_Child") -> ToParent:
        message = asyncio.ensure_future(child.receive())
        death = asyncio.ensure_future(child.process.wait())
        try:
            await asyncio.wait((message, death), return_when=asyncio.FIRST_COMPLETED)
            if not message.done():
                raise EngineDied(f"the engine of model '{self._name}' {_cause(death.result())} while loading")
            return self._decoder.decode(message.result())
        finally:
            for task in (message, death):
                task.cancel()
            await asyncio.gather(message, death, return_exceptions=True)

    async def _supervise(self) -> None:
        while True:
            assert self._child is not None
            child = self._child
            code = await child.process.wait()
            await asyncio.sleep(0)  # let the reader take what the child still said
            self._child = None
            await child.kill()
            reason = f"the engine of model '{self._name}' {_cause(code)}"
            log.error("%s with %d requests in flight", reason, len(self._flights))
            self._listener.on_down(reason)
            self._fail_flights(EngineDied(f"{reason} twice with this request in flight"), at_attempt=2)
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
            if self._info.version != before.version:
                self._fail_flights(EngineDied(f"{reason}, and its checkpoint has changed since the request came"))
            self._listener.on_up(self._info)
            self._resubmit()
            return True

    def _resubmit(self) -> None:
        for flight in list(self._flights.values()):
            flight.num_attempts += 1
            if self._child is not None:
                self._child.send(self._encoder.encode(Score(flight.request)))

    def _fail_flights(self, error: RewardServeError, at_attempt: int = 1) -> None:
        for flight in self._flights.values():
            if flight.num_attempts >= at_attempt and not flight.future.done():
                flight.future.set_exception(error)

    async def _watch_for_stall(self) -> None:
        while True:
            await asyncio.sleep(self._stall_timeout_s / 10)
            silent_s = time.monotonic() - self._heard_at
            if self._child is not None and self._flights and silent_s > self._stall_timeout_s:
                log.error("the engine of model '%s' was silent for %.0f s; killing it", self._name, silent_s)
                self._child.process.kill()

    # -- messages --------------------------------------------------------------------------------------------------

    async def _read(self, child: "_Child") -> None:
        """Without a reader nobody would ever be answered: what it trips over ends the child, and so is made good."""
        try:
            await self._read_forever(child)
        except Exception:
            log.exception("a message of the engine of model '%s' cannot be handled; restarting it", self._name)
            child.process.kill()

    async def _read_forever(self, child: "_Child") -> None:
        while True:
            message = self._decoder.decode(await child.receive())
            self._heard_at = time.monotonic()
            match message:
                case Done():
                    self._resolve(message)
                case Batch(report):
                    self._listener.on_batch(report)
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


class _Child:
    """One child process and the sockets to it. A new child gets new sockets: nothing of the old one can arrive."""

    def __init__(
        self, process: asyncio.subprocess.Process, folder: str, sockets: tuple[zmq.asyncio.Socket, ...]
    ) -> None:
        self.process = process
        self.reader: asyncio.Task[None] | None = None
        self._folder = folder
        self._to_child, self._from_child = sockets
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._writer = asyncio.create_task(self._write())

    @classmethod
    async def spawn(cls, options: NativeOptions, log_options: Sequence[str]) -> "_Child":
        folder = tempfile.mkdtemp(prefix="rewardserve-")
        context = zmq.asyncio.Context.instance()
        sockets = tuple(context.socket(kind) for kind in (zmq.PUSH, zmq.PULL))
        for socket, name in zip(sockets, ("in", "out"), strict=True):
            socket.setsockopt(zmq.LINGER, 0)
            socket.set_hwm(0)  # admission bounds what is under way; a full pipe must not block the loop
            socket.bind(f"ipc://{folder}/{name}")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "rewardserve.engine.child", folder, str(os.getpid())),
            json.dumps(asdict(options)),
            *log_options,
        )
        return cls(process, folder, sockets)

    def send(self, message: bytes) -> None:
        """Never waits: a socket whose other end died takes nothing, and what is in flight goes to the next child."""
        self._outbox.put_nowait(message)

    async def _write(self) -> None:
        while True:
            await self._to_child.send(await self._outbox.get())

    async def receive(self) -> bytes:
        return await self._from_child.recv()

    async def end(self, stop_message: bytes, patience_s: float = 10.0) -> None:
        """Asks it to stop, and kills it if it does not."""
        self.send(stop_message)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.process.wait(), patience_s)
        await self.kill()

    async def kill(self) -> None:
        tasks = [task for task in (self.reader, self._writer) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
        self._to_child.close()
        self._from_child.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _cause(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return "ended because its device cannot go on" if code == POISONED_EXIT else f"ended with exit code {code}"
