"""`make demo`: serves the bundled reward model over gRPC, has it rank the answers in demo.jsonl, and stops it again."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
REWARDSERVE = (sys.executable, "-m", "rewardserve")
LISTENING = re.compile(r"listening on (\S+:\d+)")


def main() -> int:
    with served("--model", f"demo={HERE / 'demo_model'}") as endpoint:
        return subprocess.call([*REWARDSERVE, "rank", "--endpoint", endpoint, "--input", str(HERE / "demo.jsonl")])


@contextlib.contextmanager
def served(*flags: str) -> Iterator[str]:
    """Where a server with these flags listens, once it is ready; it is stopped in the end."""
    server = subprocess.Popen(
        [*REWARDSERVE, "serve", *flags, "--port", "0", "--metrics-port", "-1"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    try:
        yield wait_until_ready(server)
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate()


def wait_until_ready(server: subprocess.Popen[str]) -> str:
    """Passes on what the server logs until it is ready; returns where it listens."""
    endpoint = ""
    assert server.stderr is not None
    for line in server.stderr:
        print(line, end="", file=sys.stderr)
        if match := LISTENING.search(line):
            endpoint = match[1]
        if line.endswith("ready\n"):
            return endpoint
    raise SystemExit(f"the server ended with exit code {server.wait()} before it was ready")


if __name__ == "__main__":
    raise SystemExit(main())
