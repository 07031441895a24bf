"""The engine's process: `python -m rewardserve.engine.child`, started by engine/process.py and by nobody else."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable

import msgspec
import zmq

from rewardserve.engine.messages import (
    POISONED_EXIT,
    Batch,
    Cancel,
    CannotLoad,
    Done,
    Loading,
    Ready,
    Score,
    Stop,
    ToChild,
    ToParent,
)
from rewardserve.engine.native.engine import EngineLoop
from rewardserve.engine.native.load import Loaded, load_runner
from rewardserve.engine.native.options import NativeOptions
from rewardserve.errors import LoadFailed
from rewardserve.logs import set_up_logging

LOADING_INTERVAL_S = 2.0


class Child:
    """Receives on the main thread; the engine's threads send, one at a time."""

    def __init__(
        self, folder: str, options: NativeOptions, load: Callable[[NativeOptions], Loaded] = load_runner
    ) -> None:
        self._options = options
        self._load = load
        self._encoder_lock = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder()
        context = zmq.Context()
        self._inbox = context.socket(zmq.PULL)
        self._outbox = context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        self._inbox.connect(f"ipc://{folder}/in")
        self._outbox.connect(f"ipc://{folder}/out")

    def run(self) -> None:
        loop = EngineLoop(
            lambda: self._load(self._options),
            self._options.max_batch_sequences,
            on_outcome=lambda outcome: self._send(Done(outcome.request_id, outcome.result, outcome.expired)),
            on_batch=lambda report: self._send(Batch(report)),
            on_info=lambda info: self._send(Ready(info)),
            on_poisoned=lambda reason: os._exit(POISONED_EXIT),
        )
        loaded = threading.Event()
        threading.Thread(target=self._say_loading, args=(loaded,), daemon=True).start()
        try:
            info = loop.start()
        except LoadFailed as error:
            loaded.set()
            self._send(CannotLoad(str(error)))
            self._outbox.close(linger=5000)
            return
        loaded.set()
        self._send(Ready(info))
        decoder = msgspec.msgpack.Decoder(ToChild)
        while True:
            match decoder.decode(self._inbox.recv()):
                case Score(request):
                    loop.submit(request)
                case Cancel(request_id):
                    loop.cancel(request_id)
                case Stop():
                    os._exit(0)  # nothing is left to lose, and unwinding torch takes seconds

    def _say_loading(self, loaded: threading.Event) -> None:
        while not loaded.wait(LOADING_INTERVAL_S):
            self._send(Loading())

    def _send(self, message: ToParent) -> None:
        with self._encoder_lock:
            self._outbox.send(self._encoder.encode(message))


def _exit_with_parent(parent: int, folder: str) -> None:
    """An engine without its front would hold the device for nobody; `folder` of the sockets is nobody's then."""
    while os.getppid() == parent:
        time.sleep(1.0)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def main(load: Callable[[NativeOptions], Loaded] = load_runner) -> None:
    """`load` makes the runner; a benchmark of all but the model brings its own."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they are the front's to handle: it drains first
        signal.signal(number, signal.SIG_IGN)
    folder, parent, options, log_format, log_level, name = sys.argv[1:]
    threading.Thread(target=_exit_with_parent, args=(int(parent), folder), daemon=True).start()
    set_up_logging(log_format, log_level, f"engine[{name}]")
    Child(folder, NativeOptions(**json.loads(options)), load).run()


if __name__ == "__main__":
    main()
