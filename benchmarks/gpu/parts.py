"""The parts of benchmarks/gpu/run.py, each run as a process: `parts.py NAME FOLDER DEVICE` writes FOLDER/result.json.

Models are made on the device, in true shapes and with random weights: only their config and their head are on disk.
"""

import asyncio
import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import random_model
import torch
import torch.nn.functional as F
from rewardserve.engine.base import EngineListener, EngineRequest, EngineResult
from rewardserve.engine.native.block_pool import BlockPool
from rewardserve.engine.native.engine import NativeEngine
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.options import NativeOptions
from rewardserve.engine.native.prefix_cache import PrefixCache
from rewardserve.engine.native.scheduler import Scheduler
from rewardserve.models import loader
from rewardserve.types import EncodedGroup
from rewardserve_kernels.attention import chunked
from rewardserve_kernels.attention import reference as attention_reference
from rewardserve_kernels.kv_cache.paged import StoreIndex, store_index, store_rows, store_segment
from rewardserve_kernels.pooling import reference as pooling_reference
from rewardserve_kernels.pooling.reference import Norm, NormKind, Pooling
from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment
from rewardserve_kernels.workspace import Workspace
from safetensors.torch import load_file, save_file
from work import ModelShape, least_seconds, shared

ROUNDS = 3
VOCAB_SIZE = 32_000
HF_BATCH = 8
TINY = "qwen3-tiny"


@dataclass(frozen=True, slots=True)
class Traffic:
    """Groups of random ids. Lengths are log-normal about those given, or just those where `spread` is 0."""

    prompt: int  # tokens
    responses: int
    tokens: int  # of each response
    spread: float = 0.0  # standard deviation of the logarithm of a length
    system: int = 0  # tokens that all groups begin with


LONGEST = 6.0  # times the median: where the real ones end
# There is neither text nor tokenizer where this runs. What is real text in benchmarks/run.py has the number, the median
# and the spread of its lengths here (4.4 characters a token); best_of_16 is the shape that predictions were made for.
TRAFFIC = {
    "best_of_16": Traffic(512, 16, 256),
    "shared_system": Traffic(23, 16, 166, spread=1.0, system=600),
    "pairs": Traffic(70, 2, 29, spread=1.0),
    "ppo": Traffic(256, 1, 512),
    "grpo_64": Traffic(1024, 64, 1024),
    "short_items": Traffic(120, 10, 180),
}
# Tokens of one round, prompts once: a second or two at the rates foreseen (benchmarks/NOTES.md).
ROUND_TOKENS = {"qwen3-0.6b": 400_000, "qwen3-4b": 130_000, "llama-3.1-8b": 70_000, TINY: 1_500}


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
        """Median of one, after three for warming up; on a GPU by its own clock."""
        for _ in range(3):
            action()
        self.wait()
        times: list[float] = []
        begun = time.perf_counter()
        while len(times) < 5 or time.perf_counter() - begun < at_least:
            if self.on_gpu:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
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


# -- the machine -------------------------------------------------------------------------------------------------------


def machine(part: Part) -> None:
    import transformers
    import triton

    name = torch.cuda.get_device_name() if part.on_gpu else "CPU"
    part.note(name=name, torch=torch.__version__, triton=triton.__version__, transformers=transformers.__version__)
    size = 1 << (31 if part.on_gpu else 24)
    source, target = (torch.empty(size, dtype=torch.uint8, device=part.device) for _ in range(2))
    part.note(copy_gb_per_s=2 * size / part.seconds(lambda: target.copy_(source)) / 1e9)
    n = 8192 if part.on_gpu else 256
    a, b = (torch.randn(n, n, device=part.device, dtype=torch.bfloat16) for _ in range(2))
    part.note(gemm_tflops=2 * n**3 / part.seconds(lambda: a @ b) / 1e12)
    x, w = (t.to(torch.float8_e4m3fn) for t in (a, b))
    scale = torch.ones(n, 1, device=part.device)

    def fp8() -> torch.Tensor:
        return torch._scaled_mm(x, w.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)

    part.note(gemm_fp8_tflops=2 * n**3 / part.seconds(fp8) / 1e12)
    part.say(f"{name}: {part.found}")


