"""What 8-bit weights and activations cost and gain on a CPU: score error, ranks that change places, speed.

    python benchmarks/quantize.py [--kind int8] [--threads 2] [--groups 12] [--rounds 3]

Two models: the bundled demo model, which is trained (its ranks mean something, its size does not), and a 100M Qwen3
shape of random weights. Real prompts with 16 real answers; bf16 and 8 bits in one process, in turn; the error is
against padded Hugging Face in fp32. A flip is a pair of answers to one prompt that fp32 puts the other way round.
fp8 is a GPU's; on a CPU torch multiplies it too, to the same rounding, at a speed that says nothing: it is not timed.
Writes benchmarks/results/int8_cpu.json or fp8_cpu.json.
"""

import argparse
import asyncio
import datetime
import itertools
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import random_model
import report
import torch
from ids import make
from peers.protocol import Groups
from rewardserve.engine.base import EngineListener, EngineRequest
from rewardserve.engine.native.engine import NativeEngine
from rewardserve.engine.native.options import NativeOptions
from rewardserve.loadtest.workloads import Traffic
from rewardserve.types import EncodedGroup
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared" / "data"
RESULTS = HERE / "results"
MAX_LENGTH = 1024  # of the demo model


@dataclass(frozen=True, slots=True)
class Measured:
    pairs_per_s: float | None  # None: not timed
    mean_abs_err: float
    max_abs_err: float
    score_std: float
    flips: float  # share of pairs of answers
    best_changed: float  # share of prompts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=("int8", "fp8"), default="int8", help="of 8-bit numbers")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--groups", type=int, default=12, help="prompts, each with 16 answers")
    parser.add_argument("--rounds", type=int, default=3, help="times each precision is timed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = {
        "demo": HERE.parent / "examples" / "demo_model",
        "qwen3-100m": random_model.make("qwen3-100m", HERE / ".cache" / "models", DATA),
    }
    results = {name: asyncio.run(_measure(model, options)) for name, model in models.items()}
    _print(results, options.kind)
    file = RESULTS / f"{options.kind}_cpu.json"
    file.write_text(json.dumps(_as_json(results, options), indent=1) + "\n")
    print(f"written to {file.relative_to(HERE.parent)}")
    return 0


async def _measure(model: Path, options: argparse.Namespace) -> dict[str, Measured]:
    work = make("best_of_16", Traffic(options.groups, data=DATA), model, 0, 1 << 20)
    groups = [(prompt, [r for r in rs if len(prompt) + len(r) <= MAX_LENGTH]) for prompt, rs in work.salted(0)]
    exact = _exact(model, groups)
    engines = {}
    for name, quantize in (("bf16", ""), (options.kind, options.kind)):
        settings = NativeOptions(str(model), dtype="bfloat16", num_threads=options.threads, quantize=quantize)
        engines[name] = NativeEngine(settings)
        await engines[name].start(EngineListener())
    scores = {name: await _score(engine, groups, "check") for name, engine in engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    rounds = options.rounds if options.kind == "int8" else 0
    for number in tqdm(range(rounds), desc=model.name, disable=not rounds):
        for name, engine in engines.items():
            cold = [([(number + 1) * 100, *prompt[1:]], responses) for prompt, responses in groups]
            started = time.perf_counter()
            await _score(engine, cold, str(number))
            seconds[name].append(time.perf_counter() - started)
    for engine in engines.values():
        await engine.stop()
    count = sum(len(responses) for _, responses in groups)
    rates = {name: count / statistics.median(times) if times else None for name, times in seconds.items()}
    return {name: _compare(scores[name], exact, rates[name]) for name in engines}


def _exact(model: Path, groups: Groups) -> list[list[float]]:
    hf = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [
            [_last(hf, [*prompt, *response]) for response in responses]
            for prompt, responses in tqdm(groups, desc="fp32", leave=False)
        ]


def _last(hf: torch.nn.Module, row: list[int]) -> float:
    hidden = hf.model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[:, -1]
    return hf.score(hidden).item()


async def _score(engine: NativeEngine, groups: Groups, name: str) -> list[list[float]]:
    def pack(ids: list[int]) -> bytes:
        return np.array(ids, "<i4").tobytes()

    encoded = tuple(EncodedGroup(pack(prompt), tuple(map(pack, responses))) for prompt, responses in groups)
    result = await engine.score(EngineRequest(name, encoded))
    return [[item.score for item in group.items] for group in result.groups]


def _compare(got: list[list[float]], exact: list[list[float]], pairs_per_s: float | None) -> Measured:
    flat, wanted = (np.array(list(itertools.chain.from_iterable(scores))) for scores in (got, exact))
    flips, pairs, best_changed = 0, 0, 0
    for mine, theirs in zip(got, exact, strict=True):
        best_changed += int(np.argmax(mine)) != int(np.argmax(theirs))
        for i, j in itertools.combinations(range(len(mine)), 2):
            pairs += 1
            flips += (mine[i] > mine[j]) != (theirs[i] > theirs[j])
    errors = np.abs(flat - wanted)
    return Measured(
        pairs_per_s,
        float(errors.mean()),
        float(errors.max()),
        float(wanted.std()),
        flips / pairs,
        best_changed / len(got),
    )


def _print(results: dict[str, dict[str, Measured]], kind: str) -> None:
    table = Table(title=f"bf16 and {kind} against fp32")
    for column in ("model", "precision", "pairs/s", "x", "mean err", "max err", "score std", "flips", "best changed"):
        table.add_column(column, justify="right")
    for model, by_precision in results.items():
        for precision, m in by_precision.items():
            plain = by_precision["bf16"].pairs_per_s
            errors = (f"{m.mean_abs_err:.4f}", f"{m.max_abs_err:.4f}", f"{m.score_std:.3f}")
            rates = (f"{m.pairs_per_s:.1f}", f"{m.pairs_per_s / plain:.2f}") if m.pairs_per_s and plain else ("", "")
            table.add_row(model, precision, *rates, *errors, f"{m.flips:.2%}", f"{m.best_changed:.1%}")
    Console(width=120).print(table)


def _as_json(results: dict[str, dict[str, Measured]], options: argparse.Namespace) -> dict[str, object]:
    git = subprocess.run(["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "date": datetime.date.today().isoformat(),
        "git": git.stdout.strip(),
        "machine": {"cpu": report.device_name("cpu"), "threads": options.threads},
        "groups": options.groups,
        "models": {
            model: {name: {key: getattr(m, key) for key in m.__slots__} for name, m in by_precision.items()}
            for model, by_precision in results.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
