"""What the kernels reach: TFLOP/s and GB/s as served, then the tunings that might be better."""

import contextlib
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from kernels_of import attention_kernel, index_of, pool_kernel, store_kernel
from part import Part
from rewardserve_kernels.kv_cache.paged import store_rows
from rewardserve_kernels.pooling.reference import Norm, NormKind
from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment
from rewardserve_kernels.workspace import Workspace

PASSES_CACHE = 1 << 28  # bytes, in turns: what comes up again is not in the GPU's cache any more


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
        for tuning in _tunings(attention_kernel(part)):
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
        count = max(1, (PASSES_CACHE if part.on_gpu else 1) // (2 * num_spans * hidden_size))
        rows = [torch.randn(num_spans, hidden_size, device=part.device).bfloat16() for _ in range(min(count, 64))]
        turns = cycle(rows)
        first = torch.arange(num_spans, dtype=torch.int32, device=part.device)
        spans, weight = torch.stack([first, first + 1], 1), torch.randn(1, hidden_size, device=part.device)
        norm = Norm(NormKind.RMS, torch.ones(hidden_size, device=part.device), 1e-6)
        rate = rows[0].nbytes / part.seconds(lambda: pool_kernel(part)(next(turns), spans, weight, None, norm))  # noqa: B023
        pool_head[f"{num_spans} spans of {hidden_size}"] = {"gb_per_s": rate / 1e9, "share_of_copy": rate / copy}
    part.note(pool_head=pool_head)


def _measure_storing(part: Part) -> None:
    """Prompts of 512 tokens of one layer of the 8B shape; beside it what plain torch takes."""
    num, heads = (16, 8) if part.on_gpu else (1, 2)
    segments = [Segment(i * 512, 512, 0, tuple(range(4 * i, 4 * i + 4)), True) for i in range(num)]
    like = {"device": part.device, "dtype": torch.bfloat16}
    k, v = (torch.randn(512 * num, heads, 128, **like).transpose(0, 1) for _ in "kv")
    pools = [torch.zeros(4 * num, heads, BLOCK_TOKENS, 128, **like) for _ in "kv"]
    index = index_of(part, segments)
    found = {}
    for name, store in (("one launch", store_kernel(part)), ("torch", store_rows)):
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
        self._part, self._kernel, self._count, self._rows = part, attention_kernel(part), count, rows
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
