"""What models reach: throughput of every workload, latency, token budgets, and what each way of running brings."""

import asyncio
import itertools
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from limits import Limits, limits_of
from part import Part
from rewardserve.engine.native.engine import NativeEngine
from rewardserve.engine.native.step_limit import StepLimit
from rewardserve.models.kv_pool import HostBlocks
from rewardserve_kernels.ragged import BLOCK_TOKENS
from score_errors import probe
from served import (
    ROUND_TOKENS,
    TINY,
    TRAFFIC,
    Traffic,
    groups_of,
    how_it_runs,
    loaded_of,
    made_model,
    running,
    score,
    scores_of,
)
from ways import WAYS, graphs_off
from work import ModelShape, shared

ROUNDS, BUDGET_ROUNDS, WAY_ROUNDS = 3, 2, 2
LATENCIES, LATENCIES_TINY = 60, 3  # groups
_seeds = itertools.count(1000)  # no prompt comes up twice: it would be cached


def model(part: Part, name: str) -> None:
    """The model of that name: all workloads; of the smallest also what each way of running brings."""
    name = TINY if part.tiny else name
    with made_model(part, name) as folder:
        limits = limits_of(part, ModelShape.of(Path(folder)))
        asyncio.run(_measure(part, folder, name, limits))


async def _measure(part: Part, folder: str, name: str, limits: Limits) -> None:
    part.note(more={})
    started = time.perf_counter()
    async with running(part, folder) as engine:
        info = loaded_of(engine).info
        part.found["more"]["load_s"] = round(time.perf_counter() - started, 1)
        part.found["more"]["canary_error"] = f"{info.canary_error:.1e}"
        part.found["more"]["prefix_cache_tokens"] = info.prefix_cache_tokens
        part.note(runs=how_it_runs(loaded_of(engine)))
        await _workloads(part, engine, ROUND_TOKENS[name], limits)
        part.note(probe=await probe(part, engine))
        for extra in EXTRAS.get(name, (_latency, _budgets, _ways)):
            if part.left() > 10:
                await extra(part, engine, ROUND_TOKENS[name], limits)
        if name == TINY:
            await _host_tier(part, engine, ROUND_TOKENS[name], limits)
    if part.on_gpu:
        part.found["more"]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        part.note()


async def _workloads(part: Part, engine: NativeEngine, tokens: int, limits: Limits) -> None:
    found: dict[str, Any] = {}
    for name, traffic in TRAFFIC.items():
        found[name] = await throughput(part, engine, traffic, tokens, limits)
        part.note(workloads=found)
        part.say(f"{name}: {found[name]}")


async def throughput(
    part: Part, engine: NativeEngine, traffic: Traffic, tokens: int, limits: Limits, rounds: int = 0
) -> dict[str, Any]:
    await score(engine, groups_of(part, traffic, 1, next(_seeds)))  # what the first forward of a kind sets up
    times = [await round_s(part, engine, traffic, tokens) for _ in range(rounds or ROUNDS)]
    groups = groups_of(part, traffic, tokens, 0)
    seconds, pairs = statistics.median(times), sum(len(responses) for _, responses in groups)
    least = shared([*prompt, *response] for prompt, responses in groups for response in responses)
    rates = {"pairs": pairs, "pairs_per_s": pairs / seconds, "tokens_per_s": least.tokens / seconds}
    return {**rates, **limits.shares(least, seconds), "seconds": times}


async def round_s(part: Part, engine: NativeEngine, traffic: Traffic, tokens: int) -> float:
    """Seconds for groups of so many tokens, all at once, none of them seen before."""
    groups = groups_of(part, traffic, tokens, next(_seeds))
    started = time.perf_counter()
    scores_of(await score(engine, groups))
    return time.perf_counter() - started


async def _latency(part: Part, engine: NativeEngine, tokens: int, limits: Limits) -> None:
    """Of one small group alone, with CUDA graphs and without."""
    found, count = {}, LATENCIES_TINY if part.tiny else LATENCIES
    for label in ("graphs", "no graphs"):
        if label == "graphs" and not how_it_runs(loaded_of(engine))["graphs"]:
            continue
        with graphs_off(engine, label == "no graphs"):
            times = sorted([1e3 * await round_s(part, engine, Traffic(256, 4, 64), 1) for _ in range(count)])
        found[label] = {"p50_ms": round(statistics.median(times), 2), "p95_ms": round(times[int(0.95 * count)], 2)}
    part.found["more"]["one group of 256 + 4 x 64"] = found
    part.note()


async def _budgets(part: Part, engine: NativeEngine, tokens: int, limits: Limits) -> None:
    assert engine._loop is not None
    scheduler: Any = engine._loop._scheduler
    found, before = {}, scheduler._limit
    budgets = (4096, 8192, 16384) if tokens < ROUND_TOKENS["qwen3-0.6b"] else (2048, 4096, 8192, 16384, 32768)
    try:
        for budget in (256, 512) if part.tiny else budgets:
            scheduler._limit = StepLimit(budget, least=BLOCK_TOKENS)
            result = await throughput(part, engine, TRAFFIC["best_of_16"], tokens // 2, limits, BUDGET_ROUNDS)
            found[budget] = round(result["share_of_limit"], 3)
    finally:
        scheduler._limit = before
    part.found["more"]["share of the limit by token budget"] = found
    part.note()


async def _ways(part: Part, engine: NativeEngine, tokens: int, limits: Limits, names: Iterable[str] = WAYS) -> None:
    """How much slower best_of_16 is where one thing is as it was before it was made fast. In turns with all of them."""
    found: dict[str, Any] = {}
    for name, way in ((name, WAYS[name]) for name in names):
        fast, slow = [], []
        for number in range(1 + WAY_ROUNDS):  # the first one sets up what the way needs
            fast.append(await round_s(part, engine, TRAFFIC["best_of_16"], tokens // 8))
            with way(engine):
                slow.append(await round_s(part, engine, TRAFFIC["best_of_16"], tokens // 8))
            if part.left() < 10 and number:
                break
        found[name] = f"{statistics.median(slow[1:]) / statistics.median(fast[1:]):.3f} x the time"
        part.found["more"]["best_of_16 with"] = found
        part.note()
        if part.left() < 15:
            return


async def _host_tier(part: Part, engine: NativeEngine, tokens: int, limits: Limits) -> None:
    """A prompt of 512 tokens copied back from host memory, or computed once more."""
    runner: Any = loaded_of(engine).runner
    blocks, pool = range(4), runner._pool
    host = HostBlocks(pool, len(blocks))
    copied = {
        name: part.seconds(lambda: [copy(block, block) for block in blocks])  # noqa: B023  # what lies there stays
        for name, copy in {"out": host.copy_out, "back": host.copy_back}.items()
    }
    per_token = 1 / part.found["workloads"]["best_of_16"]["tokens_per_s"]
    nbytes = len(blocks) * host._slots[0].nbytes
    part.found["more"]["512 tokens to and from host memory"] = {
        **{f"{name}_ms": round(1e3 * seconds, 3) for name, seconds in copied.items()},
        "back_gb_per_s": round(nbytes / copied["back"] / 1e9, 1),
        "computed_again_ms": round(512e3 * per_token, 3),
    }
    part.note()


async def _uncompiled(part: Part, engine: NativeEngine, tokens: int, limits: Limits) -> None:
    """Of the ways, the one that matters most where products are large."""
    await _ways(part, engine, tokens, limits, ["layers not compiled"])


EXTRAS = {"qwen3-4b": (_uncompiled, _budgets, _host_tier), "llama-3.1-8b": (_uncompiled, _latency)}
