"""Engines as forks of one process that has imported what they need (engine/nursery.py), for engines on CPUs.

An engine's start is then the loading of its model: restarts, swaps and further models do without seconds of imports,
which on a CPU are taken from those who are served meanwhile. Not on GPUs: CUDA does not outlive a fork, so nothing
imported may have touched it, and there a start is weights and kernels in any case.

Unlike multiprocessing's forkserver it waits without blocking the event loop, has an environment of its own, and nothing
of it waits when this process ends.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewardserve.engine.launch import Running
from rewardserve.errors import EngineDied

log = logging.getLogger(__name__)

NURSERY_PROGRAM = (sys.executable, "-m", "rewardserve.engine.nursery")
# numpy and scipy bring a BLAS each that starts threads when it is imported. The engine computes with torch.
SINGLE_THREADED = {"OPENBLAS_NUM_THREADS": "1"}
GPUS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # of NVIDIA's driver, of WSL's, of AMD's
BEGINS_WITHIN_S = 600.0  # imports from a network's disk take long, but not for ever


def is_on_cpu(device: str) -> bool:
    """For certain, as far as can be told without torch."""
    return device == "cpu" or (device == "auto" and not any(map(os.path.exists, GPUS)))


class Forked:
    """An engine's process, a child of the nursery."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._has_ended = asyncio.Event()

    async def wait(self) -> int:
        await self._has_ended.wait()
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.returncode is not None:
            raise ProcessLookupError
        os.kill(self.pid, signal.SIGKILL)

    def ended(self, code: int) -> None:
        self.returncode = code
        self._has_ended.set()


@dataclass(slots=True)
class _Process:
    """One life of the nursery, and whose parent it is."""

    process: asyncio.subprocess.Process
    beginning: deque[asyncio.Future[Forked]] = field(default_factory=deque)  # answered in the order of the requests
    forked: dict[int, Forked] = field(default_factory=dict)

    def hear(self, answer: dict[str, Any]) -> None:
        match answer:
            case {"ended": pid, "code": code}:
                if (ended := self.forked.pop(pid, None)) is not None:  # else what it imports has children of its own
                    ended.ended(code)
            case {"begun": pid}:
                forked = self.forked[pid] = Forked(pid)
                future = self.beginning.popleft()
                if future.cancelled():
                    _kill(forked)
                else:
                    future.set_result(forked)
            case {"failed": reason}:
                self._fail(self.beginning.popleft(), f"no process can be forked for an engine: {reason}")

    def died(self, code: int) -> None:
        """Engines leave without it, within a second; they are not waited for."""
        while self.beginning:
            self._fail(self.beginning.popleft(), f"the process that engines are forked from ended with code {code}")
        for forked in self.forked.values():
            _kill(forked)
            forked.ended(-signal.SIGKILL)

    @staticmethod
    def _fail(future: asyncio.Future[Forked], reason: str) -> None:
        if not future.done():
            future.set_exception(EngineDied(reason))


class Nursery:
    """The Launcher of engines on CPUs. Its process is started with the first, and again should it die."""

    def __init__(self, environment: Mapping[str, str], program: Sequence[str] = NURSERY_PROGRAM) -> None:
        """`environment` is what engines have besides this process's."""
        self._environment = {**SINGLE_THREADED, **environment}
        self._program = tuple(program)
        self._now: _Process | None = None
        self._starting = asyncio.Lock()
        self._readers: set[asyncio.Task[None]] = set()

    async def launch(self, arguments: Sequence[str]) -> Running:
        async with self._starting:
            if self._now is None:
                self._now = await self._start()
            now = self._now
        future: asyncio.Future[Forked] = asyncio.get_running_loop().create_future()
        now.beginning.append(future)
        assert now.process.stdin is not None
        now.process.stdin.write(json.dumps(list(arguments)).encode() + b"\n")
        try:
            async with asyncio.timeout(BEGINS_WITHIN_S):
                return await future
        except TimeoutError:
            _kill(now.process)
            raise EngineDied(f"what engines are forked from was silent for {BEGINS_WITHIN_S:.0f} s") from None
        except asyncio.CancelledError:
            if not future.cancelled() and future.exception() is None:  # it began, and nobody has it
                _kill(future.result())
            raise

    async def stop(self) -> None:
        """After its engines."""
        if self._now is None:
            return
        _kill(self._now.process)  # it has nothing to lose, and may be in the middle of its imports
        await asyncio.gather(*self._readers)

    async def _start(self) -> _Process:
        process = await asyncio.create_subprocess_exec(
            *self._program,
            str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, **self._environment},
        )
        now = _Process(process)
        reader = asyncio.create_task(self._read(now))
        self._readers.add(reader)
        reader.add_done_callback(self._readers.discard)
        return now

    async def _read(self, now: _Process) -> None:
        assert now.process.stdout is not None
        try:
            async for line in now.process.stdout:
                now.hear(json.loads(line))
        except Exception:
            log.exception("what engines are forked from cannot be understood; it and they are started anew")
            _kill(now.process)
        if self._now is now:
            self._now = None
        now.died(await now.process.wait())


def _kill(process: Running) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
