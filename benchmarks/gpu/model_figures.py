"""What models reach: throughput of every workload, latency, what options cost, and Hugging Face beside them."""

import asyncio
import gc
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import random_model
import torch
import torch.nn.functional as F
from part import Part
from rewardserve.engine.native.engine import NativeEngine
from served import (
    ROUND_TOKENS,
    TINY,
    TRAFFIC,
    VOCAB_SIZE,
    RandomWeights,
    Traffic,
    groups_of,
    made_model,
    running,
    score,
    scores_of,
)
from work import ModelShape, least_seconds, shared

ROUNDS = 3
HF_BATCH = 8
PROBE_SEED = 99  # of what is scored by every variant of a model
_seeds = itertools.count(1000)  # no prompt comes up twice: it would be cached


def _rates(part: Part, shape: ModelShape) -> dict[str, float]:
    """FLOP/s of each linear at 8,192 rows, by what the library's bf16 products reach."""
    rows, rates = 8192 if part.on_gpu else 64, {}
    for name, (inputs, outputs) in shape.linears.items():
        x = torch.randn(rows, inputs, device=part.device, dtype=torch.bfloat16)
        w = torch.randn(outputs, inputs, device=part.device, dtype=torch.bfloat16)
        rates[name] = 2.0 * rows * inputs * outputs / part.seconds(lambda: F.linear(x, w), 0.05)  # noqa: B023
    return rates


def model(part: Part, name: str, everything: bool) -> None:
    """Throughput of every workload, and Hugging Face's beside it; with `everything` also latency and budgets."""
    name = name if part.on_gpu else TINY
    with made_model(part, name) as folder:
        shape = ModelShape.of(Path(folder))
        rates = _rates(part, shape)
        part.note(linear_tflops={key: rate / 1e12 for key, rate in rates.items()}, more={})
        # First: for our engine products are set up otherwise, for the whole process (engine/native/gpu.py).
        _measure_hugging_face(part, folder, name, shape, rates)
        asyncio.run(_measure(part, folder, name, shape, rates, everything))


async def _measure(
    part: Part, folder: str, name: str, shape: ModelShape, rates: dict[str, float], everything: bool
) -> None:
    started = time.perf_counter()
    async with running(part, folder) as engine:
        part.found["more"]["load_s"] = round(time.perf_counter() - started, 1)
        info = engine._loop._loaded.info  # type: ignore[union-attr]
        part.found["more"]["canary_error"] = f"{info.canary_error:.1e}"
        part.found["more"]["prefix_cache_tokens"] = info.prefix_cache_tokens
        workloads: dict[str, Any] = {}
        for workload, traffic in TRAFFIC.items():
            workloads[workload] = await _throughput(part, engine, traffic, ROUND_TOKENS[name], shape, rates)
            part.note(workloads=workloads)
            part.say(f"{name} {workload}: {workloads[workload]}")
        probe = groups_of(part, TRAFFIC["best_of_16"], 4_000, PROBE_SEED)
        (part.folder / f"scores {name}.json").write_text(json.dumps(scores_of(await score(engine, probe))))
        if everything:
            await _latency(part, engine)
            await _budgets(part, engine, name, shape, rates)
    if part.on_gpu:
        part.found["more"]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        part.note()


async def _throughput(
    part: Part, engine: NativeEngine, traffic: Traffic, tokens: int, shape: ModelShape, rates: dict[str, float]
) -> dict[str, Any]:
    times = []
    await score(engine, groups_of(part, traffic, 1, next(_seeds)))  # what the first forward of a kind sets up
    for _ in range(ROUNDS):
        groups = groups_of(part, traffic, tokens, next(_seeds))
        started = time.perf_counter()
        scores_of(await score(engine, groups))
        times.append(time.perf_counter() - started)
    seconds, pairs = statistics.median(times), sum(len(responses) for _, responses in groups)
    least = shared([*prompt, *response] for prompt, responses in groups for response in responses)
    return {
        "pairs": pairs,
        "pairs_per_s": pairs / seconds,
        "tokens_per_s": least.tokens / seconds,
        "share_of_limit": least_seconds(shape, least, rates) / seconds,
        "seconds": times,
    }


async def _latency(part: Part, engine: NativeEngine) -> None:
    """Of one small group alone, with CUDA graphs and without."""
    runner: Any = engine._loop._runner  # type: ignore[union-attr]
    graphs, found = runner._graphs, {}
    for label, those in (("graphs", graphs), ("no graphs", None)):
        if label == "graphs" and graphs is None:
            continue
        runner._graphs = those
        times = []
        for _ in range(60):
            groups = groups_of(part, Traffic(256, 4, 64), 1, next(_seeds))
            started = time.perf_counter()
            await score(engine, groups)
            times.append(1e3 * (time.perf_counter() - started))
        found[label] = {"p50_ms": round(statistics.median(times), 2), "p95_ms": round(sorted(times)[57], 2)}
    runner._graphs = graphs
    part.found["more"]["one group of 256 + 4 x 64"] = found
    part.note()


