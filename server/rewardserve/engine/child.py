"""The engine's process: `python -m rewardserve.engine.child`, or a fork of engine/nursery.py.

Which engine runs in it is said by its arguments. Its modules are imported when it is known: the processes that vLLM
starts import this one again.
"""

import contextlib
import gc
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import msgspec
import psutil
import zmq

from rewardserve.engine.base import BatchReport, EngineInfo, EngineRequest, Outcome
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
    ToChild,
    ToParent,
    Updated,
    UpdateWeights,
)
from rewardserve.engine.native.options import NativeOptions
from rewardserve.engine.vllm_options import VllmOptions
from rewardserve.errors import LoadFailed, OptionsDoNotFit
from rewardserve.logs import set_up_logging

if TYPE_CHECKING:
    from rewardserve.engine.native.load import Loaded

LOADING_INTERVAL_S = 2.0
DESCENDANTS_END_S = 5.0
LAST_WORD_MS = 5000


class Loop(Protocol):
    """An engine on threads of its own. `submit` and `cancel` may be called from any thread."""

    def start(self) -> EngineInfo:
        """Blocks until the model is loaded. Raises LoadFailed."""

    def submit(self, request: EngineRequest) -> None: ...

    def cancel(self, request_id: str) -> None: ...

    def update_weights(self, source: str) -> Future[EngineInfo]: ...

    def ping(self, answer: Callable[[], None]) -> None:
        """Calls it, on any thread, once what computes is seen to come by: never, if it hangs."""


class MakeLoop(Protocol):
    def __call__(
        self,
        *,
        on_outcome: Callable[[Outcome], None],
        on_batch: Callable[[BatchReport], None],
        on_info: Callable[[EngineInfo], None],
        on_poisoned: Callable[[str], None],
    ) -> Loop: ...


class Child:
    """Receives on the main thread; the engine's threads send, one at a time."""

    def __init__(self, folder: str, engine: Callable[[], MakeLoop]) -> None:
        """`engine` imports what it needs, which takes seconds: it is called when the front hears of them."""
        self._engine = engine
        self._encoder_lock = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder()
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        self._inbox.connect(f"ipc://{folder}/in")
        self._outbox.connect(f"ipc://{folder}/out")

    def run(self) -> None:
        loaded = threading.Event()
        threading.Thread(target=self._say_loading, args=(loaded,), daemon=True).start()
        loop = self._engine()(
            on_outcome=lambda outcome: self._send(Done(outcome.request_id, outcome.result, outcome.expired)),
            on_batch=lambda report: self._send(Batch(report)),
            on_info=lambda info: self._send(Ready(info)),
            on_poisoned=lambda reason: os._exit(POISONED_EXIT),
        )
        try:
            info = loop.start()
        except LoadFailed as error:
            loaded.set()
            self._send(CannotLoad(str(error), isinstance(error, OptionsDoNotFit)))
            self._context.destroy(linger=LAST_WORD_MS)
            return
        loaded.set()
        # It stays. Looking through it for garbage takes a third of a second, in which no step is launched.
        gc.collect()
        gc.freeze()
        self._send(Ready(info))
        decoder = msgspec.msgpack.Decoder(ToChild)
        while True:
            match decoder.decode(self._inbox.recv()):
                case Score(request):
                    loop.submit(request)
                case Cancel(request_id):
                    loop.cancel(request_id)
                case UpdateWeights(source):
                    self._update_weights(loop, source)
                case Ping():
                    loop.ping(lambda: self._send(Pong()))
                case Stop():
                    _leave()

    def _update_weights(self, loop: Loop, source: str) -> None:
        def tell(done: Future[EngineInfo]) -> None:
            error = done.exception()
            if error is None:
                self._send(Updated(done.result(), ""))
            else:
                self._send(Updated(None, str(error)))

        update = loop.update_weights(source)
        update.add_done_callback(tell)
        threading.Thread(target=self._say_updating, args=(update,), daemon=True).start()

    def _say_loading(self, loaded: threading.Event) -> None:
        while not loaded.wait(LOADING_INTERVAL_S):
            self._send(Loading())

    def _say_updating(self, update: Future[EngineInfo]) -> None:
        """Weights are read for minutes, as at load, and no forward comes by that would answer pings."""
        while not wait([update], LOADING_INTERVAL_S).done:
            if update.running():
                self._send(Pong())

    def _send(self, message: ToParent) -> None:
        with self._encoder_lock:
            self._outbox.send(self._encoder.encode(message))


def _exit_with_parent(parent: int, folder: str) -> None:
    """An engine without its front would hold the device for nobody; `folder` of the sockets is nobody's then."""
    while os.getppid() == parent:
        time.sleep(1.0)
    shutil.rmtree(folder, ignore_errors=True)
    _leave()


def _leave() -> NoReturn:
    """At once: nothing is left to lose, and unwinding torch takes seconds.

    vLLM's processes would stay, so they go first.
    """
    processes = [p for p in psutil.Process().children(recursive=True) if not _ends_by_itself(p)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(processes, DESCENDANTS_END_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(0)


def _ends_by_itself(process: psutil.Process) -> bool:
    """It removes the shared memory that others leave behind, when all of them are gone."""
    try:
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return True


def import_native() -> None:
    """What a fork of this process need not import.

    There is no garbage in it, and looking for some on the way takes a seventh of the time.
    """
    gc.disable()
    try:
        import rewardserve.engine.native.load
        import rewardserve.engine.native.loop  # noqa: F401
    finally:
        gc.enable()


def _native(options: dict[str, Any], load: "Callable[[NativeOptions], Loaded] | None") -> MakeLoop:
    import_native()
    from rewardserve.engine.native.load import load_runner
    from rewardserve.engine.native.loop import EngineLoop

    native = NativeOptions(**options)
    return partial(EngineLoop, partial(load or load_runner, native), native.max_batch_sequences)


def _vllm(options: dict[str, Any]) -> MakeLoop:
    from rewardserve.engine.vllm_engine import VllmLoop
    from rewardserve.engine.vllm_load import load

    return partial(VllmLoop, partial(load, VllmOptions(**options)))


def run(arguments: Sequence[str], load: "Callable[[NativeOptions], Loaded] | None" = None) -> None:
    """Until the front says that it is over, or its parent ends. `arguments`: ChildProcess.spawn's and the parent's pid.

    `load` makes the native engine's runner; a benchmark of all but the model brings its own.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # they are the front's to handle: it drains first
        signal.signal(number, signal.SIG_IGN)
    folder, engine, text, log_format, log_level, name, parent = arguments
    threading.Thread(target=_exit_with_parent, args=(int(parent), folder), daemon=True).start()
    set_up_logging(log_format, log_level, f"engine[{name}]")
    with contextlib.suppress(OSError):  # what `ps -e` and `top` show: a fork has the command line of its parent
        Path("/proc/self/comm").write_text(f"engine[{name}]")
    options = json.loads(text)
    Child(folder, partial(_vllm, options) if engine == VllmOptions.engine else partial(_native, options, load)).run()


if __name__ == "__main__":
    run(sys.argv[1:])
