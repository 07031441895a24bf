"""How the benchmark speaks to a provider: one JSON object per line, a request and its reply. Standard library only.

It runs in every peer's own environment. `python -m peers.NAME` reads requests from its standard input:

    {"do": "load", "model": FOLDER, "device": "cpu", "dtype": "bfloat16", "threads": 2, "max_length": 8192,
     "cache_bytes": 2147483648}                        -> {"versions": {...}}
    {"do": "score", "file": FILE}                      -> {"scores": [[...], ...], "seconds": 1.5}
    {"do": "latency", "file": FILE, "groups": 8}       -> {"seconds": [0.1, ...]}   one group at a time, nothing else
    {"do": "memory"}                                   -> {"peak_bytes": ...}       since the last "memory"
    {"do": "rates"}                                    -> {"flops_per_s": {"768x2304": ...}}   of the machine itself
    {"do": "quit"}

FILE holds [[prompt ids, [ids of a response, ...]], ...]. Reading it and bringing it into the provider's own form is not
timed. A request that fails is answered with {"error": "..."}.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TextIO

Groups = list[tuple[list[int], list[list[int]]]]  # [group] prompt ids, [response] ids
Scores = list[list[float]]  # [group][response]


class CannotServe(Exception):
    """This provider cannot score such a model. The message is what the table says."""


@dataclass(frozen=True)
class Job:
    """What to load, and what it may use."""

    model: str  # folder
    device: str  # "cpu" or "cuda"
    dtype: str  # "bfloat16" or "float32"
    threads: int
    max_length: int  # tokens of prompt + response
    cache_bytes: int  # for keys and values, where the provider has a cache


class Peer(Protocol):
    def load(self, job: Job) -> dict[str, str]:
        """Returns the versions of what computes. Raises CannotServe."""

    def prepare(self, groups: Groups) -> Any:
        """The same work in the provider's own form."""

    def score(self, prepared: Any) -> Scores:
        """All groups at once, in the order given."""

    def processes(self) -> list[int]:
        """Whose memory counts."""

    def close(self) -> None: ...


class OneProcess:
    """What most peers have in common: this process and its children compute, and nothing need be closed."""

    def processes(self) -> list[int]:
        return process_tree(os.getpid())

    def close(self) -> None:
        pass


def serve(peer: Peer) -> None:
    """Answers requests until "quit" or the end of the input."""
    with _private_output() as replies:
        try:
            for line in sys.stdin:
                request = json.loads(line)
                if request["do"] == "quit":
                    break
                print(json.dumps(_reply(peer, request)), file=replies, flush=True)
        finally:
            peer.close()


def _reply(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return _answer(peer, request)
    except Exception as error:  # whatever a foreign library raises
        traceback.print_exc()
        kind = "" if isinstance(error, CannotServe) else f"{type(error).__name__}: "
        return {"error": f"{kind}{error}".split("\n")[0]}


@contextlib.contextmanager
def _private_output() -> Iterable[TextIO]:
    """The true standard output; what libraries print to it goes to standard error instead."""
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        yield replies


def _answer(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    match request.pop("do"):
        case "load":
            return {"versions": peer.load(Job(**{field.name: request[field.name] for field in fields(Job)}))}
        case "score":
            prepared = peer.prepare(_read(request["file"]))
            started = time.perf_counter()
            scores = peer.score(prepared)
            return {"scores": scores, "seconds": time.perf_counter() - started}
        case "latency":
            return {"seconds": [_latency(peer, group) for group in _read(request["file"])[: request["groups"]]]}
        case "rates":
            return {"flops_per_s": peer.rates()}
        case "memory":
            peak = peak_bytes(peer.processes())
            reset_peaks(peer.processes())
            return {"peak_bytes": peak}
        case other:
            raise ValueError(f"unknown request {other!r}")


def _latency(peer: Peer, group: tuple[list[int], list[list[int]]]) -> float:
    prepared = peer.prepare([group])
    started = time.perf_counter()
    peer.score(prepared)
    return time.perf_counter() - started


def _read(file: str) -> Groups:
    return [(prompt, responses) for prompt, responses in json.loads(Path(file).read_text())]


def rows_of(groups: Groups) -> list[list[int]]:
    """Prompt + response of every pair."""
    return [prompt + response for prompt, responses in groups for response in responses]


def grouped(scores: Iterable[float], groups: Groups) -> Scores:
    """The scores of `rows_of(groups)` in the form of the groups."""
    remaining = iter(scores)
    return [[float(next(remaining)) for _ in responses] for _, responses in groups]


def process_tree(pid: int) -> list[int]:
    """The process and all it started."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    tree = [pid]
    for each in tree:
        tree += children.get(each, [])
    return tree


def peak_bytes(pids: Iterable[int]) -> int:
    """Peak resident memory since `reset_peaks`, summed. Pages that processes share are counted in each."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return total


def reset_peaks(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):  # a kernel that forbids it: the peak is then that of the whole run
            Path(f"/proc/{pid}/clear_refs").write_text("5")