# -- the gate ----------------------------------------------------------------------------------------------------------


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


def _kernel(part: Part) -> Any:
    """Triton's, or what there is for a dry run."""
    if not part.on_gpu:
        return chunked
    from rewardserve_kernels.attention import triton

    return triton


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
    kernel = _kernel(part)
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
    _store_rows(part)(*at_once, *rows, _store_index(part, segments))
    for segment in segments:
        for pool, own in zip(one_by_one, rows, strict=True):
            if segment.store:
                store_segment(pool, own[:, segment.row : segment.row + segment.num_rows], segment)
    ok = all(torch.equal(a, b) for a, b in zip(at_once, one_by_one, strict=True))
    return ok, "430 rows of two segments"


def _store_index(part: Part, segments: Sequence[Segment]) -> StoreIndex:
    return StoreIndex(*(torch.from_numpy(row).to(part.device) for row in store_index(segments)))


def _store_rows(part: Part) -> Callable[..., None]:
    if not part.on_gpu:
        return store_rows
    from rewardserve_kernels.kv_cache import triton

    return triton.store_rows


def _pool_head_is_right(part: Part, pooling: Pooling) -> tuple[bool, str]:
    torch.manual_seed(0)
    like = {"device": part.device}
    hidden = torch.randn(300, 2560, **like).bfloat16()
    spans = torch.tensor([[0, 7], [7, 8], [8, 139], [139, 300]], dtype=torch.int32, **like)
    weight, bias = torch.randn(3, 2560, **like), torch.randn(3, **like)
    norm = Norm(NormKind.RMS, torch.rand(2560, **like) + 0.5, 1e-6)
    got = _pool_head(part)(hidden, spans, weight, bias, norm, pooling)
    wanted = pooling_reference.pool_head(hidden, spans, weight, bias, norm, pooling)
    error = ((got - wanted).norm() / wanted.norm()).item()
    return error < 1e-5, f"relative error {error:.1e}"


def _pool_head(part: Part) -> Callable[..., torch.Tensor]:
    if not part.on_gpu:
        return pooling_reference.pool_head
    from rewardserve_kernels.pooling import triton

    return triton.pool_head


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
    if part.on_gpu and loaded.model.backbone.attention is not _kernel(part):
        return False, "its attention is not Triton's, which did not agree"
    return True, f"final hidden states within {info.canary_error:.1e} of padded Hugging Face"


def _nothing_waits(part: Part) -> tuple[bool, str]:
    """A step that waited for the device would raise here: replayed, or kernel by kernel."""
    counts = [_steps_that_do_not_wait(part, cuda_graphs) for cuda_graphs in (True, False)]
    return True, f"{counts[0]} steps with graphs, {counts[1]} without"


def _steps_that_do_not_wait(part: Part, cuda_graphs: bool) -> int:
    with _model(part, "qwen3-0.6b" if part.on_gpu else TINY) as folder:
        loaded = load_runner(_options(part, folder, path="packed", compile="off", cuda_graphs=cuda_graphs))
    runner: Any = loaded.runner
    _require((runner._graphs is not None) == (cuda_graphs and part.on_gpu), f"graphs: {runner._graphs}")
    count = 0
    for max_tokens in (1024, 4096):  # what a graph holds, and what none does
        scheduler = Scheduler(PrefixCache(BlockPool(runner.num_blocks)), max_tokens, 512)
        for number, (prompt, responses) in enumerate(_groups(part, Traffic(300, 4, 200), 20_000, seed=max_tokens)):
            group = EncodedGroup(_bytes(prompt), tuple(map(_bytes, responses)))
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


def _require(holds: bool, message: str) -> None:
    """What a check would be worth nothing without."""
    if not holds:
        raise RuntimeError(message)


