"""Models the scheduler can be checked against without torch: a score is the hash of every token and its position.

Where several share a backbone, each has a head of its own, which adds to the hash.

It keeps, for each block slot, the token and position written there, and reads a beginning back from the blocks it is
told to; a plan that names a wrong block, or one not yet written, gives a wrong score.
"""

import zlib
from collections.abc import Sequence

import numpy as np
from rewardserve.engine.native.sequence import BatchPlan, Chunk
from rewardserve_kernels.ragged import BLOCK_TOKENS


def true_score(tokens: bytes, variant: int = 0) -> float:
    return _score(np.frombuffer(tokens, "<i4"), variant)


class ToyModel:
    def __init__(self, num_blocks: int, trunks: Sequence[int] = (0,)) -> None:
        """`trunks`: of each of the models, the first one whose backbone computes the same."""
        self._trunks = trunks
        self._slots = np.full((max(1, num_blocks), BLOCK_TOKENS, 3), -1, dtype=np.int64)
        self._host: dict[int, np.ndarray] = {}

    def run(self, plan: BatchPlan) -> list[list[float]]:
        """As a forward does: everything is written before anything is read, and blocks are moved before that."""
        for move in plan.moves:
            if move.out:
                self._host[move.slot] = self._slots[move.block].copy()
            else:
                self._slots[move.block] = self._host[move.slot]
        for chunk in plan.chunks:
            if chunk.store:
                blocks, slots, positions = _places(chunk.blocks, chunk.start, chunk.stop)
                trunk = np.full(len(positions), self._trunks[plan.variant])
                self._slots[blocks, slots] = np.stack([np.frombuffer(chunk.tokens, "<i4"), positions, trunk], axis=1)
        return [[self._score(chunk, position, plan.variant)] for chunk in plan.chunks for position in chunk.reads]

    def _score(self, chunk: Chunk, position: int, variant: int) -> float:
        assert chunk.group.variant == variant, "a forward is of one model"
        blocks, slots, positions = _places(chunk.blocks, 0, chunk.start)
        before = self._slots[blocks, slots]
        assert (before[:, 1] == positions).all(), "a position reads what was written for another"
        assert (before[:, 2] == self._trunks[variant]).all(), "what is read was computed by another backbone"
        own = np.frombuffer(chunk.tokens, "<i4")[: position + 1 - chunk.start]
        return _score(np.concatenate([before[:, 0], own]), variant)


def _places(blocks: tuple[int, ...], start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Block, slot and position of the positions [start, stop)."""
    positions = np.arange(start, stop)
    return np.array(blocks, dtype=int)[positions // BLOCK_TOKENS], positions % BLOCK_TOKENS, positions


def _score(tokens: np.ndarray, variant: int) -> float:
    return zlib.crc32(tokens.astype("<i4").tobytes()) + variant / 8
