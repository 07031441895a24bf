"""One part of the benchmark under way."""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

WARM_UPS = 3
TIMED_S = 1e-3  # between two events: what they cost themselves, microseconds, is then nothing
MOST_LAUNCHES = 256  # a GPU's queue holds a thousand
PROBED = 8  # launches, to find out how many make TIMED_S
HEAD_START_S = 5e-4  # more than an event and a first launch take
CYCLES_PER_S = 2e9  # of a GPU, at most
PASSES_CACHE = 1 << 28  # bytes, in turns: what comes up again is not in the GPU's cache any more


class Part:
    """One part under way: where, on what, and what it has found so far."""

    def __init__(self, name: str, folder: Path, device: str, tiny: bool, seconds: float = math.inf) -> None:
        """With `tiny` everything is as small as it can be: it is tried out. In `seconds` it is to be done."""
        self.name, self.folder, self.device, self.tiny = name, folder, torch.device(device), tiny
        self.on_gpu = self.device.type == "cuda"
        self.found: dict[str, Any] = {}
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until it will be stopped."""
        return self._end - time.monotonic()

    def note(self, **found: Any) -> None:
        """Adds to the result and writes it down: whatever comes, this is known."""
        self.found.update(found)
        unfinished = self.folder / f"{self.name}.json.tmp"
        unfinished.write_text(json.dumps(self.found))
        unfinished.replace(self.folder / f"{self.name}.json")

    def of(self, name: str) -> dict[str, Any]:
        """What another part has found; empty if it did not run."""
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def say(self, text: str) -> None:
        print(f"    {text}", flush=True)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], object], at_least: float = 0.15) -> float:
        """Median of one, after some for warming up; on a GPU by its own clock, with no time of the host's in it."""
        for _ in range(WARM_UPS):
            action()
        self.wait()
        launches, head_start = self._launches(action) if self.on_gpu else (1, 0.0)
        times: list[float] = []
        begun = time.perf_counter()
        while not times or (not self.tiny and (len(times) < 5 or time.perf_counter() - begun < at_least)):
            if self.on_gpu:
                times.append(_between_events(action, launches, head_start))
            else:
                started = time.perf_counter()
                action()
                times.append(time.perf_counter() - started)
        return statistics.median(times)

    def _launches(self, action: Callable[[], object]) -> tuple[int, float]:
        """How many to put between two events, and the seconds the host needs to queue them, twice over."""
        probed = 1 if self.tiny else PROBED
        begun = time.perf_counter()
        for _ in range(probed):
            action()
        host = 2 * (time.perf_counter() - begun) / probed
        self.wait()
        each = _between_events(action, probed, probed * host + HEAD_START_S)
        launches = min(probed if self.tiny else MOST_LAUNCHES, max(1, math.ceil(TIMED_S / each)))
        return launches, launches * host + HEAD_START_S


def _between_events(action: Callable[[], object], launches: int, head_start: float) -> float:
    """Seconds of one of `launches`, one after the other on the GPU, which sleeps until the host has queued them all."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(head_start * CYCLES_PER_S))
    start.record()
    for _ in range(launches):
        action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / launches


def in_turns(part: Part, make: Callable[[], Any]) -> Iterator[Any]:
    """What `make` makes, a tensor or a list of them, again and again: as many as pass the GPU's cache."""
    first = make()
    nbytes = sum(tensor.nbytes for tensor in (first if isinstance(first, list) else [first]))
    count = 2 if part.tiny else min(64, max(2, -(-PASSES_CACHE // nbytes)))
    return cycle([first, *(make() for _ in range(count - 1))])
