"""What batch invariance costs: two engines side by side, one with it and one without, a round of each in turn.

Of great steps, whose products are not split anyway, and of small groups alone, whose would be.

How products are set up is read once in a process (engine/native/gpu.py), so each engine has one of its own, with the
variables in its environment from the start. Both are loaded once; while one computes the other is idle.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from model_figures import round_s
from part import Part
from plan import AS_SERVED
from rewardserve.engine.native.engine import NativeEngine
from served import ROUND_TOKENS, TINY, TRAFFIC, Traffic, made_model, running

GREAT, SMALL = "best_of_16", "one group of 256 + 4 x 64"
SMALL_GROUPS, SMALL_GROUPS_TINY = 20, 2  # of a round
ROUNDS, LEAST_S = 12, 8.0
CACHE_BYTES = 8 << 30  # of each: two share the GPU


def invariance(part: Part) -> None:
    engines = {invariant: _Engine(part, invariant) for invariant in (True, False)}
    try:
        ratios: dict[str, list[float]] = {GREAT: [], SMALL: []}
        for engine in engines.values():
            engine.wait()
        for number in range(1 + (2 if part.tiny else ROUNDS)):  # the first one warms up
            if part.left() < LEAST_S:
                break
            order = (True, False) if number % 2 else (False, True)
            for work, found in ratios.items():
                seconds = {invariant: engines[invariant].round(work) for invariant in order}
                if number:
                    found.append(seconds[True] / seconds[False])
                    part.note(ratios=ratios)
    finally:
        for engine in engines.values():
            engine.stop()
    costs = {f"{work} with batch invariance takes": _said(found) for work, found in ratios.items()}
    part.note(more=costs)
    part.say(f"{costs}")


def _said(ratios: list[float]) -> str:
    quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{quarters[1] - 1:+.2%}, quartiles {quarters[0] - 1:+.2%} to {quarters[2] - 1:+.2%}, {len(ratios)} rounds"


class _Engine:
    """A process that loads the model, and measures a round whenever it is asked to."""

    def __init__(self, part: Part, invariant: bool) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in AS_SERVED}
        environment |= AS_SERVED if invariant else {}
        arguments = [str(part.folder), str(part.device), "tiny" if part.tiny else "whole", str(int(invariant))]
        command = [sys.executable, __file__, *arguments]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def wait(self) -> None:
        """Until it is loaded."""
        self._answer()

    def round(self, work: str) -> float:
        """Seconds."""
        self._pipe(self._process.stdin).write(f"{work}\n")
        self._pipe(self._process.stdin).flush()
        return self._answer()

    def stop(self) -> None:
        self._pipe(self._process.stdin).close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _answer(self) -> float:
        for line in self._pipe(self._process.stdout):
            if line.startswith("{"):
                return json.loads(line)["seconds"]
        raise RuntimeError("an engine ended; what it said is in stderr")

    def _pipe(self, pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


async def _rounds(part: Part, folder: str, name: str, invariant: bool) -> None:
    options: dict[str, Any] = {} if part.tiny else {"prefix_cache_bytes": CACHE_BYTES}
    async with running(part, folder, batch_invariant=invariant, **options) as engine:
        print(json.dumps({"seconds": 0.0}), flush=True)
        for line in sys.stdin:
            work = {GREAT: _great_s, SMALL: _small_s}[line.strip()]
            print(json.dumps({"seconds": await work(part, engine, name)}), flush=True)


async def _great_s(part: Part, engine: NativeEngine, name: str) -> float:
    return await round_s(part, engine, TRAFFIC[GREAT], ROUND_TOKENS[name] // 2)


async def _small_s(part: Part, engine: NativeEngine, name: str) -> float:
    """One after the other: the median."""
    count = SMALL_GROUPS_TINY if part.tiny else SMALL_GROUPS
    return statistics.median([await round_s(part, engine, Traffic(256, 4, 64), 1) for _ in range(count)])


if __name__ == "__main__":
    where, device, size, invariant = sys.argv[1:]
    this = Part("invariance engine", Path(where), device, size == "tiny")
    of = TINY if this.tiny else "qwen3-0.6b"
    with made_model(this, of) as saved:
        asyncio.run(_rounds(this, saved, of, invariant == "1"))
