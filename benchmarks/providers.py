"""The providers that can be measured, each a process of its own, in its own environment."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from peers.protocol import Job, Scores
from rewardserve.engine.environment import engine_environment

HERE = Path(__file__).parent
VENVS = HERE / ".venvs"


class NotMade(Exception):
    """A peer's environment is missing. The message says how to make it."""


class ProviderFailed(Exception):
    """It cannot do what was asked, in its own words."""


@dataclass(frozen=True, slots=True)
class Provider:
    """How to start one: `module` is run by the Python of `venv`, the benchmark's own if it has none."""

    module: str
    arguments: tuple[str, ...] = ()
    venv: str = ""
    ours: bool = False
    is_engine: bool = False  # ours, without the process that would start it
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def python(self) -> str:
        """Raises NotMade."""
        if not self.venv:
            return sys.executable
        folder = VENVS / self.venv
        if not (folder / "made").exists():
            raise NotMade(f"{self.venv} has no environment yet: run `make peers`, or leave it out with --providers")
        return str(folder / "bin" / "python")


PROVIDERS = {
    "rewardserve_engine": Provider("peers.engine", ours=True, is_engine=True),
    "rewardserve_grpc": Provider("peers.over_grpc", ours=True),
    "vllm": Provider("peers.vllm", venv="vllm", devices=("cpu",)),
    "hf_padded": Provider("peers.hf", ("padded",)),
    "hf_sorted": Provider("peers.hf", ("sorted",)),
    "infinity": Provider("peers.infinity", venv="infinity"),
}
REFERENCE = Provider("peers.hf", ("exact",))
MACHINE = Provider("peers.machine")


def require(names: Iterable[str]) -> None:
    """Raises NotMade if one has no environment, before anything is loaded."""
    for name in names:
        _ = PROVIDERS[name].python


class Running:
    """A provider's process, on the cores of this one. What it says beside the protocol goes to `log`."""

    def __init__(self, provider: Provider, threads: int, log: Path) -> None:
        python = provider.python
        self._log = log
        self._log_file = log.open("w")
        self._process = subprocess.Popen(
            [python, "-m", provider.module, *provider.arguments],
            cwd=HERE,
            env=_environment(threads, provider.is_engine),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            text=True,
        )

    def load(self, job: Job) -> dict[str, str]:
        """Versions of what computes."""
        return self._ask("load", **dataclasses.asdict(job))["versions"]

    def score(self, file: Path) -> tuple[Scores, float]:
        """Scores, and the seconds they took."""
        reply = self._ask("score", file=str(file))
        return reply["scores"], reply["seconds"]

    def latencies(self, file: Path, num_groups: int) -> list[float]:
        """Seconds of each group, alone."""
        return self._ask("latency", file=str(file), groups=num_groups)["seconds"]

    def peak_bytes(self) -> int:
        """Since the last time it was asked."""
        return self._ask("memory")["peak_bytes"]

    def rates(self) -> dict[str, float]:
        """FLOP/s of each linear. The machine's only."""
        return self._ask("rates")["flops_per_s"]

    def _ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Raises ProviderFailed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise ProviderFailed(f"its process ended with {self._process.wait()}; see {self._log}")
        reply = json.loads(line)
        if "error" in reply:
            raise ProviderFailed(reply["error"])
        return reply

    def __enter__(self) -> "Running":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Asks it to end, and ends it if it does not."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write('{"do": "quit"}\n')
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log_file.close()


def _environment(threads: int, is_engine: bool) -> dict[str, str]:
    return {
        **os.environ,
        **(engine_environment("native", False, os.environ) if is_engine else {}),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
