"""Tree attention as one obvious dense product: the oracle for faster ways. Memory grows with the square."""

from collections.abc import Sequence

import torch

from rewardserve_kernels.kv_cache.paged import gather_prefix
from rewardserve_kernels.ragged import Segment
from rewardserve_kernels.workspace import Workspace


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pool_k: torch.Tensor,
    pool_v: torch.Tensor,
    segments: Sequence[Segment],
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """As attention.chunked.tree_attention, in the precision of its arguments (give it fp64)."""
    heads, num_rows, _ = q.shape
    group = heads // k.shape[0]
    out = q.new_full((num_rows, heads, v.shape[-1]), float("nan"))
    for segment in segments:
        rows = slice(segment.row, segment.row + segment.num_rows)
        keys, values = (_whole(own[:, rows], pool, segment) for own, pool in ((k, pool_k), (v, pool_v)))
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        scores = q[:, rows] @ keys.transpose(1, 2) * scale  # [heads, num_rows, end]
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        position = torch.arange(segment.start, segment.end)[:, None]
        key = torch.arange(segment.end)
        hidden = (key > position) | ((position - key >= window) if window else False)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores)[:, None, None].expand(-1, segment.num_rows, 1)], -1)
        weights = scores.softmax(-1)[..., : segment.end]
        out[rows] = (weights @ values).transpose(0, 1)
    return out


def _whole(own: torch.Tensor, pool: torch.Tensor, segment: Segment) -> torch.Tensor:
    """The sequence's stored beginning and the segment's own rows, one after the other: [kv_heads, end, head_size]."""
    out = own.new_empty(own.shape[0], segment.end, own.shape[2])
    gather_prefix(pool.to(own.dtype), segment.blocks, 0, segment.start, out, Workspace())
    out[:, segment.start :] = own
    return out
