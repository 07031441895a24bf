"""Keys and values of one layer in blocks: write a segment's rows, read a sequence's beginning."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment
from rewardserve_kernels.workspace import Workspace


def store_segment(pool: torch.Tensor, rows: torch.Tensor, segment: Segment) -> None:
    """Writes `rows` [kv_heads, num_rows, head_size] into the pool [blocks, kv_heads, BLOCK_TOKENS, head_size].

    Row i goes to position `segment.start + i` of the sequence, that is, to slot `position % BLOCK_TOKENS` of block
    `segment.blocks[position // BLOCK_TOKENS]`.
    """
    position = segment.start
    while position < segment.end:
        slot = position % BLOCK_TOKENS
        stop = min(segment.end, position - slot + BLOCK_TOKENS)
        block = segment.blocks[position // BLOCK_TOKENS]
        pool[block, :, slot : slot + stop - position] = rows[:, position - segment.start : stop - segment.start]
        position = stop


@dataclass(frozen=True, slots=True)
class StoreIndex:
    """Where the rows of a pack go that are to be stored: row `rows[i]` to slot `slots[i]` of block `blocks[i]`."""

    rows: torch.Tensor  # [n] int32, of the pack
    blocks: torch.Tensor  # [n] int32
    slots: torch.Tensor  # [n] int32


def store_index(segments: Sequence[Segment]) -> np.ndarray:
    """[3, n] int32: what StoreIndex holds, of the segments with `store`."""
    parts = [np.zeros((3, 0), np.int32)]
    for segment in segments:
        if segment.store:
            positions = np.arange(segment.start, segment.end)
            blocks = np.asarray(segment.blocks)[positions // BLOCK_TOKENS]
            rows = np.arange(segment.row, segment.row + segment.num_rows)
            parts.append(np.stack([rows, blocks, positions % BLOCK_TOKENS]).astype(np.int32))
    return np.concatenate(parts, 1)


def store_rows(pool_k: torch.Tensor, pool_v: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: StoreIndex) -> None:
    """As store_segment for all segments of a pack at once: `k` and `v` [kv_heads, all rows, head_size].

    For tensors of any device; triton.store_rows does the same in one launch. On a CPU the segments one by one are four
    times as fast: they are plain copies.
    """
    for pool, rows in ((pool_k, k), (pool_v, v)):
        pool[index.blocks, :, index.slots] = rows[:, index.rows].transpose(0, 1)


def gather_prefix(
    pool: torch.Tensor, blocks: Sequence[int], begin: int, end: int, out: torch.Tensor, workspace: Workspace
) -> None:
    """Copies positions [begin, end) of the sequence in `blocks` to `out` [kv_heads, >= end - begin, head_size].

    `begin` is a multiple of BLOCK_TOKENS.
    """
    num_whole = (end - begin) // BLOCK_TOKENS
    first = begin // BLOCK_TOKENS
    kv_heads, _, head_size = out.shape
    if num_whole:
        index = torch.tensor(blocks[first : first + num_whole], device=pool.device)
        whole = workspace.take("blocks", (num_whole, *pool.shape[1:]), pool)
        torch.index_select(pool, 0, index, out=whole)
        place = out[:, : num_whole * BLOCK_TOKENS].view(kv_heads, num_whole, BLOCK_TOKENS, head_size)
        place.copy_(whole.transpose(0, 1))
    rest = end - begin - num_whole * BLOCK_TOKENS
    if rest:
        out[:, num_whole * BLOCK_TOKENS : end - begin] = pool[blocks[first + num_whole], :, :rest]
