"""A model the scheduler can be checked against without torch: a score is the hash of every token and its position.

It keeps, for each block slot, the token and position written there, and reads a beginning back from the blocks it is
told to; a plan that names a wrong block, or one not yet written, gives a wrong score.
"""

import zlib

import numpy as np
from rewardserve.engine.native.sequence import BatchPlan, Chunk
from rewardserve_kernels.ragged import BLOCK_TOKENS


def true_score(tokens: bytes) -> float:
    return _score(np.frombuffer(tokens, "<i4"))


class ToyModel:
    def __init__(self, num_blocks: int) -> None:
        self._slots = np.full((max(1, num_blocks), BLOCK_TOKENS, 2), -1, dtype=np.int64)
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
                self._slots[blocks, slots] = np.stack([np.frombuffer(chunk.tokens, "<i4"), positions], axis=1)
        return [[self._score(chunk, position)] for chunk in plan.chunks for position in chunk.reads]

    def _score(self, chunk: Chunk, position: int) -> float:
        blocks, slots, positions = _places(chunk.blocks, 0, chunk.start)
        before = self._slots[blocks, slots]
        assert (before[:, 1] == positions).all(), "a position reads what was written for another"
        own = np.frombuffer(chunk.tokens, "<i4")[: position + 1 - chunk.start]
        return _score(np.concatenate([before[:, 0], own]))


def _places(blocks: tuple[int, ...], start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Block, slot and position of the positions [start, stop)."""
    positions = np.arange(start, stop)
    return np.array(blocks, dtype=int)[positions // BLOCK_TOKENS], positions % BLOCK_TOKENS, positions


def _score(tokens: np.ndarray) -> float:
    return float(zlib.crc32(tokens.astype("<i4").tobytes()))
