"""What the kernels reach as they serve: TFLOP/s and GB/s, and the share of the machine's ceilings that is."""

from typing import Any

import torch
import torch.nn.functional as F
from attention_case import Case
from kernels_of import attention_kernel, index_of, pool_kernel, store_kernel, sum_kernel
from part import Part, in_turns
from rewardserve_kernels.kv_cache.paged import store_rows
from rewardserve_kernels.pooling.reference import Norm, NormKind
from rewardserve_kernels.pooling.running_mean import Pieces, sum_pieces
from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment
from rewardserve_kernels.workspace import Workspace

SHAPES = {  # heads, kv heads, head size
    "4B and 8B": (32, 8, 128),
    "0.6B": (16, 8, 128),
    "64 wide": (14, 2, 64),
    "256 wide": (8, 4, 256),
}
BEST_OF_16, LONG = "512 + 16 x 256", "1024 + 16 x 1024"  # the second for one shape only
PACKS = {BEST_OF_16: (512, 16, 256), LONG: (1024, 16, 1024), "16 x 512": (0, 16, 512)}  # tokens before, segments, rows
TINY_SHAPES, TINY_PACKS = {"tiny": (4, 2, 64)}, {"64 + 2 x 32": (64, 2, 32)}


def shapes(part: Part) -> dict[str, tuple[int, int, int]]:
    return TINY_SHAPES if part.tiny else SHAPES


def cases(part: Part) -> list[Case]:
    """What the figures' kernels are compiled for."""
    return [Case(size, size, heads, kv_heads) for heads, kv_heads, size in shapes(part).values()]


def kernels(part: Part) -> None:
    machine = part.of("machine")
    copy, gemm = machine.get("copy_gb_per_s"), machine.get("gemm_tflops")
    attention: dict[str, Any] = {}
    for pack, rows in (TINY_PACKS if part.tiny else PACKS).items():
        for shape, sizes in shapes(part).items():
            if pack != LONG or shape == "4B and 8B":
                name, case = f"{shape}, {pack}", Attention(part, *sizes, *rows)
                rate = case.rate()
                attention[name] = {"tflops": rate, "share_of_gemm": gemm and rate / gemm, "flash_tflops": case.flash()}
                part.note(attention=attention)
                part.say(f"attention {name}: {attention[name]}")
    for name, measure in {"pool_head": _pool_head, "storing": _storing, "sums": _sums}.items():
        part.note(**{name: measure(part, copy)})
        part.say(f"{name}: {part.found[name]}")


def _figure(nbytes: float, seconds: float, copy: float | None) -> dict[str, Any]:
    rate = nbytes / seconds / 1e9
    return {"us": 1e6 * seconds, "gb_per_s": rate, "share_of_copy": copy and rate / copy}


def _pool_head(part: Part, copy: float | None) -> dict[str, Any]:
    found = {}
    for hidden_size, num_spans in ((64, 16),) if part.tiny else ((1024, 4096), (4096, 4096), (4096, 64)):
        rows = in_turns(part, lambda: torch.randn(num_spans, hidden_size, device=part.device).bfloat16())  # noqa: B023
        first = torch.arange(num_spans, dtype=torch.int32, device=part.device)
        spans, weight = torch.stack([first, first + 1], 1), torch.randn(1, hidden_size, device=part.device)
        norm = Norm(NormKind.RMS, torch.ones(hidden_size, device=part.device), 1e-6)
        seconds = part.seconds(lambda: pool_kernel(part)(next(rows), spans, weight, None, norm))  # noqa: B023
        found[f"{num_spans} spans of {hidden_size}"] = _figure(2 * num_spans * hidden_size, seconds, copy)
    return found


def _storing(part: Part, copy: float | None) -> dict[str, Any]:
    """Prompts of 512 tokens of one layer of the 8B shape; beside it what plain torch takes."""
    num, heads, length = (1, 2, 128) if part.tiny else (16, 8, 512)
    each = length // BLOCK_TOKENS
    segments = [Segment(i * length, length, 0, tuple(range(each * i, each * (i + 1))), True) for i in range(num)]
    like = {"device": part.device, "dtype": torch.bfloat16}

    def layer() -> list[torch.Tensor]:
        pools = [torch.zeros(each * num, heads, BLOCK_TOKENS, 128, **like) for _ in "kv"]
        return [*pools, *(torch.randn(length * num, heads, 128, **like).transpose(0, 1) for _ in "kv")]

    layers, index = in_turns(part, layer), index_of(part, segments)
    nbytes = 2 * sum(t.nbytes for t in next(layers)[2:])
    stores = {"one launch": store_kernel(part), "torch": store_rows}
    return {
        name: _figure(nbytes, part.seconds(lambda: store(*next(layers), index)), copy)  # noqa: B023
        for name, store in stores.items()
    }


def _sums(part: Part, copy: float | None) -> dict[str, Any]:
    """8,192 rows of 1,024 in pieces of a block: of a head that reads means. Beside it what plain torch takes."""
    count, longest, hidden_size = (2, 8, 64) if part.tiny else (64, BLOCK_TOKENS, 1024)
    begins = torch.arange(count, device=part.device) * longest
    pieces = Pieces(begins, torch.full_like(begins, longest), torch.full_like(begins, -1), longest)
    sums = torch.zeros(1, hidden_size, device=part.device)
    rows = in_turns(part, lambda: torch.randn(count * longest, hidden_size, device=part.device))
    nbytes = 4 * count * longest * hidden_size
    return {
        name: _figure(nbytes, part.seconds(lambda: add(next(rows), pieces, sums)), copy)  # noqa: B023
        for name, add in {"one launch": sum_kernel(part), "torch": sum_pieces}.items()
    }


class Attention:
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

    def flash(self) -> float:
        """TFLOP/s of torch's own without a stored beginning: what a plain causal kernel reaches on as many rows."""
        q, k, v = (
            t.transpose(0, 1).reshape(self._count, self._rows, -1, t.shape[2]).transpose(1, 2)
            for t in (self._q, *self._kv)
        )
        attend = F.scaled_dot_product_attention
        seconds = self._part.seconds(lambda: attend(q, k, v, is_causal=True, enable_gqa=True), 0.05)
        return self._own_flop / seconds / 1e12
