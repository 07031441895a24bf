"""The gate: kernels against their oracles, families by their canaries, one score bit for bit cold, warm and batched."""

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernels_of import attention_kernel, index_of, pool_kernel, store_kernel
from part import Part
from rewardserve.engine.base import EngineRequest
from rewardserve.engine.native.block_pool import BlockPool
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.options import NativeOptions
from rewardserve.engine.native.prefix_cache import PrefixCache
from rewardserve.engine.native.scheduler import Scheduler
from rewardserve.types import EncodedGroup
from rewardserve_kernels.attention import reference as attention_reference
from rewardserve_kernels.kv_cache.paged import store_segment
from rewardserve_kernels.pooling import reference as pooling_reference
from rewardserve_kernels.pooling.reference import Norm, NormKind, Pooling
from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment
from rewardserve_kernels.workspace import Workspace
from safetensors.torch import load_file
from served import (
    TINY,
    VOCAB_SIZE,
    Traffic,
    as_bytes,
    engine_options,
    groups_of,
    made_model,
    require,
    running,
    score,
    scores_of,
)


def gate(part: Part) -> None:
    checks: dict[str, dict[str, Any]] = {}

    def check(name: str, action: Callable[[], tuple[bool, str]]) -> None:
        try:
            ok, detail = action()
        except Exception as error:
            ok, detail = False, f"{type(error).__name__}: {error}".splitlines()[0][:200]
        checks[name] = {"ok": ok, "detail": detail}
        part.note(checks=checks)
        part.say(f"{'green' if ok else 'RED  '} {name}: {detail}")

    check("a step waits for nothing", lambda: _nothing_waits(part))
    check("a pair's bits, cold, warm, batched, reordered", lambda: _engine_is_invariant(part))
    for kind, make in {"a head that reads means": _reads_means, "models over one backbone": _over_one_backbone}.items():
        check(f"graphs of {kind}", lambda: _graphs_change_nothing(part, make))  # noqa: B023
    for head_size, v_head_size in ((64, 64), (128, 128), (80, 96), (256, 256))[: None if part.on_gpu else 1]:
        for name, options in _ATTENTION_OPTIONS.items():
            title = f"tree_attention {head_size}/{v_head_size} {name}"
            check(title, lambda: _attention_is_right(part, head_size, v_head_size, options))  # noqa: B023
    check("tree_attention, a row's bits are its own", lambda: _attention_is_invariant(part))
    check("keys and values stored at once", lambda: _storing_is_right(part))
    for pooling in Pooling:
        check(f"pool_head {pooling.value}", lambda: _pool_head_is_right(part, pooling))  # noqa: B023
    from checkpoints import FAMILIES

    for family in list(FAMILIES)[: None if part.on_gpu else 2]:
        check(f"canary {family}", lambda: _family_is_right(part, family))  # noqa: B023


_ATTENTION_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 140},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": True},
}
# (start, rows) of segments: starts in mid-block, single rows, a whole block, one more than a block
RAGGED = ((0, 1), (0, 129), (70, 33), (128, 128), (200, 5), (255, 1), (130, 300), (0, 128), (1000, 70))