def _engine_is_invariant(part: Part) -> tuple[bool, str]:
    """With everything that is on by default: compiled layers, CUDA graphs, batch invariance."""
    name = "qwen3-0.6b" if part.on_gpu else TINY
    ids = np.random.default_rng(3).integers(10, VOCAB_SIZE if part.on_gpu else 2000, 4000).tolist()
    group = (ids[:300], [ids[1000:1200], ids[1300:1301], ids[1400:1650]])
    others = [(ids[i : i + 200 + 13 * i], [ids[500 + i : 600 + 9 * i], ids[50 : 55 + i]]) for i in range(12)]
    with _model(part, name) as folder:

        async def scores() -> list[list[float]]:
            got = []
            for _ in range(2):
                async with _engine(part, folder) as engine:
                    if part.on_gpu:  # where one of these failed there would be a warning, and less to compare
                        loop: Any = engine._loop
                        layer = loop._loaded.model.backbone.decoder_layers[0]
                        _require(loop._runner._graphs is not None, "there are no graphs")
                        _require(layer._compiled_call_impl is not None, "layers are not compiled")
                    got.append(_scores(await _score(engine, [group])))  # cold, alone; a graph's forward
                    got.append(_scores(await _score(engine, [group])))  # warm
                    for shift in range(5):
                        batch = [*others[shift:], group, *others[:shift]]
                        result = await _score(engine, batch)
                        got.append([item.score for item in result.groups[len(others) - shift].items])
                async with _engine(part, folder) as engine:
                    result = await _score(engine, [*others, group])  # cold, in a batch
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
    groups = _groups(part, Traffic(300, 4, 100), 2_000, seed=11)
    groups = [([i % 200 for i in prompt], [[i % 200 for i in r] for r in responses]) for prompt, responses in groups]

    async def scores(sources: list[Path], cuda_graphs: bool) -> list[list[float]]:
        beside = tuple(map(str, sources[1:]))
        options = {"beside": beside, "compile": "off", "prefix_cache_bytes": 64 << 20}
        async with _engine(part, str(sources[0]), cuda_graphs=cuda_graphs, **options) as engine:
            runner: Any = engine._loop._runner  # type: ignore[union-attr]
            replays = _count_replays(runner._graphs) if cuda_graphs and part.on_gpu else [None]
            rounds = [variant for _ in range(2) for variant in range(len(sources))]
            found = [_scores(await _score(engine, groups, variant)) for variant in rounds]
            _require(bool(replays), "nothing was replayed")
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


# -- the kernels -------------------------------------------------------------------------------------------------------


def kernels(part: Part) -> None:
    """What is most worth knowing first: the figures as served, then the tunings that might be better."""
    attention: dict[str, Any] = {}
    shapes = {"0.6B": (16, 8, 128), "4B": (32, 8, 128), "64 wide": (14, 2, 64)}
    packs = {"512 + 16 x 256": (512, 16, 256), "1024 + 16 x 1024": (1024, 16, 1024), "16 x 512": (0, 16, 512)}
    if not part.on_gpu:
        shapes, packs = {"tiny": (4, 2, 64)}, {"64 + 2 x 32": (64, 2, 32)}
    cases = {
        f"{shape}, {pack}": _Attention(part, *sizes, *rows)
        for pack, rows in packs.items()
        for shape, sizes in shapes.items()
        if shape == "4B" or "1024" not in pack
    }
    for name, case in cases.items():
        attention[name] = {"default_tflops": case.rate(), "flash_tflops": case.flash_rate(), "tflops": {}}
        part.note(attention=attention)
        part.say(f"attention {name}: {attention[name]}")
    _measure_pool_head(part)
    _measure_storing(part)
    if not part.on_gpu:
        return
    for name, case in cases.items():
        for tuning in _tunings(_kernel(part)):
            with contextlib.suppress(Exception):  # more shared memory or registers than there are
                attention[name]["tflops"][_said(tuning)] = case.rate(tuning=tuning)
                part.note()
        part.say(f"attention {name}: {attention[name]}")


def _measure_pool_head(part: Part) -> None:
    pool_head: dict[str, Any] = {}
    source, target = (
        torch.empty(1 << (30 if part.on_gpu else 20), dtype=torch.uint8, device=part.device) for _ in "ab"
    )
    copy = 2 * source.nbytes / part.seconds(lambda: target.copy_(source))
    for hidden_size, num_spans in ((1024, 4096), (4096, 4096), (4096, 64)) if part.on_gpu else ((64, 16),):
        hidden = torch.randn(num_spans, hidden_size, device=part.device).bfloat16()
        first = torch.arange(num_spans, dtype=torch.int32, device=part.device)
        spans, weight = torch.stack([first, first + 1], 1), torch.randn(1, hidden_size, device=part.device)
        norm = Norm(NormKind.RMS, torch.ones(hidden_size, device=part.device), 1e-6)
        rate = hidden.nbytes / part.seconds(lambda: _pool_head(part)(hidden, spans, weight, None, norm))  # noqa: B023
        pool_head[f"{num_spans} spans of {hidden_size}"] = {"gb_per_s": rate / 1e9, "share_of_copy": rate / copy}
    part.note(pool_head=pool_head)


