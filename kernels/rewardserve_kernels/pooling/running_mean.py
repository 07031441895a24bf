"""Means over all tokens of sequences whose beginnings were summed up in earlier forwards. All in fp32; plain torch, but
for the sums within blocks where there is a kernel for them (pooling.triton).

A sequence is summed up block by block: rows within a block one after the other, then the blocks' sums one after the
other. Blocks lie at absolute positions, so a mean is the same bit for bit wherever its sequence was cut into earlier
and later forwards, and whatever else is in the pack. What is kept of a stored block is the sum of its rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment
from rewardserve_kernels.upload import Upload


@dataclass(frozen=True, slots=True)
class Pieces:
    """Consecutive rows that lie in one block each."""

    begins: torch.Tensor  # [pieces] int64: first rows
    counts: torch.Tensor  # [pieces] int64
    carried: torch.Tensor  # [pieces] int64: the block whose sum is gone on from; -1: none
    longest: int  # of counts


@dataclass(frozen=True, slots=True)
class MeanRows:
    """How the rows of one pack are summed up."""

    stored: Pieces
    stored_blocks: torch.Tensor  # [stored pieces] int64: where their sums are kept
    own: Pieces  # of the sequences that are read
    before: torch.Tensor  # [sequences, most] int64: stored whole blocks before their own rows; -1 after the last
    parts: torch.Tensor  # [sequences, most] int64: their own pieces; -1 after the last
    num_tokens: torch.Tensor  # [sequences] int64


# rows [rows, columns], pieces, sums [blocks, columns] -> [pieces, columns], with what each piece goes on from
SumPieces = Callable[[torch.Tensor, Pieces, torch.Tensor], torch.Tensor]


def plan_means(segments: Sequence[Segment], read: Sequence[int], upload: Upload) -> Callable[[], MeanRows]:
    """`read` are the segments whose sequences are read, in order; the others are only summed up, if they are stored.

    All that the device needs to know goes along with `upload`; what is returned gives the plan once that was shipped.
    """
    stored = [(*piece, segment.blocks[b]) for segment in segments if segment.store for b, *piece in _pieces(segment)]
    own: list[list[int]] = []
    before: list[list[int]] = []
    parts: list[list[int]] = []
    for segment in (segments[i] for i in read):
        before.append(list(segment.blocks[: segment.start // BLOCK_TOKENS]))
        pieces = [piece for _, *piece in _pieces(segment)]
        parts.append(list(range(len(own), len(own) + len(pieces))))
        own += pieces
    tables = [np.array(rows, np.int64).reshape(-1, width) for rows, width in ((stored, 4), (own, 3))]
    columns = [[upload.add(column) for column in table.T] for table in tables]
    others = [upload.add(_padded(lists)) for lists in (before, parts)]
    others.append(upload.add(np.array([segments[i].end for i in read], np.int64)))

    def arrived() -> MeanRows:
        of_stored, of_own = ([upload[number] for number in numbers] for numbers in columns)
        longest = [int(table[:, 1].max(initial=0)) for table in tables]
        *pieces, stored_blocks = of_stored
        before, parts, num_tokens = (upload[number] for number in others)
        return MeanRows(
            Pieces(*pieces, longest[0]), stored_blocks, Pieces(*of_own, longest[1]), before, parts, num_tokens
        )

    return arrived


def _pieces(segment: Segment) -> list[tuple[int, int, int, int]]:
    """(block's number, first row, count, block carried from or -1)."""
    pieces, position = [], segment.start
    while position < segment.end:
        number = position // BLOCK_TOKENS
        stop = min(segment.end, (number + 1) * BLOCK_TOKENS)
        carried = segment.blocks[number] if position % BLOCK_TOKENS else -1
        pieces.append((number, segment.row + position - segment.start, stop - position, carried))
        position = stop
    return pieces


def _padded(lists: Sequence[Sequence[int]]) -> np.ndarray:
    most = max(map(len, lists), default=0)
    return np.array([[*values, *[-1] * (most - len(values))] for values in lists], np.int64).reshape(len(lists), most)


def sum_pieces(rows: torch.Tensor, pieces: Pieces, sums: torch.Tensor) -> torch.Tensor:
    """A SumPieces in plain torch: an operation for each row of the longest piece."""
    rows = rows.float()
    total = _picked(sums, pieces.carried)
    for i in range(pieces.longest):
        inside = i < pieces.counts
        row = rows[torch.where(inside, pieces.begins + i, 0)]
        total += torch.where(inside[:, None], row, 0.0)  # not a product: another sequence's row may not be finite
    return total


def running_means(
    rows: torch.Tensor, plan: MeanRows, sums: torch.Tensor, sum_pieces: SumPieces = sum_pieces
) -> torch.Tensor:
    """rows [rows, hidden_size] after the final norm -> means [sequences, hidden_size] fp32.

    `sums` [blocks, hidden_size] fp32 holds the sums of stored blocks; those of this pack are added to it.
    """
    if len(plan.stored.begins):
        sums[plan.stored_blocks] = sum_pieces(rows, plan.stored, sums)
    own = sum_pieces(rows, plan.own, sums)
    total = sums.new_zeros(len(plan.num_tokens), rows.shape[1])
    for table, indices in ((sums, plan.before), (own, plan.parts)):
        for column in indices.T:
            total += _picked(table, column)
    return total / plan.num_tokens[:, None]


def _picked(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows [indices, columns], zeros where an index is -1, whatever lies in the table's first row."""
    if not len(table):
        return table.new_zeros(len(indices), table.shape[1])
    picked = table[indices.clamp(min=0)]
    return torch.where(indices[:, None] >= 0, picked, 0.0)
