"""Programs of tests, each in a process of its own, forked from one that has imported what all of them need.

The import takes seconds. They are processes, as what is pretended and what is interpreted stay so for good.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

TIMEOUT_S = 280
PARENT = """
import json, os, sys, traceback

exec(sys.argv[1])
for line in sys.stdin:
    program, arguments, stdout, stderr = json.loads(line)
    if (pid := os.fork()) == 0:
        code = 1
        try:
            for descriptor, path in ((1, stdout), (2, stderr)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
            sys.argv[1:] = arguments
            exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forks:
    """`with Forks("import torch", {"NAME": "1"}) as forks:` -> `forks.run(program, *arguments)`, what it prints.

    Its environment is this process's with those; what lies beside this file can be imported.
    """

    def __init__(self, imports: str, environment: Mapping[str, str]) -> None:
        self._command = [sys.executable, "-W", "ignore", "-c", PARENT, imports]
        path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
        self._environment = {**os.environ, "PYTHONPATH": path, **environment}

    def __enter__(self) -> "Forks":
        self._parent = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
            process_group=0,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._parent.communicate()  # its input ends, and so does it

    def run(self, program: str, *arguments: str) -> str:
        assert self._parent.stdin is not None and self._parent.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("stdout", "stderr")]
            hung = threading.Timer(TIMEOUT_S, self._kill)
            hung.start()
            try:
                self._parent.stdin.write(json.dumps([program, arguments, *map(str, files)]) + "\n")
                self._parent.stdin.flush()
                code = self._parent.stdout.readline()
            finally:
                hung.cancel()
            stdout, stderr = (file.read_text() if file.exists() else "" for file in files)
        assert code == "0\n", f"it ended with {code.strip() or 'its parent'}: {stderr[-3000:]}"
        return stdout

    def _kill(self) -> None:
        os.killpg(self._parent.pid, signal.SIGKILL)