def _measure_storing(part: Part) -> None:
    """Prompts of 512 tokens of one layer of the 8B shape; beside it what plain torch takes."""
    num, heads = (16, 8) if part.on_gpu else (1, 2)
    segments = [Segment(i * 512, 512, 0, tuple(range(4 * i, 4 * i + 4)), True) for i in range(num)]
    like = {"device": part.device, "dtype": torch.bfloat16}
    k, v = (torch.randn(512 * num, heads, 128, **like).transpose(0, 1) for _ in "kv")
    pools = [torch.zeros(4 * num, heads, BLOCK_TOKENS, 128, **like) for _ in "kv"]
    index = _store_index(part, segments)
    found = {}
    for name, store in (("one launch", _store_rows(part)), ("torch", store_rows)):
        seconds = part.seconds(lambda: store(*pools, k, v, index))  # noqa: B023
        found[name] = {"us": 1e6 * seconds, "gb_per_s": 2 * (k.nbytes + v.nbytes) / seconds / 1e9}
    part.note(storing=found)


def _tunings(kernel: Any) -> Iterator[Any]:
    """A compile takes a second or two for each head size, and there is a minute or two for all."""
    for block_m, num_warps in ((64, 4), (128, 8)):
        for block_n in (32, 64, 128):
            for num_stages in (2, 3, 4):
                yield kernel.Tuning(block_m, block_n, num_warps, num_stages)


def _said(tuning: Any) -> str:
    return f"{tuning.block_m}x{tuning.block_n}, {tuning.num_warps} warps, {tuning.num_stages} stages"


