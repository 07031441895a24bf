"""One part of the benchmark under way."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HEAD_START = 1_000_000  # cycles: half a millisecond, more than any launch takes


class Part:
    """One part under way: where, on what, and what it has found so far."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, torch.device(device)
        self.on_gpu = device == "cuda"
        self.found: dict[str, Any] = {}

    def note(self, **found: Any) -> None:
        """Adds to the result and writes it down: whatever comes, this is known."""
        self.found.update(found)
        unfinished = self.folder / "result.json.tmp"
        unfinished.write_text(json.dumps(self.found))
        unfinished.replace(self.folder / "result.json")

    def say(self, text: str) -> None:
        print(f"    {text}", flush=True)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], object], at_least: float = 0.15) -> float:
        """Median of one, after three for warming up; on a GPU by its own clock, with no time of the host's in it."""
        for _ in range(3):
            action()
        self.wait()
        times: list[float] = []
        begun = time.perf_counter()
        while len(times) < 5 or time.perf_counter() - begun < at_least:
            if self.on_gpu:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(HEAD_START)  # or the GPU would wait for the launch, and that be counted
                start.record()
                action()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
            else:
                started = time.perf_counter()
                action()
                times.append(time.perf_counter() - started)
        return statistics.median(times)