def _ragged(part: Part, head_size: int, v_head_size: int, heads: int = 8, kv_heads: int = 2) -> tuple[Any, ...]:
    """Tensors and segments over a pool in which every slot that may not be read is NaN."""
    torch.manual_seed(0)
    like = {"device": part.device, "dtype": torch.bfloat16}
    num_blocks = 40
    pool_k = torch.full((num_blocks, kv_heads, BLOCK_TOKENS, head_size), float("nan"), **like)
    pool_v = torch.full((num_blocks, kv_heads, BLOCK_TOKENS, v_head_size), float("nan"), **like)
    free = iter(torch.randperm(num_blocks).tolist())
    segments, row = [], 0
    for start, rows in RAGGED:
        blocks = tuple(next(free) for _ in range(-(-start // BLOCK_TOKENS)))
        beginning = Segment(0, start, 0, blocks, store=True)
        store_segment(pool_k, torch.randn(kv_heads, start, head_size, **like), beginning)
        store_segment(pool_v, torch.randn(kv_heads, start, v_head_size, **like), beginning)
        segments.append(Segment(row, rows, start, blocks, store=False))
        row += rows
    q, k = torch.randn(heads, row, head_size, **like), torch.randn(kv_heads, row, head_size, **like)
    return q, k, torch.randn(kv_heads, row, v_head_size, **like), pool_k, pool_v, segments


def _attend(part: Part, q: torch.Tensor, *rest: Any, window: int = 0, **options: Any) -> torch.Tensor:
    *tensors, segments = rest
    kernel = attention_kernel(part)
    plan = kernel.plan_attention(segments, q.dtype, q.device, window, False)
    return kernel.tree_attention(q, *tensors, plan, Workspace(), q.shape[2] ** -0.5, **options)


def _attention_is_right(part: Part, head_size: int, v_head_size: int, options: dict[str, Any]) -> tuple[bool, str]:
    *tensors, segments = _ragged(part, head_size, v_head_size)
    options = dict(options)
    sinks = torch.randn(8, device=part.device).bfloat16() if options.pop("sinks", None) else None
    got = _attend(part, *tensors, segments, sinks=sinks, **options)
    exact = (t.double().cpu() for t in tensors)
    wanted = attention_reference.tree_attention(
        *exact, segments, head_size**-0.5, sinks=None if sinks is None else sinks.double().cpu(), **options
    )
    error = ((got.double().cpu() - wanted).norm() / wanted.norm()).item()
    return error < 1e-2, f"relative error {error:.1e} to fp64"


def _attention_is_invariant(part: Part) -> tuple[bool, str]:
    q, k, v, pool_k, pool_v, segments = _ragged(part, 128, 128)
    together = _attend(part, q, k, v, pool_k, pool_v, segments)
    for s in segments:
        rows = slice(s.row, s.end - s.start + s.row)
        one = [Segment(0, s.num_rows, s.start, s.blocks, False)]
        alone = _attend(part, q[:, rows], k[:, rows], v[:, rows], pool_k, pool_v, one)
        if not torch.equal(alone, together[rows]):
            return False, f"{s.num_rows} rows after {s.start} are others alone"
    length = 700
    q, k, v = (torch.randn(h, length, 128, device=part.device).bfloat16() for h in (8, 2, 2))
    pools = [torch.zeros(6, 2, BLOCK_TOKENS, 128, device=part.device).bfloat16() for _ in range(2)]
    blocks = tuple(range(6))
    for pool, rows_ in zip(pools, (k, v), strict=True):
        store_segment(pool, rows_, Segment(0, length, 0, blocks, True))
    whole = _attend(part, q, k, v, *pools, [Segment(0, length, 0, blocks, True)])
    for cut in (1, 60, 127, 128, 129, 384, 650):
        tail = [Segment(0, length - cut, cut, blocks, False)]
        if not torch.equal(_attend(part, q[:, cut:], k[:, cut:], v[:, cut:], *pools, tail), whole[cut:]):
            return False, f"rows are others where the sequence was cut at {cut}"
    return True, "alone, packed and cut at 7 places"


def _storing_is_right(part: Part) -> tuple[bool, str]:
    """To the bit, as segment by segment; what is not stored is left as it was."""
    torch.manual_seed(0)
    segments = [Segment(0, 130, 0, (4, 1), True), Segment(130, 9, 5, (), False), Segment(139, 300, 70, (5, 0, 2), True)]
    like = {"device": part.device, "dtype": torch.bfloat16}
    rows = [torch.randn(439, 2, size, **like).transpose(0, 1) for size in (192, 128)]
    at_once, one_by_one = ([torch.zeros(7, 2, BLOCK_TOKENS, r.shape[2], **like) for r in rows] for _ in "ab")
    store_kernel(part)(*at_once, *rows, index_of(part, segments))
    for segment in segments:
        for pool, own in zip(one_by_one, rows, strict=True):
            if segment.store:
                store_segment(pool, own[:, segment.row : segment.row + segment.num_rows], segment)
    ok = all(torch.equal(a, b) for a, b in zip(at_once, one_by_one, strict=True))
    return ok, "430 rows of two segments"


def _pool_head_is_right(part: Part, pooling: Pooling) -> tuple[bool, str]:
    torch.manual_seed(0)
    like = {"device": part.device}
    hidden = torch.randn(300, 2560, **like).bfloat16()
    spans = torch.tensor([[0, 7], [7, 8], [8, 139], [139, 300]], dtype=torch.int32, **like)
    weight, bias = torch.randn(3, 2560, **like), torch.randn(3, **like)
    norm = Norm(NormKind.RMS, torch.rand(2560, **like) + 0.5, 1e-6)
    got = pool_kernel(part)(hidden, spans, weight, bias, norm, pooling)
    wanted = pooling_reference.pool_head(hidden, spans, weight, bias, norm, pooling)
    error = ((got - wanted).norm() / wanted.norm()).item()
    return error < 1e-5, f"relative error {error:.1e}"


def _family_is_right(part: Part, family: str) -> tuple[bool, str]:
    from checkpoints import save_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), family, torch.bfloat16)
        options = NativeOptions(
            folder, device=str(part.device), compile="off", cuda_graphs=False, prefix_cache_bytes=64 << 20
        )
        loaded = load_runner(options)
    info = loaded.info
    if info.path != "packed":
        return False, f"served padded: {info.path_reason}"
    if part.on_gpu and loaded.model.backbone.attention is not attention_kernel(part):
        return False, "its attention is not Triton's, which did not agree"
    return True, f"final hidden states within {info.canary_error:.1e} of padded Hugging Face"


def _nothing_waits(part: Part) -> tuple[bool, str]:
    """A step that waited for the device would raise here: replayed, or kernel by kernel."""
    counts = [_steps_that_do_not_wait(part, cuda_graphs) for cuda_graphs in (True, False)]
    return True, f"{counts[0]} steps with graphs, {counts[1]} without"


def _steps_that_do_not_wait(part: Part, cuda_graphs: bool) -> int:
    with made_model(part, "qwen3-0.6b" if part.on_gpu else TINY) as folder:
        loaded = load_runner(engine_options(part, folder, path="packed", compile="off", cuda_graphs=cuda_graphs))
    runner: Any = loaded.runner
    require((runner._graphs is not None) == (cuda_graphs and part.on_gpu), f"graphs: {runner._graphs}")
    count = 0
    for max_tokens in (1024, 4096):  # what a graph holds, and what none does
        scheduler = Scheduler(PrefixCache(BlockPool(runner.num_blocks)), max_tokens, 512)
        for number, (prompt, responses) in enumerate(groups_of(part, Traffic(300, 4, 200), 20_000, seed=max_tokens)):
            group = EncodedGroup(as_bytes(prompt), tuple(map(as_bytes, responses)))
            scheduler.add(EngineRequest(str(number), (group,)))
        steps = 0
        while (plan := scheduler.schedule()) is not None:
            if part.on_gpu and steps > 2:  # the first ones set things up
                torch.cuda.set_sync_debug_mode("error")
            try:
                launched = runner.launch(runner.prepare(plan))
            finally:
                if part.on_gpu:
                    torch.cuda.set_sync_debug_mode("default")
            scheduler.complete(plan, launched.features())
            steps += 1
        count += steps
    return count


def _engine_is_invariant(part: Part) -> tuple[bool, str]:
    """With everything that is on by default: compiled layers, CUDA graphs, batch invariance."""
    name = "qwen3-0.6b" if part.on_gpu else TINY
    ids = np.random.default_rng(3).integers(10, VOCAB_SIZE if part.on_gpu else 2000, 4000).tolist()
    group = (ids[:300], [ids[1000:1200], ids[1300:1301], ids[1400:1650]])
    others = [(ids[i : i + 200 + 13 * i], [ids[500 + i : 600 + 9 * i], ids[50 : 55 + i]]) for i in range(12)]
    with made_model(part, name) as folder:

        async def scores() -> list[list[float]]:
            got = []
            for _ in range(2):
                async with running(part, folder) as engine:
                    if part.on_gpu:  # where one of these failed there would be a warning, and less to compare
                        loop: Any = engine._loop
                        layer = loop._loaded.model.backbone.decoder_layers[0]
                        require(loop._runner._graphs is not None, "there are no graphs")
                        require(layer._compiled_call_impl is not None, "layers are not compiled")
                    got.append(scores_of(await score(engine, [group])))  # cold, alone; a graph's forward
                    got.append(scores_of(await score(engine, [group])))  # warm
                    for shift in range(5):
                        batch = [*others[shift:], group, *others[:shift]]
                        result = await score(engine, batch)
                        got.append([item.score for item in result.groups[len(others) - shift].items])
                async with running(part, folder) as engine:
                    result = await score(engine, [*others, group])  # cold, in a batch
                    got.append([item.score for item in result.groups[-1].items])
            return got

        all_scores = asyncio.run(scores())
    different = [i for i, got in enumerate(all_scores) if got != all_scores[0]]
    worst = max(abs(a - b) for got in all_scores for a, b in zip(got, all_scores[0], strict=True))
    return (
        not different,
        f"{len(all_scores) - len(different)} of {len(all_scores)} the same, off by {worst:.1e} at most",
    )


def _reads_means(folder: Path) -> list[Path]:
    from checkpoints import save_checkpoint

    save_checkpoint(folder / "mean", dtype=torch.bfloat16)
    said = '[head]\nkind = "linear"\nweights = "score"\n[read]\nat = "mean"\n'
    (folder / "mean" / "rewardserve.toml").write_text(said)
    return [folder / "mean"]


def _over_one_backbone(folder: Path) -> list[Path]:
    from adapters import TARGETS, adapter_of, save_adapter
    from checkpoints import save_checkpoint

    save_checkpoint(folder / "base", dtype=torch.bfloat16)
    weights = load_file(folder / "base" / "model.safetensors")
    adapters = {"lora": TARGETS, "other": TARGETS[1:], "head": ()}
    for name, targets in adapters.items():
        save_adapter(folder / name, folder / "base", adapter_of(weights, targets=targets, seed=name))
    return [folder / name for name in adapters]


def _graphs_change_nothing(part: Part, make: Callable[[Path], list[Path]]) -> tuple[bool, str]:
    """Every model's scores are the same, bit for bit, replayed and kernel by kernel, cold and warm."""
    groups = groups_of(part, Traffic(300, 4, 100), 1_400, seed=11)  # what a graph holds, cold
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
