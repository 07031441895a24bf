"""A real server in a process of its own, as a user starts it."""

import re
import signal
import subprocess
import sys
import threading
from types import TracebackType

LISTENING = re.compile(r"listening on (\S+):(\d+), metrics on port (\w+)")


class ServerProcess:
    """`with ServerProcess("name=folder", "--flag", ...) as server:` waits until it is ready; stops it at the end."""

    def __init__(self, model: str, *flags: str) -> None:
        self._command = [sys.executable, "-m", "rewardserve", "serve", "--model", model, "--threads", "1"]
        self._command += ["--port", "0", "--metrics-port", "0", "--prefix-cache-mb", "64", *flags]
        self.log: list[str] = []
        self.endpoint = ""
        self.metrics_url = ""

    def __enter__(self) -> "ServerProcess":
        self.process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if match := LISTENING.search(line):
                self.endpoint = f"{match[1]}:{match[2]}"
                self.metrics_url = f"http://{match[1]}:{match[3]}/metrics"
            if line.endswith("ready\n"):
                break
        else:
            raise RuntimeError(f"the server did not start:\n{''.join(self.log)}")
        self._reader = threading.Thread(target=self._read_on, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _read_on(self) -> None:
        """A full pipe would stop the server."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
