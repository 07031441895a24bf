"""Kinds of attention that one compiled kernel each serves, and calls of them."""

from dataclasses import dataclass
from typing import Any

import torch
from kernels_of import attention_kernel
from part import Part
from rewardserve_kernels.kv_cache.paged import store_segment
from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment
from rewardserve_kernels.workspace import Workspace

# (start, rows) of segments: starts in mid-block, single rows, a whole block, one more than a block
RAGGED = ((0, 1), (0, 129), (70, 33), (128, 128), (200, 5), (255, 1), (130, 300), (0, 128), (1000, 70))
RAGGED_TINY = ((0, 1), (0, 129), (200, 5))
NUM_BLOCKS = 40


@dataclass(frozen=True, slots=True)
class Case:
    """What a kernel is compiled for."""

    head_size: int
    v_head_size: int
    heads: int = 8
    kv_heads: int = 2
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    tuning: Any = None  # None: the one that serves such heads

    def __str__(self) -> str:
        options = [name for name in ("window", "softcap", "sinks") if getattr(self, name)]
        sizes = f"{self.head_size}/{self.v_head_size}, {self.heads}/{self.kv_heads} heads"
        return f"{sizes}, {' + '.join(options) or 'plain'}{f', {said(self.tuning)}' if self.tuning else ''}"


@dataclass(frozen=True, slots=True)
class Inputs:
    """Tensors as of `tree_attention`, and the segments they are of."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pool_k: torch.Tensor
    pool_v: torch.Tensor
    segments: list[Segment]
    sinks: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k, self.v, self.pool_k, self.pool_v


def said(tuning: Any) -> str:
    registers = f", {tuning.max_registers} registers" if tuning.max_registers else ""
    return f"{tuning.block_m}x{tuning.block_n}, {tuning.num_warps} warps, {tuning.num_stages} stages{registers}"


def ragged(part: Part, case: Case) -> Inputs:
    """Over a pool in which every slot that may not be read is NaN."""
    torch.manual_seed(0)
    like = {"device": part.device, "dtype": torch.bfloat16}
    sizes, kv_heads = (case.head_size, case.v_head_size), case.kv_heads
    pools = [torch.full((NUM_BLOCKS, kv_heads, BLOCK_TOKENS, size), float("nan"), **like) for size in sizes]
    free = iter(torch.randperm(NUM_BLOCKS).tolist())
    segments, row = [], 0
    for start, rows in RAGGED_TINY if part.tiny else RAGGED:
        blocks = tuple(next(free) for _ in range(-(-start // BLOCK_TOKENS)))
        for pool, size in zip(pools, sizes, strict=True):
            store_segment(pool, torch.randn(kv_heads, start, size, **like), Segment(0, start, 0, blocks, store=True))
        segments.append(Segment(row, rows, start, blocks, store=False))
        row += rows
    q = torch.randn(case.heads, row, case.head_size, **like)
    k, v = (torch.randn(kv_heads, row, size, **like) for size in sizes)
    sinks = torch.randn(case.heads, device=part.device).bfloat16() if case.sinks else None
    return Inputs(q, k, v, *pools, segments, sinks)


def attend(part: Part, case: Case, inputs: Inputs) -> torch.Tensor:
    kernel, q = attention_kernel(part), inputs.q
    plan = kernel.plan_attention(inputs.segments, q.dtype, q.device, case.window, False)
    options = {"tuning": case.tuning} if case.tuning else {}
    return kernel.tree_attention(
        *inputs.tensors, plan, Workspace(), q.shape[2] ** -0.5, softcap=case.softcap, sinks=inputs.sinks, **options
    )
