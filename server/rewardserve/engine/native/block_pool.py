"""Which blocks are free and who holds the others. Knows nothing of tokens; loads no torch."""

from collections.abc import Iterable


class BlockPool:
    """`num_blocks` blocks. A block is free, or has one reference for each holder."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def references(self, block: int) -> int:
        return self._references[block]

    def take(self) -> int:
        """A free block, held once by the caller. There must be one."""
        block = self._free.pop()
        assert self._references[block] == 0
        self._references[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One more holder of a block that has some already, or that the prefix cache keeps without a holder."""
        self._references[block] += 1

    def release(self, block: int) -> int:
        """One holder fewer. Returns how many are left; at none the caller decides between `free` and keeping it."""
        assert self._references[block] > 0
        self._references[block] -= 1
        return self._references[block]

    def free(self, block: int) -> None:
        """Gives back a block nobody holds."""
        assert self._references[block] == 0
        self._free.append(block)

    def check(self, cached_unheld: Iterable[int]) -> None:
        """Asserts that every block is exactly one of free, held, or kept by the cache without a holder."""
        free, cached = set(self._free), set(cached_unheld)
        assert len(free) == len(self._free), "a block is free twice"
        for block, references in enumerate(self._references):
            homes = (block in free) + (block in cached) + (references > 0)
            assert homes == 1, f"block {block}: free {block in free}, cached {block in cached}, {references} holders"
