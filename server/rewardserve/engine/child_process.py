"""A child process that holds an engine, and the sockets to it."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict

import zmq

from rewardserve.engine.launch import Launcher, Running
from rewardserve.engine.native.options import NativeOptions
from rewardserve.engine.vllm_options import VllmOptions

RETRY_SEND_S = 0.01
MESSAGES_AT_ONCE = 64
DESCENDANTS_END_S = 5.0


class ChildProcess:
    """One child process and the sockets to it. A new child gets new sockets: nothing of the old one can arrive.

    The sockets are zmq's plain ones, watched by the event loop: zmq.asyncio makes futures and timers for each message,
    several times the cost of moving it.
    """

    def __init__(
        self, process: Running, folder: str, to_child: zmq.Socket[bytes], from_child: zmq.Socket[bytes]
    ) -> None:
        self.process = process
        self._folder = folder
        self._to_child, self._from_child = to_child, from_child
        self._outbox: deque[bytes] = deque()
        self._retry: asyncio.TimerHandle | None = None
        self._hear: Callable[[bytes], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._from_child.FD, self._on_readable)

    @classmethod
    async def spawn(
        cls,
        launcher: Launcher,
        options: NativeOptions | VllmOptions,
        log_options: Sequence[str],
    ) -> "ChildProcess":
        """Raises EngineDied or OSError when none can be started."""
        folder = _folder_for_sockets()
        sockets: list[zmq.Socket[bytes]] = []
        try:
            for kind, name in ((zmq.PUSH, "in"), (zmq.PULL, "out")):
                socket = zmq.Context.instance().socket(kind)
                sockets.append(socket)
                socket.setsockopt(zmq.LINGER, 0)
                socket.set_hwm(0)  # admission bounds what is under way; a full pipe must not block the loop
                socket.bind(f"ipc://{folder}/{name}")
            process = await launcher.launch((folder, options.engine, json.dumps(asdict(options)), *log_options))
        except BaseException as error:  # cancelled, too: a model may be unloaded while its engine is restarted
            for socket in sockets:
                socket.close()
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, zmq.ZMQError):
                raise OSError(error.errno, f"no socket for an engine: {error}") from error
            raise
        return cls(process, folder, *sockets)

    def send(self, message: bytes) -> None:
        """Never waits: a socket whose other end died takes nothing, and what is in flight goes to the next child."""
        self._outbox.append(message)
        if self._retry is None:
            self._flush()

    def _flush(self) -> None:
        self._retry = None
        try:
            while self._outbox:
                self._to_child.send(self._outbox[0], zmq.NOBLOCK)
                self._outbox.popleft()
        except zmq.Again:  # nobody is connected: not yet, or not any more
            self._retry = self._loop.call_later(RETRY_SEND_S, self._flush)

    def listen(self, hear: Callable[[bytes], None]) -> None:
        """Every message from now on, those already here first."""
        self._hear = hear
        self.drain()

    def drain(self) -> None:
        """Hands over all that has arrived: zmq's descriptor tells only of what comes after."""
        while self._take_one():
            pass

    def _on_readable(self) -> None:
        """The same in parts, for the event loop has others to serve."""
        for _ in range(MESSAGES_AT_ONCE):
            if not self._take_one():
                return
        self._loop.call_soon(self._on_readable)

    def _take_one(self) -> bool:
        if self._hear is None:
            return False
        try:
            message = self._from_child.recv(zmq.NOBLOCK)
        except zmq.Again:
            return False
        self._hear(message)
        return True

    async def next_message(self) -> bytes:
        first: asyncio.Future[bytes] = self._loop.create_future()

        def hear(message: bytes) -> None:
            self._hear = None  # what follows waits for `listen`
            first.set_result(message)

        self.listen(hear)
        try:
            return await first
        finally:
            self._hear = None

    async def end(self, stop_message: bytes, patience_s: float = 10.0) -> None:
        """Asks it to stop, and kills it if it does not."""
        self.send(stop_message)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.process.wait(), patience_s)
        await self.kill()

    def strike(self) -> None:
        """Ends the process, if it is still there; `process.wait` tells."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def kill(self) -> None:
        if self._from_child.closed:
            return
        self._hear = None
        self._loop.remove_reader(self._from_child.FD)
        if self._retry is not None:
            self._retry.cancel()
        if self.process.returncode is None:
            self.strike()
            await self.process.wait()
        await _end_session(self.process.pid)
        self._to_child.close()
        self._from_child.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _folder_for_sockets() -> str:
    """In /tmp where TMPDIR, as a batch job's may be, is longer than the path of a socket."""
    folder = tempfile.mkdtemp(prefix="rewardserve-")
    if len(os.fsencode(f"{folder}/out")) <= zmq.IPC_PATH_MAX_LEN:
        return folder
    os.rmdir(folder)
    return tempfile.mkdtemp(prefix="rewardserve-", dir="/tmp")


async def _end_session(leader: int) -> None:
    """Of a leader that is dead: vLLM's processes outlive it, and would hold the device that the next one needs.

    They are asked first, for then they remove what they shared.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + DESCENDANTS_END_S
        try:
            os.killpg(leader, number)
            while time.monotonic() < deadline:
                _reap(leader)
                os.killpg(leader, 0)
                await asyncio.sleep(0.05)
        except ProcessLookupError:  # nobody is left
            return


def _reap(group: int) -> None:
    """Those of its processes that have become this one's children, as orphans in a container may."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
