"""The process that engines on CPUs are forked from: `python -m rewardserve.engine.nursery PARENT`.

What an engine imports takes seconds and some 300 MB. It is imported here, once; a fork has it at once, and shares the
memory. Started by engine/nursery_process.py, which writes a line for each engine, its arguments as JSON, and reads one
when it has begun and one when it has ended. When the front is gone, so is this one, and engines go with their parent.

Nothing is computed here: a fork has only the thread that forked, and whatever other threads held stays held.
"""

import contextlib
import gc
import json
import os
import select
import shutil
import signal
import sys
import traceback
from typing import Any, NoReturn

from rewardserve.engine import child

STDIN, STDOUT, STDERR = 0, 1, 2


class Nursery:
    """Forks on request, and reports the ends of its children. On one thread."""

    def __init__(self, requests: int, answers: int) -> None:
        """Descriptors of pipes."""
        self._requests = requests
        self._answers = answers
        self._unread = b""
        self._signals, self._signalled = os.pipe()
        os.set_blocking(self._signalled, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._signalled, warn_on_full_buffer=False)

    def run(self) -> None:
        """Until the front closes its end."""
        while True:
            ready, _, _ = select.select([self._requests, self._signals], [], [])
            if self._signals in ready:
                os.read(self._signals, 4096)
                self._report_ended()
            if self._requests in ready:
                read = os.read(self._requests, 1 << 16)
                if not read:
                    return
                *lines, self._unread = (self._unread + read).split(b"\n")
                for line in lines:
                    self._fork(json.loads(line))

    def _report_ended(self) -> None:
        with contextlib.suppress(ChildProcessError):  # none is left
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self._answer({"ended": ended[0], "code": os.waitstatus_to_exitcode(ended[1])})

    def _fork(self, arguments: list[str]) -> None:
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            self._answer({"failed": str(error)})
            return
        if pid == 0:
            self._be_engine([*arguments, str(parent)])
        self._answer({"begun": pid})

    def _answer(self, answer: dict[str, Any]) -> None:
        os.write(self._answers, json.dumps(answer).encode() + b"\n")

    def _be_engine(self, arguments: list[str]) -> NoReturn:
        code = 1
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for descriptor in (self._answers, self._signals, self._signalled):
                os.close(descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), self._requests)
            child.run(arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)  # what waits further up is the nursery's


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they are the front's to handle
        signal.signal(number, signal.SIG_IGN)
    answers = os.dup(STDOUT)
    os.dup2(STDERR, STDOUT)  # what a library prints is no answer
    child.import_native()
    if os.getppid() != int(sys.argv[1]):  # the front ended meanwhile, and what it asked for is nobody's
        for line in sys.stdin:
            shutil.rmtree(json.loads(line)[0], ignore_errors=True)
        return
    gc.collect()
    gc.freeze()  # a collection in a fork writes to each object it looks at, and then nothing is shared
    with contextlib.suppress(BrokenPipeError):  # the front is gone
        Nursery(STDIN, answers).run()


if __name__ == "__main__":
    main()
    os._exit(0)  # at once: what is imported ends with pages of its own about what it leaves behind
