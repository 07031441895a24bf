"""Tree attention for CPUs with bf16 dot products: avx512.cpp, built at first use.

Three times as fast as attention.chunked on many short segments and twice on long ones (Zen 5, two cores: 400 to 560
GFLOP/s against 110 to 340), with a third of its error, since scores are never rounded to bf16; and no memory that
grows with the length of a sequence. On matrix units (AMX), for head sizes that are a multiple of 32, 2.3 to
5 x as fast as attention.chunked, whose products are on them too (a Xeon of two cores, the same shapes: 460 to 1,020
GFLOP/s).
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rewardserve_kernels import cpu_code
from rewardserve_kernels.ragged import Segment, siblings_of
from rewardserve_kernels.workspace import Workspace

NEEDED = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"})
MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 32, 256  # of queries for one laying out of the keys they share
CHUNKS_PER_THREAD = 4  # and for each head: enough that all threads end at about the same time


class _Tensors(ctypes.Structure):
    """`Tensors` of avx512.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_int64) for name in ("q_head", "q_row", "k_head", "k_row", "v_head", "v_row")),
        *((name, ctypes.c_void_p) for name in ("pool_k", "pool_v", "sinks", "out")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_size", "v_head_size", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """How the attention of one pack is cut into pieces of work: the same for all layers of one window."""

    num_rows: int
    window: int
    parts: np.ndarray  # [num_parts, 4] int64: `Part`
    chunks: np.ndarray  # [num_chunks, 4] int64: `Chunk`
    blocks: np.ndarray  # int64: those of all chunks, one after the other
    max_rows: int  # of a chunk


def load() -> None:
    """Builds it if need be. Raises cpu_code.CannotBuild where it cannot run here."""
    _library()


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpu_code.load(Path(__file__).with_suffix(".cpp"), NEEDED)
    pointer = ctypes.c_void_p
    arguments = [pointer, pointer, ctypes.c_int64, pointer, pointer, ctypes.c_int64, ctypes.c_int]
    library.tree_attention.argtypes, library.tree_attention.restype = arguments, None
    return library


def plan_attention(
    segments: Sequence[Segment], dtype: torch.dtype, device: torch.device, window: int = 0, last_rows_only: bool = False
) -> Plan:
    """As chunked.plan_attention. Raises ValueError for anything but bf16 on a CPU."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        raise ValueError(f"attention.avx512 is for bfloat16 on a cpu, not {dtype} on {device.type}")
    num_rows = len(segments) if last_rows_only else sum(segment.num_rows for segment in segments)
    share = num_rows // (CHUNKS_PER_THREAD * torch.get_num_threads())
    room = max_rows = min(max(share, MIN_CHUNK_ROWS), MAX_CHUNK_ROWS)
    parts: list[tuple[int, int, int, int]] = []
    chunks: list[tuple[int, int, int, int]] = []
    blocks: list[int] = []
    row = 0
    for siblings in siblings_of(segments):
        first_part, first_block, start = len(parts), len(blocks), siblings[0].start
        blocks += siblings[0].blocks
        for segment in siblings:
            position = segment.end - 1 if last_rows_only else segment.start
            while position < segment.end:
                count = min(segment.end - position, room)
                parts.append((row, count, position, segment.row))
                row, position, room = row + count, position + count, room - count
                if not room:
                    chunks.append((first_part, len(parts), start, first_block))
                    first_part, room = len(parts), max_rows
        if first_part < len(parts):
            chunks.append((first_part, len(parts), start, first_block))
            room = max_rows
    arrays = (np.array(rows, np.int64) for rows in (parts, chunks, blocks))
    return Plan(num_rows, window, *arrays, max_rows)


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pool_k: torch.Tensor,
    pool_v: torch.Tensor,
    plan: Plan,
    workspace: Workspace,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """As chunked.tree_attention; it takes nothing from the workspace. Raises ValueError for an odd head size."""
    heads, _, head_size = q.shape
    if head_size % 2:
        raise ValueError(f"attention.avx512 is for head sizes that are even, not {head_size}")
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    assert pool_k.is_contiguous() and pool_v.is_contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    out = q.new_empty(plan.num_rows, heads, v.shape[-1])
    tensors = _Tensors(
        *(t.data_ptr() for t in (q, k, v)),
        *(stride for t in (q, k, v) for stride in t.stride()[:2]),
        *(t.data_ptr() for t in (pool_k, pool_v)),
        None if sinks is None else sinks.data_ptr(),
        out.data_ptr(),
        *(heads, k.shape[0], head_size, v.shape[-1], plan.window),
        *(scale, softcap),
    )
    _library().tree_attention(
        ctypes.byref(tensors),
        *(plan.chunks.ctypes.data, len(plan.chunks), plan.parts.ctypes.data, plan.blocks.ctypes.data),
        *(plan.max_rows, torch.get_num_threads()),
    )
    return out
