"""Which rows of a pack belong together. A pack is the tokens of one forward laid end to end, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass

BLOCK_TOKENS = 128
"""Tokens in one block of the key/value pool. Attention is cut at absolute multiples of it (attention/chunked.py)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """`num_rows` consecutive rows of the pack that continue one sequence at position `start`.

    Each row attends to every position before `start`, whose keys and values lie in `blocks`, and causally to the rows
    of its own segment. With `store` the segment's own keys and values are written to `blocks` as well, which then
    reach to `start + num_rows`; rows that come after it, in this pack or a later one, can continue from there.
    """

    row: int
    num_rows: int
    start: int
    blocks: tuple[int, ...]
    store: bool

    @property
    def end(self) -> int:
        """Position after the last row."""
        return self.start + self.num_rows


def floor_block(position: int) -> int:
    return position // BLOCK_TOKENS * BLOCK_TOKENS


def ceil_block(position: int) -> int:
    return -(-position // BLOCK_TOKENS) * BLOCK_TOKENS


def siblings_of(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Consecutive segments that continue the same stored beginning."""
    runs: list[list[Segment]] = []
    for segment in segments:
        if runs and (runs[-1][0].blocks, runs[-1][0].start) == (segment.blocks, segment.start):
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return runs
