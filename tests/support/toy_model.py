"""A model the scheduler can be checked against without torch: a score is the hash of every token and its position.

It keeps, for each block slot, the token and position written there, and reads a beginning back from the blocks it is told
to; a plan that names a wrong block, or one not yet written, gives a wrong score.
"""

import zlib

import numpy as np
from rewardserve.engine.native.sequence import BatchPlan
from rewardserve_kernels.ragged import BLOCK_TOKENS


def true_score(tokens: bytes) -> float:
    return _score(np.frombuffer(tokens, "<i4"))


class ToyModel:
    def __init__(self, num_blocks: int) -> None:
        self._slots = np.full((max(1, num_blocks), BLOCK_TOKENS, 2), -1, dtype=np.int64)

    def run(self, plan: BatchPlan) -> list[float]:
        """As a forward does: everything is written before anything is read."""
        for chunk in plan.chunks:
            if chunk.store:
                for offset, token in enumerate(np.frombuffer(chunk.tokens, "<i4")):
                    position = chunk.start + offset
                    self._slots[chunk.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS] = token, position
        return [self._score(chunk) for chunk in plan.chunks if chunk.scored]

    def _score(self, chunk) -> float:
        before = [self._read(chunk.blocks, position) for position in range(chunk.start)]
        return _score(np.array([*before, *np.frombuffer(chunk.tokens, "<i4")]))

    def _read(self, blocks: tuple[int, ...], position: int) -> int:
        token, written_for = self._slots[blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS]
        assert written_for == position, f"position {position} reads what was written for {written_for}"
        return int(token)


def _score(tokens: np.ndarray) -> float:
    return float(zlib.crc32(tokens.astype("<i4").tobytes()))
