"""How much memory does one very long item take? It must not grow with the square of the length.

    python benchmarks/memory.py [--lengths 4096 8192 16384 32768] [--threads 2]

Every length has a process of its own: resident memory once the model is loaded (weights, pool of keys and values,
interpreter, libraries), and the peak while the item is scored. One step's activations are what the item's last forward,
which sees the most keys, allocates at most at a time, workspace included; a second process adds that up from the
allocator's own events.
The peak must stay under what was loaded + 1.2 x one step's activations. Writes
benchmarks/results/memory_cpu.json.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import random_model
import report
from rewardserve.engine.environment import engine_environment
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # it is loaded in the children only
    import torch

HERE = Path(__file__).parent
CACHE = HERE / ".cache"
RESULT = HERE / "results" / "memory_cpu.json"
POOL_BYTES = 1 << 30
SLACK = 1.2


def main() -> int:
    options = _options()
    if options.probe:
        print(json.dumps(_probe(options.probe, options.folder, options.threads, options.trace)))
        return 0
    folder = _stretched(random_model.make("qwen3-100m", CACHE, None), max(options.lengths))
    rows = []
    for length in options.lengths:
        print(f"{length} tokens ...", file=sys.stderr, flush=True)
        rows.append(_measure(length, folder, options.threads))
    _print(rows)
    RESULT.write_text(json.dumps(_result(rows, options.threads), indent=1) + "\n")
    print(f"written to {RESULT.relative_to(HERE.parent)}")
    worst = max(row["peak"] / row["bound"] for row in rows)
    if worst > 1:
        print(f"the peak is {worst:.2f} x what it may be", file=sys.stderr)
    return int(worst > 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="tokens of the item")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--probe", type=int, help=argparse.SUPPRESS)  # the child's: the item's tokens, ...
    parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _stretched(model: Path, length: int) -> Path:
    """The same weights under a config that takes `length` tokens: rotary positions need no weights."""
    target = model.with_name(f"{model.name}-{length}")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text())
    config["max_position_embeddings"] = length
    (target / "config.json").write_text(json.dumps(config))
    return target


def _measure(length: int, folder: Path, threads: int) -> dict[str, float]:
    """Bytes, of one length."""
    plain, traced = (_in_child(length, folder, threads, trace) for trace in (False, True))
    return {
        "tokens": length,
        "loaded": plain["loaded"],
        "one_step": traced["one_step"],
        "peak": plain["peak"],
        "bound": plain["loaded"] + SLACK * traced["one_step"],
    }


def _in_child(length: int, folder: Path, threads: int, trace: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--probe", str(length), "--folder", str(folder), "--threads", str(threads)]
    environment = {**os.environ, **engine_environment("native", False, os.environ)}
    command += ["--trace"] if trace else []
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"the measurement failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _probe(length: int, folder: Path, threads: int, trace: bool) -> dict[str, float]:
    """Scores an item of `length` tokens, step by step as an engine does; traces the allocations of the last one."""
    import numpy as np
    import torch
    from rewardserve.engine.base import EngineRequest
    from rewardserve.engine.native.block_pool import BlockPool
    from rewardserve.engine.native.load import load_runner
    from rewardserve.engine.native.options import NativeOptions
    from rewardserve.engine.native.prefix_cache import PrefixCache
    from rewardserve.engine.native.scheduler import Scheduler
    from rewardserve.types import EncodedGroup

    options = NativeOptions(str(folder), num_threads=threads, prefix_cache_bytes=POOL_BYTES)
    loaded = load_runner(options)
    resident = _reset_peak()
    scheduler = Scheduler(PrefixCache(BlockPool(loaded.runner.num_blocks)), loaded.max_batch_tokens, 512)
    tokens = np.random.default_rng(0).integers(16, 250, length).astype("<i4").tobytes()
    scheduler.add(EngineRequest("item", (EncodedGroup(b"", (tokens,)),)))
    one_step = 0
    while (plan := scheduler.schedule()) is not None:
        prepared = loaded.runner.prepare(plan)
        if trace and plan.num_scored:
            with torch.profiler.profile(profile_memory=True) as profile:
                scores = loaded.runner.launch(prepared).features()
            one_step = _most_at_a_time(profile) + loaded.runner.workspace.num_bytes
        else:
            scores = loaded.runner.launch(prepared).features()
        scheduler.complete(plan, scores)
    return {"loaded": resident, "peak": _status("VmHWM"), "one_step": one_step}


def _most_at_a_time(profile: "torch.profiler.profile") -> int:
    """Bytes: the highest sum of allocations less releases."""
    total = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return most


def _reset_peak() -> int:
    """Resident bytes now; the peak counts from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _print(rows: list[dict[str, float]]) -> None:
    table = Table(title="one item, its peak and what it may be (MiB)")
    for column in ("tokens", "loaded", "one step", "peak", "bound", "peak / bound"):
        table.add_column(column, justify="right")
    for row in rows:
        sizes = (row[key] / 2**20 for key in ("loaded", "one_step", "peak", "bound"))
        table.add_row(f"{row['tokens']}", *(f"{size:.0f}" for size in sizes), f"{row['peak'] / row['bound']:.2f}")
    Console(width=100).print(table)


def _result(rows: list[dict[str, float]], threads: int) -> dict[str, object]:
    git = subprocess.run(["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "date": datetime.date.today().isoformat(),
        "git": git.stdout.strip(),
        "machine": {"cpu": report.device_name("cpu"), "threads": threads},
        "model": "qwen3-100m, bf16",
        "rows": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
