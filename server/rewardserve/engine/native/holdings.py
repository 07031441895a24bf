"""Which started group holds which blocks, and how many each may still allocate. Loads no torch.

A group that is started has reserved what it needs at worst, so groups under way can never block one another.
"""

import math
from collections.abc import Collection

from rewardserve_kernels.ragged import BLOCK_TOKENS, ceil_block

from rewardserve.engine.native.prefix_cache import PrefixCache
from rewardserve.engine.native.sequence import Group


class Holdings:
    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._started: dict[int, Group] = {}  # by id
        self._num_reserved = 0

    @property
    def started(self) -> Collection[Group]:
        """The first one first."""
        return self._started.values()

    def start(self, group: Group) -> bool:
        """Reserves the blocks the group needs at worst; False if there are not as many now."""
        need = _blocks_needed(group)
        if self._cache.num_available - self._num_reserved < need:
            assert self._started or self._cache.num_available < self._cache.pool.num_blocks, (
                "pool too small for a group"
            )
            return False
        group.started, group.num_reserved, group.kept = True, need, {}
        self._num_reserved += need
        self._started[id(group)] = group
        return True

    def give(self, group: Group, blocks: list[int], block: int) -> None:
        """`block`, one of those that were reserved, is the last of `blocks` now."""
        blocks.append(block)
        group.num_reserved -= 1
        self._num_reserved -= 1

    def extend(self, group: Group, blocks: list[int], length: int) -> bool:
        """Allocates until `blocks` has `length` of them. False if that is not possible now (long siblings only)."""
        while len(blocks) < length and group.num_reserved:
            block = self._cache.allocate()
            assert block is not None, "reserved blocks are always available"
            self.give(group, blocks, block)
        return len(blocks) == length

    def reserve_again(self, group: Group, num_blocks: int) -> None:
        """Of those it was given, which are free again."""
        if group.started:
            group.num_reserved += num_blocks
            self._num_reserved += num_blocks

    def leave(self, group: Group) -> list[int]:
        """Ends the group's hold on blocks, if it is started; returns those it held, to be released."""
        held = _held(group)
        self._started.pop(id(group), None)
        self._num_reserved -= group.num_reserved
        group.blocks, group.num_computed, group.num_reserved, group.started = [], 0, 0, False
        for sequence in group.sequences:
            sequence.own_blocks, sequence.num_computed = [], None
        return held

    def check(self) -> None:
        """Asserts that every block is accounted for."""
        self._cache.check()
        holds: dict[int, int] = {}
        for group in self.started:
            for block in _held(group):
                holds[block] = holds.get(block, 0) + 1
        for block in range(self._cache.pool.num_blocks):
            assert self._cache.pool.references(block) == holds.get(block, 0), f"block {block} is held by nobody known"
        assert self._num_reserved == sum(group.num_reserved for group in self.started)
        assert self._cache.num_available >= self._num_reserved >= 0, "more is reserved than there is"


def _held(group: Group) -> list[int]:
    return group.blocks + [block for sequence in group.sequences for block in sequence.own_blocks]


def _blocks_needed(group: Group) -> int:
    """Blocks a group may hold at once: its prompt's, and those of its longest response, should that go in chunks."""
    longest = max(sequence.num_tokens for sequence in group.sequences)
    own = ceil_block(group.prompt_length + longest) // BLOCK_TOKENS - group.num_whole_blocks
    return math.ceil(group.prompt_length / BLOCK_TOKENS) + own
