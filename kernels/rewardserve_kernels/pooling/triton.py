"""Final norm, pooling and heads for CUDA in one Triton launch: a program for each span, which takes its rows in order,
or for the last rows of several. And the sums of rows that running means are made of, in one launch as well.

A row is held in registers whole, so it is read once and its sums are all of one shape. Rows are added one after the
other in fp32. So a score is the same bit for bit alone or in a pack, and wherever its span was cut. The price is that
a long mean goes no faster than one multiprocessor can read; not yet measured on a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from rewardserve_kernels.pooling.reference import Norm, NormKind, Pooled, Pooling, check_arguments
from rewardserve_kernels.pooling.running_mean import Pieces

MAX_HIDDEN_SIZE = 16384  # beyond it a row does not fit in a program's registers
SUM_COLUMNS = 128  # of a program that sums up: many programs, for there are few pieces
SUM_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
VALUES_OF_A_THREAD = 64  # of last rows: a program's norm and head are read once for all of them
MOST_LAST_ROWS = 8
ROW_BYTES_AHEAD = 16384  # of rows of up to this, three are loaded ahead; of longer ones, which fill shared memory, one


def pool_head(
    hidden: torch.Tensor,
    spans: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor | None = None,
    norm: Norm | None = None,
    pooling: Pooling = Pooling.LAST,
    before: Pooled | None = None,
    sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """As reference.pool_head. Raises ValueError also for tensors that are not on a GPU and for too wide rows."""
    check_arguments(hidden, spans, head_weight, head_bias, norm, pooling, before, sums)
    hidden_size, num_spans, heads = hidden.shape[1], len(spans), len(head_weight)
    if isinstance(pool_span, triton.JITFunction) and hidden.device.type != "cuda":
        raise ValueError(f"pooling.triton is for cuda, not {hidden.device.type}")
    if hidden_size > MAX_HIDDEN_SIZE:
        raise ValueError(f"pooling.triton takes rows of up to {MAX_HIDDEN_SIZE}, not {hidden_size}")
    scores = hidden.new_empty(num_spans, heads, dtype=torch.float32)
    optional = [
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        head_bias,
        None if before is None else before.sums,
        None if before is None else before.counts,
        sums,
    ]
    if not num_spans:
        return scores
    tensors = (hidden, spans.contiguous(), head_weight.contiguous(), scores)
    rest = [scores if t is None else t.contiguous() for t in optional]  # something must be there; it is not read
    numbers = (hidden.stride(0), heads, 0.0 if norm is None else norm.eps)
    fixed = constants(hidden_size, hidden.dtype, norm, pooling) | {"HAS_HEAD_BIAS": head_bias is not None}
    if pooling is Pooling.LAST:
        grid = (triton.cdiv(num_spans, fixed["ROWS"]),)
        score_last_rows[grid](*tensors, *rest[:3], *numbers, num_spans, **fixed, **compiler_options(hidden_size))
    else:
        fixed |= {"HAS_BEFORE": before is not None, "KEEPS_SUMS": sums is not None}
        pool_span[(num_spans,)](*tensors, *rest, *numbers, **fixed, **compiler_options(hidden_size))
    return scores


def constants(hidden_size: int, dtype: torch.dtype, norm: Norm | None, pooling: Pooling) -> dict[str, Any]:
    """Those of `pool_span`, or of `score_last_rows`, that a model fixes."""
    block, threads = triton.next_power_of_2(hidden_size), 32 * compiler_options(hidden_size)["num_warps"]
    last_rows = {"ROWS": max(1, min(MOST_LAST_ROWS, VALUES_OF_A_THREAD * threads // block))}
    ahead = {"STAGES": 4 if hidden_size * dtype.itemsize <= ROW_BYTES_AHEAD else 2}
    return {
        "HIDDEN_SIZE": hidden_size,
        "BLOCK": block,
        **(last_rows if pooling is Pooling.LAST else ahead),
        "HAS_NORM": norm is not None,
        "CENTERS": norm is not None and norm.kind is NormKind.LAYER,
        "HAS_NORM_BIAS": norm is not None and norm.bias is not None,
        "PLUS_ONE": norm is not None and norm.plus_one,
    }


def compiler_options(hidden_size: int) -> dict[str, Any]:
    return {"num_warps": 4 if hidden_size <= 1024 else 8 if hidden_size <= 8192 else 16, "enable_fp_fusion": False}


# Spans lie where there is room in a copy; aligned or not must not make two kernels of it, one compiled while serving.
@triton.jit(do_not_specialize_on_alignment=["spans", "counts_before"])
def pool_span(
    hidden,  # [rows, HIDDEN_SIZE], rows by stride
    spans,  # [spans, 2]
    head_weight,  # [heads, HIDDEN_SIZE]
    scores,  # [spans, heads]
    norm_weight,  # [HIDDEN_SIZE]
    norm_bias,  # [HIDDEN_SIZE]
    head_bias,  # [heads]
    sums_before,  # [spans, HIDDEN_SIZE]
    counts_before,  # [spans]
    sums,  # [spans, HIDDEN_SIZE]
    row_stride,
    heads,
    eps,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    CENTERS: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    HAS_HEAD_BIAS: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    KEEPS_SUMS: tl.constexpr,
):
    """The scores of the mean of one span."""
    span = tl.program_id(0).to(tl.int64)
    first, end = tl.load(spans + 2 * span), tl.load(spans + 2 * span + 1)
    column = tl.arange(0, BLOCK)
    there = column < HIDDEN_SIZE
    count = end - first
    if HAS_BEFORE:
        pooled = tl.load(sums_before + span * HIDDEN_SIZE + column, mask=there, other=0.0)
        count += tl.load(counts_before + span)
    else:
        pooled = tl.zeros([BLOCK], tl.float32)
    hidden += first.to(tl.int64) * row_stride  # may be past 2^31
    for row in tl.range(first, end, num_stages=STAGES):
        x = tl.load(hidden + (row - first).to(tl.int64) * row_stride + column, mask=there, other=0.0).to(tl.float32)
        if HAS_NORM:
            if CENTERS:
                x = tl.where(there, x - tl.sum(x, 0) / HIDDEN_SIZE, 0.0)
            x = x * tl.rsqrt(tl.sum(x * x, 0) / HIDDEN_SIZE + eps)
            weight = tl.load(norm_weight + column, mask=there, other=0.0).to(tl.float32)
            x = x * (weight + 1.0 if PLUS_ONE else weight)
            if HAS_NORM_BIAS:
                x += tl.load(norm_bias + column, mask=there, other=0.0).to(tl.float32)
        pooled += x
    if KEEPS_SUMS:
        tl.store(sums + span * HIDDEN_SIZE + column, pooled, mask=there)
    pooled = pooled / count.to(tl.float32)  # by 0 where there is no row: not a number
    for head in range(heads):
        weight = tl.load(head_weight + head * HIDDEN_SIZE + column, mask=there, other=0.0).to(tl.float32)
        score = tl.sum(pooled * weight, 0)
        if HAS_HEAD_BIAS:
            score += tl.load(head_bias + head).to(tl.float32)
        tl.store(scores + span * heads + head, score)


# How many spans there are must not make another kernel of it either.
@triton.jit(do_not_specialize=["num_spans"], do_not_specialize_on_alignment=["spans"])
def score_last_rows(
    hidden,  # [rows, HIDDEN_SIZE], rows by stride
    spans,  # [num_spans, 2]
    head_weight,  # [heads, HIDDEN_SIZE]
    scores,  # [num_spans, heads]
    norm_weight,  # [HIDDEN_SIZE]
    norm_bias,  # [HIDDEN_SIZE]
    head_bias,  # [heads]
    row_stride,
    heads,
    eps,
    num_spans,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    CENTERS: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    HAS_HEAD_BIAS: tl.constexpr,
):
    """The scores of the last rows of ROWS spans."""
    span = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.load(spans + 2 * span, mask=span < num_spans, other=0)
    end = tl.load(spans + 2 * span + 1, mask=span < num_spans, other=0)
    has_row = end > begin
    column = tl.arange(0, BLOCK)
    there = column < HIDDEN_SIZE
    row = hidden + (end - 1).to(tl.int64)[:, None] * row_stride  # may be past 2^31
    x = tl.load(row + column[None, :], mask=has_row[:, None] & there[None, :], other=0.0).to(tl.float32)
    if HAS_NORM:
        weight = tl.load(norm_weight + column, mask=there, other=0.0).to(tl.float32)  # on its way with the rows
        if CENTERS:
            x = tl.where(there[None, :], x - tl.sum(x, 1)[:, None] / HIDDEN_SIZE, 0.0)
        x = x * tl.rsqrt(tl.sum(x * x, 1) / HIDDEN_SIZE + eps)[:, None]
        x = x * (weight + 1.0 if PLUS_ONE else weight)[None, :]
        if HAS_NORM_BIAS:
            x += tl.load(norm_bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
    for head in range(heads):
        weight = tl.load(head_weight + head * HIDDEN_SIZE + column, mask=there, other=0.0).to(tl.float32)
        score = tl.sum(x * weight[None, :], 1)
        if HAS_HEAD_BIAS:
            score += tl.load(head_bias + head).to(tl.float32)
        score = tl.where(has_row, score, float("nan"))
        tl.store(scores + span.to(tl.int64) * heads + head, score, mask=span < num_spans)


def sum_pieces(rows: torch.Tensor, pieces: Pieces, sums: torch.Tensor) -> torch.Tensor:
    """As running_mean.sum_pieces, to the bit."""
    num_pieces, hidden_size = len(pieces.begins), rows.shape[1]
    total = sums.new_empty(num_pieces, hidden_size)
    if num_pieces:
        sum_rows[(num_pieces, triton.cdiv(hidden_size, SUM_COLUMNS))](
            *(rows, pieces.begins, pieces.counts, pieces.carried, sums, total, rows.stride(0)),
            HIDDEN_SIZE=hidden_size,
            BLOCK=SUM_COLUMNS,
            **SUM_OPTIONS,
        )
    return total


@triton.jit(do_not_specialize_on_alignment=["begins", "counts", "carried"])
def sum_rows(
    rows,  # [rows, HIDDEN_SIZE], rows by stride
    begins,  # [pieces]
    counts,  # [pieces]
    carried,  # [pieces], -1: from nothing
    sums,  # [blocks, HIDDEN_SIZE]
    total,  # [pieces, HIDDEN_SIZE]
    row_stride,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some columns of one piece."""
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < HIDDEN_SIZE
    begin, count, block = tl.load(begins + piece), tl.load(counts + piece), tl.load(carried + piece)
    found = tl.zeros([BLOCK], tl.float32)
    if block >= 0:
        found += tl.load(sums + block * HIDDEN_SIZE + column, mask=there, other=0.0)
    rows += begin * row_stride
    for row in tl.range(0, count, num_stages=4):
        found += tl.load(rows + row * row_stride + column, mask=there, other=0.0).to(tl.float32)
    tl.store(total + piece * HIDDEN_SIZE + column, found, mask=there)