class _Attention:
    """`count` segments of `rows` behind one prefix."""

    def __init__(self, part: Part, heads: int, kv_heads: int, size: int, prefix: int, count: int, rows: int) -> None:
        like = {"device": part.device, "dtype": torch.bfloat16}
        num_blocks = -(-prefix // BLOCK_TOKENS) or 1
        total = count * rows
        self._q = torch.randn(total, heads, size, **like).transpose(0, 1)
        self._kv = [torch.randn(total, kv_heads, size, **like).transpose(0, 1) for _ in range(2)]
        self._pools = [torch.randn(num_blocks, kv_heads, BLOCK_TOKENS, size, **like) for _ in range(2)]
        blocks = tuple(range(num_blocks)) if prefix else ()
        segments = [Segment(i * rows, rows, prefix, blocks, False) for i in range(count)]
        self._own_flop = 4.0 * heads * size * count * rows * (rows + 1) / 2
        self._flop = self._own_flop + 4.0 * heads * size * count * rows * prefix
        self._part, self._kernel, self._count, self._rows = part, _kernel(part), count, rows
        self._plan = self._kernel.plan_attention(segments, torch.bfloat16, part.device, 0, False)

    def rate(self, **tuning: Any) -> float:
        """TFLOP/s."""
        scale, tensors = self._q.shape[2] ** -0.5, (self._q, *self._kv, *self._pools)
        attend = self._kernel.tree_attention
        seconds = self._part.seconds(lambda: attend(*tensors, self._plan, Workspace(), scale, **tuning), 0.05)
        return self._flop / seconds / 1e12

    def flash_rate(self) -> float:
        """Of torch's own without a stored beginning: what a plain causal kernel reaches on as many rows."""
        flat = (
            t.transpose(0, 1).reshape(self._count, self._rows, -1, t.shape[2]).transpose(1, 2)
            for t in (self._q, *self._kv)
        )
        q, k, v = flat
        attend = F.scaled_dot_product_attention
        seconds = self._part.seconds(lambda: attend(q, k, v, is_causal=True, enable_gqa=True), 0.05)
        return self._own_flop / seconds / 1e12


# -- models ------------------------------------------------------------------------------------------------------------


class RandomWeights:
    """Stands in for AutoModel: what the config describes, made on the device."""

    device: torch.device

    @staticmethod
    def from_config(config: Any) -> Any:
        from transformers import AutoModel

        return AutoModel.from_config(config)

    @classmethod
    def from_pretrained(cls, folder: object, config: Any, dtype: torch.dtype, **_: Any) -> tuple[Any, dict[str, Any]]:
        from transformers import AutoModel

        torch.manual_seed(0)
        with torch.device(cls.device):
            module = AutoModel.from_config(config, dtype=dtype)
        return module, {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []}


@contextlib.contextmanager
def _model(part: Part, name: str) -> Iterator[str]:
    """A folder that loads as the model of that name."""
    config = random_model._config(name, VOCAB_SIZE if part.on_gpu else 2000)
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(1, config.hidden_size, generator=generator) / config.hidden_size**0.5
    RandomWeights.device = part.device
    real, loader.AutoModel = loader.AutoModel, RandomWeights  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForSequenceClassification"]
        config.dtype = "bfloat16"
        config.save_pretrained(folder)
        save_file({"score.weight": head.bfloat16()}, Path(folder) / "model.safetensors")
        try:
            yield folder
        finally:
            loader.AutoModel = real


def _options(part: Part, folder: str, **options: Any) -> NativeOptions:
    """Of a model in bf16: random weights on the device say nothing of the precision that they are stored in."""
    small = {} if part.on_gpu else {"prefix_cache_bytes": 64 << 20, "max_batch_tokens": 1024}
    return NativeOptions(folder, device=str(part.device), **{"dtype": "bfloat16", **small, **options})


@contextlib.asynccontextmanager
async def _engine(part: Part, folder: str, **options: Any) -> Any:
    engine = NativeEngine(_options(part, folder, path="packed", **options))
    info = await engine.start(EngineListener())
    _require(info.dtype in ("bfloat16", "fp8"), f"it computes in {info.dtype}")
    try:
        yield engine
    finally:
        await engine.stop()


_numbers = iter(range(10**9))


async def _score(
    engine: NativeEngine, groups: Sequence[tuple[list[int], list[list[int]]]], variant: int = 0
) -> EngineResult:
    """All at once, each group a request of its own; the result is theirs together."""
    encoded = [EncodedGroup(_bytes(prompt), tuple(map(_bytes, responses))) for prompt, responses in groups]
    requests = [EngineRequest(str(next(_numbers)), (group,), variant=variant) for group in encoded]
    results = await asyncio.gather(*(engine.score(request) for request in requests))
    return EngineResult(tuple(group for result in results for group in result.groups), 0.0, 0.0)


def _bytes(ids: list[int]) -> bytes:
    return array("i", ids).tobytes()


def _scores(result: EngineResult) -> list[float]:
    failures = [item.failure for group in result.groups for item in group.items if item.failure]
    if failures:
        raise RuntimeError(f"{len(failures)} pairs have no score: {failures[0]}")
    return [item.score for group in result.groups for item in group.items if item.score is not None]


def _groups(part: Part, traffic: Traffic, tokens: int, seed: int) -> list[tuple[list[int], list[list[int]]]]:
    """Of about so many tokens in all, what is common counted once; behind what all share no two prompts begin alike."""
    if not part.on_gpu:
        smaller = {"prompt": traffic.prompt // 8, "tokens": traffic.tokens // 8, "system": traffic.system // 8}
        traffic = replace(traffic, responses=min(4, traffic.responses), **smaller)
    generator = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return generator.integers(10, VOCAB_SIZE if part.on_gpu else 2000, length).tolist()

    def some(median: int) -> list[int]:
        times = np.exp(traffic.spread * generator.standard_normal()) if traffic.spread else 1.0
        return ids(max(1, int(median * min(LONGEST, times))))

    groups: list[tuple[list[int], list[list[int]]]] = []
    system, left = ids(traffic.system), tokens - traffic.system
    while not groups or left > 0:
        prompt, responses = some(traffic.prompt), [some(traffic.tokens) for _ in range(traffic.responses)]
        groups.append(([*system, *prompt], responses))
        left -= len(prompt) + sum(map(len, responses))
    return groups


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
    with _model(part, name) as folder:
        shape = ModelShape.of(Path(folder))
        rates = _rates(part, shape)
        part.note(linear_tflops={key: rate / 1e12 for key, rate in rates.items()}, more={})
        asyncio.run(_measure(part, folder, name, shape, rates, everything))
        _measure_hugging_face(part, folder, name, shape, rates)


async def _measure(
    part: Part, folder: str, name: str, shape: ModelShape, rates: dict[str, float], everything: bool
) -> None:
    started = time.perf_counter()
    async with _engine(part, folder) as engine:
        part.found["more"]["load_s"] = round(time.perf_counter() - started, 1)
        info = engine._loop._loaded.info  # type: ignore[union-attr]
        part.found["more"]["canary_error"] = f"{info.canary_error:.1e}"
        part.found["more"]["prefix_cache_tokens"] = info.prefix_cache_tokens
        workloads: dict[str, Any] = {}
        for workload, traffic in TRAFFIC.items():
            workloads[workload] = await _throughput(part, engine, traffic, ROUND_TOKENS[name], shape, rates)
            part.note(workloads=workloads)
            part.say(f"{name} {workload}: {workloads[workload]}")
        probe = _groups(part, TRAFFIC["best_of_16"], 4_000, seed=99)
        (part.folder / f"scores {name}.json").write_text(json.dumps(_scores(await _score(engine, probe))))
        if everything:
            await _latency(part, engine)
            await _budgets(part, engine, name, shape, rates)
    if part.on_gpu:
        part.found["more"]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        part.note()


async def _throughput(
    part: Part, engine: NativeEngine, traffic: Traffic, tokens: int, shape: ModelShape, rates: dict[str, float]
) -> dict[str, Any]:
    times, seed = [], hash(traffic) % 1_000_000
    await _score(engine, _groups(part, traffic, 1, seed))  # what the first forward of a kind sets up
    for number in range(ROUNDS):
        groups = _groups(part, traffic, tokens, seed + 1 + number)
        started = time.perf_counter()
        _scores(await _score(engine, groups))
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
        for number in range(60):
            groups = _groups(part, Traffic(256, 4, 64), 1, seed=500 + number)
            started = time.perf_counter()
            await _score(engine, groups)
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
    gc.collect()  # what the engine held
    if part.on_gpu:
        torch.cuda.empty_cache()
    found: dict[str, str] = {}
    part.found["more"][f"hugging face, batches of {HF_BATCH}"] = found
    config = random_model._config(name, VOCAB_SIZE if part.on_gpu else 2000)
    try:
        model = RandomWeights.from_pretrained(folder, config, torch.bfloat16)[0].eval()
        for workload in ("best_of_16", "shared_system"):
            groups = _groups(part, TRAFFIC[workload], ROUND_TOKENS[name] // 10, seed=7)
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
        found["failed"] = "it did not fit beside what was there"
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
    with _model(part, name) as folder:
        shape = ModelShape.of(Path(folder))
        rates = _rates(part, shape)
        part.note(options=options, more={})

        async def measure() -> None:
            async with _engine(part, folder, **options) as engine:
                traffic = TRAFFIC["best_of_16"]
                result = await _throughput(part, engine, traffic, ROUND_TOKENS[name], shape, rates)
                part.note(workloads={"best_of_16": result})
                probe = _groups(part, traffic, 4_000, seed=99)
                _compare(part, name, _scores(await _score(engine, probe)))

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


PARTS: dict[str, Callable[[Part], None]] = {
    "machine": machine,
    "gate": gate,
    "kernels": kernels,
    "qwen3-0.6b": lambda part: model(part, "qwen3-0.6b", everything=True),
    "qwen3-4b": lambda part: model(part, "qwen3-4b", everything=False),
    "llama-3.1-8b": lambda part: model(part, "llama-3.1-8b", everything=False),
    "qwen3-0.6b variant": lambda part: variant(part, "qwen3-0.6b", batch_invariant=False),
    "llama-3.1-8b fp8": lambda part: variant(part, "llama-3.1-8b", quantize="fp8"),
}


if __name__ == "__main__":
    PARTS[sys.argv[1]](Part(Path(sys.argv[2]), sys.argv[3]))
