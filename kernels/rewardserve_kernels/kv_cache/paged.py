"""Keys and values of one layer in blocks: write a segment's rows, read a sequence's beginning."""

from collections.abc import Sequence

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