async def _budgets(part: Part, engine: NativeEngine, name: str, shape: ModelShape, rates: dict[str, float]) -> None:
    scheduler: Any = engine._loop._scheduler  # type: ignore[union-attr]
    found, before = {}, scheduler._max_tokens
    for tokens in (2048, 4096, 8192, 16384, 32768) if part.on_gpu else (256, 512):
        scheduler._max_tokens = scheduler._token_limit = tokens
        result = await _throughput(part, engine, TRAFFIC["best_of_16"], ROUND_TOKENS[name] // 2, shape, rates)
        found[tokens] = round(result["share_of_limit"], 3)
    scheduler._max_tokens = scheduler._token_limit = before
    part.found["more"]["share of the limit by token budget"] = found
    part.note()


def _measure_hugging_face(part: Part, folder: str, name: str, shape: ModelShape, rates: dict[str, float]) -> None:
    """A plain forward of padded batches of 8, in the order in which pairs come and sorted by length."""
    found: dict[str, str] = {}
    part.found["more"][f"hugging face, batches of {HF_BATCH}"] = found
    config = random_model._config(name, VOCAB_SIZE if part.on_gpu else 2000)
    try:
        model = RandomWeights.from_pretrained(folder, config, torch.bfloat16)[0].eval()
        for workload in ("best_of_16", "shared_system"):
            groups = groups_of(part, TRAFFIC[workload], ROUND_TOKENS[name] // 10, seed=7)
            rows = [[*prompt, *response] for prompt, responses in groups for response in responses]
            least = least_seconds(shape, shared(rows), rates)
            _forward_padded(part, model, rows[:HF_BATCH])  # what the first one sets up
            for order, these in (("as they come", rows), ("sorted", sorted(rows, key=len))):
                started = time.perf_counter()
                _forward_padded(part, model, these)
                seconds = time.perf_counter() - started
                found[f"{workload}, {order}"] = f"{len(rows) / seconds:.1f} pairs/s, {least / seconds:.1%} of the limit"
                part.note()
    except torch.OutOfMemoryError:
        found["failed"] = "it did not fit"
    model = None
    gc.collect()
    if part.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    part.note()


def _forward_padded(part: Part, model: Any, rows: Sequence[list[int]]) -> None:
    with torch.inference_mode():
        for i in range(0, len(rows), HF_BATCH):
            batch = rows[i : i + HF_BATCH]
            ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, (of_row, kept) in zip(batch, zip(ids, mask, strict=True), strict=True):
                of_row[: len(row)] = torch.tensor(row)
                kept[: len(row)] = 1
            model(input_ids=ids.to(part.device), attention_mask=mask.to(part.device), use_cache=False)
    part.wait()


def variant(part: Part, name: str, **options: Any) -> None:
    """One workload with other options, to compare with the part of the same model."""
    name = name if part.on_gpu else TINY
    with made_model(part, name) as folder:
        shape = ModelShape.of(Path(folder))
        rates = _rates(part, shape)
        part.note(options=options, more={})

        async def measure() -> None:
            async with running(part, folder, **options) as engine:
                traffic = TRAFFIC["best_of_16"]
                result = await _throughput(part, engine, traffic, ROUND_TOKENS[name], shape, rates)
                part.note(workloads={"best_of_16": result})
                probe = groups_of(part, traffic, 4_000, PROBE_SEED)
                _compare(part, name, scores_of(await score(engine, probe)))

        asyncio.run(measure())


def _compare(part: Part, name: str, scores: list[float]) -> None:
    """With those the part of the same model left: errors and flipped pairs."""
    file = part.folder / f"scores {name}.json"
    if not file.exists():
        return
    wanted, got = np.array(json.loads(file.read_text())), np.array(scores)
    first, second = np.triu_indices(len(wanted), 1)
    flips = np.mean((wanted[first] > wanted[second]) != (got[first] > got[second]))
    part.found["more"]["against bf16"] = {
        "mean_abs_err": round(float(np.abs(got - wanted).mean()), 5),
        "max_abs_err": round(float(np.abs(got - wanted).max()), 5),
        "std_of_scores": round(float(wanted.std()), 3),
        "flipped_pairs": f"{flips:.2%}",
    }
    part.note()
