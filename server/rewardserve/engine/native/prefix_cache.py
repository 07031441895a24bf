"""Prompt beginnings whose activations are in blocks: match, publish, retract, evict. Loads no torch.

A block is known by a key chained from all tokens up to its end, so prompts with a common beginning share its blocks.
A prompt's partial last block is a block like any other, found only by a prompt that ends with exactly these tokens.
Blocks are published when their forward is scheduled, before it has run: within a forward every layer writes keys
before it attends, so whoever is scheduled in the same forward or later may read them. If that forward fails they are
retracted.

What is evicted may go on to a second tier, in host memory, and comes back when it is asked for. The copies are moves of
the next plan, before its forward; their order is that in which they were decided, so that a block is copied out before
it is written anew, and a slot read before it is. A block that came back keeps its slot: evicted again, it need not be
copied.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from rewardserve_kernels.ragged import BLOCK_TOKENS

from rewardserve.engine.native.block_pool import BlockPool
from rewardserve.engine.native.sequence import Kept, Move

Key = bytes
_NOTHING: Kept = {}
BLOCK_BYTES = 4 * BLOCK_TOKENS


def block_keys(prompt: bytes, key: Key = b"") -> Iterator[Key]:
    """Keys of the blocks of a prompt (little-endian int32 token ids), the partial last one included.

    Another `key` to begin with gives others: what is computed otherwise must not be found.
    """
    for begin in range(0, len(prompt), BLOCK_BYTES):
        key = hashlib.blake2b(key + prompt[begin : begin + BLOCK_BYTES], digest_size=16).digest()
        yield key


class HostTier:
    """Which slots of host memory hold which blocks' contents; least recently used first out."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._slots: OrderedDict[Key, int] = OrderedDict()
        self._free = list(range(num_slots - 1, -1, -1))
        self.evicted: list[Key] = []  # since their owner looked last

    def __contains__(self, key: Key) -> bool:
        return key in self._slots

    def find(self, key: Key) -> int | None:
        slot = self._slots.get(key)
        if slot is not None:
            self._slots.move_to_end(key)
        return slot

    def take(self, key: Key) -> int | None:
        """A slot to copy `key` to; None if it has one, with the same contents, or there are none at all."""
        if self.find(key) is not None or not self.num_slots:
            return None
        if not self._free:
            evicted, slot = self._slots.popitem(last=False)
            self._free.append(slot)
            self.evicted.append(evicted)
        self._slots[key] = self._free.pop()
        return self._slots[key]

    def forget(self, move: Move) -> None:
        """What was to be copied out was not, or was nothing to keep."""
        if self._slots.get(move.key) == move.slot:
            self._free.append(self._slots.pop(move.key))

    def clear(self) -> None:
        self._free += self._slots.values()
        self._slots.clear()

    def check(self) -> None:
        """Asserts that every slot is free or holds one block."""
        assert sorted([*self._free, *self._slots.values()]) == list(range(self.num_slots))


class PrefixCache:
    """Finds blocks by key, and keeps those nobody holds until their room is needed, least recently used first."""

    def __init__(self, pool: BlockPool, host_slots: int = 0) -> None:
        self.pool = pool
        self._host = HostTier(host_slots)
        self._moves: list[Move] = []  # decided, and not yet part of a plan
        self._blocks: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        self._kept: dict[Key, Kept] = {}  # features of positions in the block, where a head reads there
        self._unheld: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give."""
        return self.pool.num_free + len(self._unheld)

    def kept(self, key: Key) -> Kept:
        """Features that are known, or will be when the forwards scheduled so far are done, of positions in a block."""
        return self._kept.get(key, _NOTHING)

    def acquire(self, key: Key, reads: Iterable[int] = ()) -> int | None:
        """The block published under `key`, held once more until `release`; None if there is none.

        One that does not keep the features of all `reads` is none. One in host memory is brought back into a block that
        must be to be had, as for `allocate`.
        """
        if reads and not self.kept(key).keys() >= set(reads):
            return None
        block = self._blocks.get(key)
        if block is None:
            return self._bring_back(key) if key in self._host else None
        self._unheld.pop(block, None)
        self.pool.hold(block)
        return block

    def _bring_back(self, key: Key) -> int | None:
        block = self.allocate()
        assert block is not None, "who looks for a block has one reserved"
        slot = self._host.find(key)
        if slot is None:  # the block that gave way took its place
            self.pool.release(block)
            self.pool.free(block)
            return None
        self._moves.append(Move(key, block, slot, out=False))
        self.publish(key, block, self.kept(key))
        return block

    def take_moves(self) -> tuple[Move, ...]:
        """Those decided since the last call, for the plan that is made now."""
        moves, self._moves = tuple(self._moves), []
        return moves

    def allocate(self) -> int | None:
        """A block to write, held by the caller; evicts the least recently used unheld one if none is free."""
        if self.pool.num_free:
            return self.pool.take()
        if not self._unheld:
            return None
        block, _ = self._unheld.popitem(last=False)
        slot = self._host.take(self._keys[block])
        if slot is not None:
            self._moves.append(Move(self._keys[block], block, slot, out=True))
        self._forget(block)
        while self._host.evicted:
            key = self._host.evicted.pop()
            if key not in self._blocks:
                self._kept.pop(key, None)
        self.pool.free(block)
        return self.pool.take()

    def publish(self, key: Key, block: int, kept: Kept | None = None) -> bool:
        """Lets others find `block`, which the caller holds, and what is `kept` of it.

        False if another block already has this key; it gives way to one of which more is kept.
        """
        assert self.pool.references(block) > 0
        kept = kept or {}
        if key in self._blocks:
            if self.kept(key).keys() >= kept.keys():
                return False
            self.retract(self._blocks[key])
        self._blocks[key] = block
        self._keys[block] = key
        if kept:
            self._kept[key] = kept
        return True

    def retract(self, block: int) -> None:
        """Nobody finds `block` any more; its holders must drop it. It is freed when the last one has."""
        self._forget(block)
        if self._unheld.pop(block, 0) is None:
            self.pool.free(block)

    def undo(self, moves: Iterable[Move]) -> None:
        """The plans they belonged to failed: what was to come is not there. Those not yet planned fail with them."""
        for move in (*moves, *self.take_moves()):
            if move.out:
                self._host.forget(move)
                if move.key not in self._blocks:
                    self._kept.pop(move.key, None)
            elif self._blocks.get(move.key) == move.block:
                self.retract(move.block)

    def release(self, blocks: Iterable[int]) -> None:
        """The caller's hold ends. Later blocks of a prompt should be evicted before earlier ones: they go in first."""
        for block in reversed(list(blocks)):
            if self.pool.release(block):
                continue
            if block in self._keys:
                self._unheld[block] = None
            else:
                self.pool.free(block)

    def clear(self) -> None:
        """Forgets everything published, in host memory too; unheld blocks become free."""
        self._host.clear()
        for block in list(self._keys):
            self.retract(block)
        self._kept.clear()

    def check(self) -> None:
        """Asserts the index and the pool agree."""
        self._host.check()
        self.pool.check(self._unheld)
        assert len(self._blocks) == len(self._keys)
        assert all(key in self._blocks or key in self._host for key in self._kept), "features without a block"
        assert all(self._blocks[key] == block for block, key in self._keys.items())
        assert all(block in self._keys for block in self._unheld), "an unpublished block is kept without a holder"

    def _forget(self, block: int) -> None:
        key = self._keys.pop(block, None)
        if key is not None:
            del self._blocks[key]
            if key not in self._host or None in self.kept(key).values():
                self._kept.pop(key, None)
