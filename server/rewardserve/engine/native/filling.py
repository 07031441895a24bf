"""A forward's budget, and what of a started group goes into it. Loads no torch.

With a prefix cache a group's prompt is computed once, from the first block the cache does not have; its responses
follow, as many as the budget holds, each whole unless it is longer than a whole forward. Without one nothing is shared
or cut: every response is planned whole, together with its prompt.
"""

import math
from collections.abc import Collection
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field
from typing import Protocol

from rewardserve_kernels.ragged import BLOCK_TOKENS, floor_block

from rewardserve.engine.native.holdings import Holdings
from rewardserve.engine.native.prefix_cache import PrefixCache
from rewardserve.engine.native.sequence import BatchPlan, Chunk, Group, Move, Sequence, Status


@dataclass(slots=True)
class Filling:
    """A forward being filled, and what is left of its budget."""

    max_tokens: int
    max_chunks: int
    tokens_left: int = field(init=False)
    chunks_left: int = field(init=False)
    chunks: list[Chunk] = field(default_factory=list)
    published: list[int] = field(default_factory=list)
    to_release: list[int] = field(default_factory=list)  # once the forward is planned
    num_cached_tokens: int = 0
    to_reserve: list[tuple[Group, int]] = field(default_factory=list)  # again, once those are released

    def __post_init__(self) -> None:
        self.tokens_left, self.chunks_left = self.max_tokens, self.max_chunks

    @property
    def full(self) -> bool:
        return self.tokens_left <= 0 or self.chunks_left <= 0

    def admits(self, group: Group) -> bool:
        """Whether the forward is, or can still be made, as small as the group's must be."""
        if not self.chunks:
            self.max_tokens = min(self.max_tokens, group.max_tokens)
            self.max_chunks = min(self.max_chunks, group.max_chunks)
            self.tokens_left, self.chunks_left = self.max_tokens, self.max_chunks
        return self.max_tokens <= group.max_tokens and self.max_chunks <= group.max_chunks

    def add(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.tokens_left -= chunk.stop - chunk.start
        self.chunks_left -= 1


class Filler(Protocol):
    """Which groups are started, and how they are cut into chunks."""

    shares: bool  # prompts among responses and groups; what is too long for a forward goes in several

    @property
    def started(self) -> Collection[Group]:
        """Those that hold blocks, the first one first."""

    def start(self, group: Group) -> bool:
        """Whether there is room to."""

    def serve(self, group: Group, filling: Filling) -> bool:
        """Plans what fits of a started group. True if all of it is planned."""

    def retire(self, group: Group, filling: Filling) -> None:
        """All of a group is planned."""

    def settle(self, filling: Filling) -> None:
        """The forward is planned: what it read last may be written by the next."""

    def take_moves(self) -> tuple[Move, ...]:
        """Copies to and from host memory that the next plan needs."""

    def leave(self, group: Group) -> None:
        """It is dropped, or begins anew: what it holds is free."""

    def undo(self, plans: Sequence_[BatchPlan]) -> None:
        """What they published, and the copies they were to make, have never been."""

    def forget_prompts(self) -> None:
        """Those that nobody holds."""

    def check(self) -> None:
        """Asserts what must hold between calls."""


class WholeFiller:
    """Without a prefix cache."""

    shares = False
    started: Collection[Group] = ()

    def start(self, group: Group) -> bool:
        group.started = True
        return True

    def serve(self, group: Group, filling: Filling) -> bool:
        for sequence in group.waiting:
            tokens = group.prompt + sequence.tokens
            length = len(tokens) // 4
            if filling.full or (length > filling.tokens_left and filling.chunks):
                return False
            filling.add(Chunk(group, sequence, tokens, 0, length, (), store=False, scored=True, reads=sequence.reads))
            sequence.status = Status.RUNNING
        return True

    def retire(self, group: Group, filling: Filling) -> None:
        self.leave(group)

    def settle(self, filling: Filling) -> None:
        pass

    def take_moves(self) -> tuple[Move, ...]:
        return ()

    def leave(self, group: Group) -> None:
        group.started = False

    def undo(self, plans: Sequence_[BatchPlan]) -> None:
        pass

    def forget_prompts(self) -> None:
        pass

    def check(self) -> None:
        pass


class SharingFiller:
    """With one."""

    shares = True

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._holdings = Holdings(cache)

    @property
    def started(self) -> Collection[Group]:
        return self._holdings.started

    def start(self, group: Group) -> bool:
        return self._holdings.start(group)

    def serve(self, group: Group, filling: Filling) -> bool:
        self._serve_prompt(group, filling)
        if group.num_computed < group.prompt_length:
            return False
        for sequence in group.waiting:
            if filling.full or not self._serve_response(group, sequence, filling):
                return False
        return True

    def _serve_prompt(self, group: Group, filling: Filling) -> None:
        length = group.prompt_length
        while group.num_computed < length:
            if self._found(group, filling):
                continue
            if filling.full:
                return
            start = group.num_computed
            stop = _chunk_stop(start, length, filling.tokens_left)
            self._holdings.extend(group, group.blocks, math.ceil(stop / BLOCK_TOKENS))
            tokens, reads = group.prompt[4 * start : 4 * stop], self._prompt_reads(group, start, stop)
            for position in reads:
                group.kept.setdefault(position // BLOCK_TOKENS, {})[position] = None
            filling.add(Chunk(group, None, tokens, start, stop, tuple(group.blocks), True, scored=False, reads=reads))
            group.num_computed = stop
            self._publish(group, start, stop, filling)

    def _found(self, group: Group, filling: Filling) -> bool:
        """Whether the prompt's next block is in the cache; it is the group's then."""
        start = group.num_computed
        if start % BLOCK_TOKENS:
            return False
        index, end = start // BLOCK_TOKENS, min(group.prompt_length, start + BLOCK_TOKENS)
        block = self._cache.acquire(group.keys[index], group.reads_between(start, end))
        if block is None:
            return False
        self._holdings.give(group, group.blocks, block)
        group.kept[index] = self._cache.kept(group.keys[index])
        group.num_computed = end
        group.num_cached += end - start
        filling.num_cached_tokens += end - start
        return True

    def _publish(self, group: Group, start: int, stop: int, filling: Filling) -> None:
        """The blocks of a prompt that its tokens [start, stop) have filled; the last one need not be full."""
        whole = len(group.blocks) if stop == group.prompt_length else stop // BLOCK_TOKENS
        for index in range(start // BLOCK_TOKENS, whole):
            if self._cache.publish(group.keys[index], group.blocks[index], group.kept.get(index)):
                filling.published.append(group.blocks[index])

    def _prompt_reads(self, group: Group, start: int, stop: int) -> tuple[int, ...]:
        """Those of the group, and those that others wanted of the same blocks: so that what is kept only grows."""
        reads = group.reads_between(start, stop)
        if not reads:
            return ()
        wanted = set(reads)
        for index in range(start // BLOCK_TOKENS, math.ceil(stop / BLOCK_TOKENS)):
            wanted.update(position for position in self._cache.kept(group.keys[index]) if start <= position < stop)
        return tuple(sorted(wanted))

    def _serve_response(self, group: Group, sequence: Sequence, filling: Filling) -> bool:
        """True if the response's last token is planned."""
        start, stop = group.prompt_length, group.prompt_length + sequence.num_tokens
        if sequence.num_computed is not None or sequence.num_tokens > filling.max_tokens:
            return self._serve_long_response(group, sequence, filling, stop)
        if sequence.num_tokens > filling.tokens_left:
            return False
        reads = tuple(position for position in sequence.reads if position >= start)
        blocks = tuple(group.blocks)
        filling.add(Chunk(group, sequence, sequence.tokens, start, stop, blocks, False, scored=True, reads=reads))
        sequence.status = Status.RUNNING
        return True

    def _serve_long_response(self, group: Group, sequence: Sequence, filling: Filling, end: int) -> bool:
        """One chunk of a response that no single forward holds."""
        start = floor_block(group.prompt_length) if sequence.num_computed is None else sequence.num_computed
        stop = _chunk_stop(start, end, filling.tokens_left)
        last = stop == end
        shared = group.blocks[: group.num_whole_blocks]
        if not last:
            num_own = math.ceil(stop / BLOCK_TOKENS) - len(shared)
            if not self._holdings.extend(group, sequence.own_blocks, num_own):
                return False  # a sibling's blocks come free when this forward is planned
        tokens = (group.prompt + sequence.tokens)[4 * start : 4 * stop]
        blocks = (*shared, *sequence.own_blocks)
        begin = max(start, group.prompt_length)
        reads = tuple(position for position in sequence.reads if begin <= position < stop)
        filling.add(Chunk(group, sequence, tokens, start, stop, blocks, store=not last, scored=last, reads=reads))
        sequence.num_computed = stop
        if last:
            sequence.status = Status.RUNNING
            _take_back(group, sequence, filling)
        return last

    def retire(self, group: Group, filling: Filling) -> None:
        filling.to_release += self._holdings.leave(group)

    def settle(self, filling: Filling) -> None:
        self._cache.release(filling.to_release)
        for group, num_blocks in filling.to_reserve:
            self._holdings.reserve_again(group, num_blocks)

    def take_moves(self) -> tuple[Move, ...]:
        return self._cache.take_moves()

    def leave(self, group: Group) -> None:
        self._cache.release(self._holdings.leave(group))

    def undo(self, plans: Sequence_[BatchPlan]) -> None:
        for block in {block for plan in plans for block in plan.published}:
            self._cache.retract(block)
        self._cache.undo(move for plan in plans for move in plan.moves)

    def forget_prompts(self) -> None:
        self._cache.clear()

    def check(self) -> None:
        self._holdings.check()


def _take_back(group: Group, sequence: Sequence, filling: Filling) -> None:
    """A long response is planned whole: its blocks become free, and the next one may use as many."""
    filling.to_release += sequence.own_blocks
    filling.to_reserve.append((group, len(sequence.own_blocks)))
    sequence.own_blocks = []


def _chunk_stop(start: int, end: int, tokens_left: int) -> int:
    """Where a chunk that begins at `start` stops: at the end, else at a block's border if one is in reach."""
    stop = start + tokens_left
    if stop >= end:
        return end
    return floor_block(stop) if floor_block(stop) > start else stop
