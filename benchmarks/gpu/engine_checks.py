"""The gate, third part: the engine as it serves. A score is the same bit for bit cold, warm, batched and by graphs, and
no step waits.
"""

import asyncio
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checks import Checks
from gate_models import layered, means, over_one_backbone, reads_means, served
from part import Part
from rewardserve.engine.base import EngineRequest
from rewardserve.engine.native.block_pool import BlockPool
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.prefix_cache import PrefixCache
from rewardserve.engine.native.scheduler import Scheduler
from rewardserve.models.reads import Reader
from rewardserve.types import EncodedGroup
from served import (
    Traffic,
    as_bytes,
    engine_options,
    groups_of,
    how_it_runs,
    require,
    require_meant,
    running,
    score,
    scores_of,
    vocabulary,
)


def engine_checks(part: Part) -> None:
    check = Checks(part)
    check("a pair's bits, cold, warm, batched, reordered", lambda: _engine_is_invariant(part, served(part)))
    by_torch = {"compile": "off", "cuda_graphs": False}  # whose norms share a row among more threads, of few rows
    for kind, made in {"a head that reads means": means, "a head of layers": layered}.items():
        check(f"the same of {kind}", lambda: _engine_is_invariant(part, made(part), **by_torch))  # noqa: B023
    check("a step waits for nothing", lambda: _nothing_waits(part, served(part)))
    check("nor does one of a head that reads means", lambda: _nothing_waits(part, means(part), compile="off"))
    for kind, make in {"a head that reads means": reads_means, "models over one backbone": over_one_backbone}.items():
        check(f"graphs of {kind}", lambda: _graphs_change_nothing(part, make))  # noqa: B023


def _nothing_waits(part: Part, made: AbstractContextManager[str], **options: Any) -> tuple[bool, str]:
    """A step that waited for the device would raise here: replayed, or kernel by kernel."""
    with made as folder:
        counts = [_steps_that_do_not_wait(part, folder, cuda_graphs=on, **options) for on in (True, False)]
    return True, f"{counts[0]} steps with graphs, {counts[1]} without"


def _steps_that_do_not_wait(part: Part, folder: str, **options: Any) -> int:
    asked = engine_options(part, folder, path="packed", **options)
    loaded = load_runner(asked)
    require_meant(part, asked, how_it_runs(loaded))
    runner: Any = loaded.runner
    ids_up_to, readers = loaded.model.backbone.config.vocab_size, [Reader(plan) for plan in loaded.reads]
    checked = 0
    for max_tokens in (1024, 4096):  # what a graph holds, and what none does
        scheduler = Scheduler(PrefixCache(BlockPool(runner.num_blocks)), max_tokens, 512, readers=readers)
        for number, (prompt, responses) in enumerate(
            groups_of(part, Traffic(300, 4, 200), 8_000 if part.tiny else 20_000, seed=max_tokens)
        ):
            prompt, *responses = ([i % ids_up_to for i in ids] for ids in (prompt, *responses))
            group = EncodedGroup(as_bytes(prompt), tuple(map(as_bytes, responses)))
            scheduler.add(EngineRequest(str(number), (group,)))
        steps = 0
        while (plan := scheduler.schedule()) is not None:
            if part.on_gpu and steps > 2:  # the first ones set things up
                torch.cuda.set_sync_debug_mode("error")
            checked += steps > 2
            try:
                launched = runner.launch(runner.prepare(plan))
            finally:
                if part.on_gpu:
                    torch.cuda.set_sync_debug_mode("default")
            scheduler.complete(plan, launched.features())
            steps += 1
    require(checked > 0, "there were too few steps to see")
    return checked


def _engine_is_invariant(part: Part, made: AbstractContextManager[str], **options: Any) -> tuple[bool, str]:
    """With everything that is on by default: compiled layers, CUDA graphs, batch invariance; or with `options`."""
    ids = np.random.default_rng(3).integers(10, 200 if options else vocabulary(part), 4000).tolist()
    group = (ids[:300], [ids[1000:1200], ids[1300:1301], ids[1400:1650]])
    others = [(ids[i : i + 200 + 13 * i], [ids[500 + i : 600 + 9 * i], ids[50 : 55 + i]]) for i in range(12)]
    if part.tiny and part.on_gpu:  # where every kernel is interpreted
        group, others = (ids[:140], [ids[1000:1020], ids[1300:1301]]), others[:2]

    async def scores(folder: str) -> list[list[float]]:
        got = []
        async with running(part, folder, **options) as engine:
            got.append(scores_of(await score(engine, [group])))  # cold, alone; a graph's forward
            got.append(scores_of(await score(engine, [group])))  # warm
            for shift in range(min(5, len(others))):
                result = await score(engine, [*others[shift:], group, *others[:shift]])
                got.append([item.score for item in result.groups[len(others) - shift].items])
        async with running(part, folder, **options) as engine:
            result = await score(engine, [*others, group])  # cold, in a batch
            got.append([item.score for item in result.groups[-1].items])
        return got

    with made as folder:
        all_scores = asyncio.run(scores(folder))
    different = [i for i, got in enumerate(all_scores) if got != all_scores[0]]
    worst = max(abs(a - b) for got in all_scores for a, b in zip(got, all_scores[0], strict=True))
    same = len(all_scores) - len(different)
    return not different, f"{same} of {len(all_scores)} the same, off by {worst:.1e} at most"


def _graphs_change_nothing(part: Part, make: Callable[[Path], list[Path]]) -> tuple[bool, str]:
    """Every model's scores are the same, bit for bit, replayed and kernel by kernel, cold and warm."""
    groups = groups_of(part, Traffic(300, 4, 100), 200 if part.tiny else 1_400, seed=11)  # what a graph holds, cold
    groups = [([i % 200 for i in prompt], [[i % 200 for i in r] for r in responses]) for prompt, responses in groups]

    async def scores(sources: list[Path], cuda_graphs: bool) -> list[list[float]]:
        beside = tuple(map(str, sources[1:]))
        options = {"beside": beside, "compile": "off", "prefix_cache_bytes": 64 << 20}
        async with running(part, str(sources[0]), cuda_graphs=cuda_graphs, **options) as engine:
            runner: Any = engine._loop._runner  # type: ignore[union-attr]
            replays = _count_replays(runner._graphs) if cuda_graphs and part.on_gpu else [None]
            rounds = [variant for _ in range(2) for variant in range(len(sources))]
            found = [scores_of(await score(engine, groups, variant)) for variant in rounds]
            require(bool(replays), "nothing was replayed")
            return found

    with tempfile.TemporaryDirectory() as folder:
        sources = make(Path(folder))
        replayed, eager = (asyncio.run(scores(sources, on)) for on in (True, False))
    worst = max(abs(a - b) for one, other in zip(replayed, eager, strict=True) for a, b in zip(one, other, strict=True))
    distinct = len({tuple(each) for each in eager})
    return replayed == eager and distinct == len(sources), f"{distinct} models, off by {worst:.1e} at most"


def _count_replays(graphs: Any) -> list[int]:
    """Grows by one with each."""
    replays: list[int] = []
    launch = graphs.launch

    def counted(replay: Any) -> torch.Tensor:
        replays.append(replay.count)
        return launch(replay)

    graphs.launch = counted
    return replays
