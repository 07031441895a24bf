"""Tree attention as chunked batched matrix products: what the CPU runs, and CUDA until a kernel earns its place.

On a CPU with bf16 matrix products this is three times as fast as torch's own flash kernel, which multiplies in fp32.

Batch invariance. Work is cut at absolute positions of the sequence, never at positions in the pack or at the border of
prompt and response: the row at position p is always computed against keys [0, ceil_block(p + 1)), those after p being
masked. So the products that make up a row have the same shapes and the same order whatever was cached, and whatever
else is in the pack. What is left to the library is that a row of a matrix product does not depend on how many other
rows there are, which oneDNN keeps in bf16 (tests/parity holds it to that).
"""

from collections.abc import Sequence

import torch

from rewardserve_kernels.kv_cache.paged import gather_prefix
from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment, ceil_block, floor_block


class _Keys:
    """Keys and values of one sequence, contiguous, from position `base` on; the shared beginning is gathered once."""

    def __init__(self, pool_k: torch.Tensor, pool_v: torch.Tensor, first: Segment, base: int, end: int) -> None:
        self.base = base
        length = ceil_block(end) - base
        self.k = pool_k.new_zeros(pool_k.shape[1], length, pool_k.shape[3])
        self.v = pool_v.new_zeros(pool_v.shape[1], length, pool_v.shape[3])
        gather_prefix(pool_k, first.blocks, base, first.start, self.k)
        gather_prefix(pool_v, first.blocks, base, first.start, self.v)

    def put_own(self, k: torch.Tensor, v: torch.Tensor, segment: Segment) -> None:
        """Puts the segment's own rows behind the beginning, and zeros after them.

        The zeros matter: a masked key has weight 0, and 0 times what a sibling left there must not be NaN.
        """
        rows = slice(segment.row, segment.row + segment.num_rows)
        begin, end = segment.start - self.base, segment.end - self.base
        stop = ceil_block(segment.end) - self.base
        self.k[:, begin:end], self.v[:, begin:end] = k[:, rows], v[:, rows]
        self.k[:, end:stop], self.v[:, end:stop] = 0, 0


def _first_key(position: int, window: int) -> int:
    """First key, at a block's border, that the block of rows around `position` can see."""
    return floor_block(max(0, floor_block(position) - window + 1)) if window else 0


def _mask(scores: torch.Tensor, first_row: int, num_rows: int, first_key: int, window: int) -> None:
    """Masks, in place, scores [..., num_rows, keys] of keys after their row or out of its window."""
    num_keys = scores.shape[-1]
    row = torch.arange(first_row, first_row + num_rows, device=scores.device)[:, None]
    if not window:  # only the last block holds keys after a row
        key = torch.arange(first_key + num_keys - BLOCK_TOKENS, first_key + num_keys, device=scores.device)
        scores[..., -BLOCK_TOKENS:].masked_fill_(key > row, float("-inf"))
        return
    key = torch.arange(first_key, first_key + num_keys, device=scores.device)
    scores.masked_fill_((key > row) | (row - key >= window), float("-inf"))


def _attend(
    q: torch.Tensor, keys: _Keys, position: int, scale: float, window: int, softcap: float, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Rows at `position`, `position` + 1, ... of one block: q [kv_heads, group, rows, head_size] -> [..., v_size]."""
    kv_heads, group, num_rows, head_size = q.shape
    first_key = _first_key(position, window)
    own = slice(first_key - keys.base, floor_block(position) + BLOCK_TOKENS - keys.base)
    flat = q.reshape(kv_heads, group * num_rows, head_size)
    scores = torch.baddbmm(flat.new_empty(1), flat, keys.k[:, own].transpose(1, 2), beta=0, alpha=scale)
    if softcap:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    per_head = scores.view(kv_heads, group, num_rows, -1)
    _mask(per_head, position, num_rows, first_key, window)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(kv_heads, group, 1, 1).expand(-1, -1, num_rows, 1)
        weights = torch.cat([per_head, sink], -1).softmax(-1)[..., :-1].reshape(scores.shape)
    else:
        weights = scores.softmax(-1)
    return torch.bmm(weights, keys.v[:, own]).view(kv_heads, group, num_rows, -1)


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
    last_rows_only: bool = False,
) -> torch.Tensor:
    """Causal attention of every segment to its stored beginning and to itself.

    q [heads, rows, head_size], k and v [kv_heads, rows, ...]; pools [blocks, kv_heads, BLOCK_TOKENS, ...]. What
    segments store must be in the pools already. Returns [rows, heads, v_head_size]. `window` 0 means none, `softcap` 0
    none, `sinks` [heads] are logits of keys without a value (GPT-OSS).

    With `last_rows_only` q holds one row per segment, its last, and so does the result.
    """
    heads, num_rows, head_size = q.shape
    kv_heads = k.shape[0]
    q = q.view(kv_heads, heads // kv_heads, num_rows, head_size)
    out = q.new_empty(num_rows, kv_heads, heads // kv_heads, v.shape[-1])
    keys, shared = None, None
    ends = _longest_end(segments)
    for index, segment in enumerate(segments):
        beginning = (segment.blocks, segment.start)
        if keys is None or beginning != shared:
            base = _first_key(segment.start, window)
            keys, shared = _Keys(pool_k, pool_v, segment, base, ends[beginning]), beginning
        keys.put_own(k, v, segment)
        position, row = (segment.end - 1, index) if last_rows_only else (segment.start, segment.row)
        while position < segment.end:
            stop = min(segment.end, floor_block(position) + BLOCK_TOKENS)
            rows = slice(row, row + stop - position)
            part = _attend(q[:, :, rows], keys, position, scale, window, softcap, sinks)
            out[rows] = part.permute(2, 0, 1, 3)
            row, position = rows.stop, stop
    return out.view(num_rows, heads, -1)


def _longest_end(segments: Sequence[Segment]) -> dict[tuple[tuple[int, ...], int], int]:
    """For each shared beginning, how far the longest segment that continues it reaches."""
    ends: dict[tuple[tuple[int, ...], int], int] = {}
    for segment in segments:
        beginning = (segment.blocks, segment.start)
        ends[beginning] = max(segment.end, ends.get(beginning, 0))
    return ends
