"""Prompt beginnings whose activations are in blocks: match, publish, retract, evict. Loads no torch.

A block is known by a key chained from all tokens up to its end, so prompts with a common beginning share its blocks.
A prompt's partial last block is a block like any other, found only by a prompt that ends with exactly these tokens.
Blocks are published when their forward is scheduled, before it has run: within a forward every layer writes keys
before it attends, so whoever is scheduled in the same forward or later may read them. If that forward fails they are
retracted.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from rewardserve_kernels.ragged import BLOCK_TOKENS

from rewardserve.engine.native.block_pool import BlockPool

Key = bytes
BLOCK_BYTES = 4 * BLOCK_TOKENS


def block_keys(prompt: bytes) -> Iterator[Key]:
    """Keys of the blocks of a prompt (little-endian int32 token ids), the partial last one included."""
    key = b""
    for begin in range(0, len(prompt), BLOCK_BYTES):
        key = hashlib.blake2b(key + prompt[begin : begin + BLOCK_BYTES], digest_size=16).digest()
        yield key


class PrefixCache:
    """Finds blocks by key, and keeps those nobody holds until their room is needed, least recently used first."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self._blocks: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give."""
        return self.pool.num_free + len(self._unheld)

    def acquire(self, key: Key) -> int | None:
        """The block published under `key`, held once more until `release`; None if there is none."""
        block = self._blocks.get(key)
        if block is not None:
            self._unheld.pop(block, None)
            self.pool.hold(block)
        return block

    def allocate(self) -> int | None:
        """A block to write, held by the caller; evicts the least recently used unheld one if none is free."""
        if self.pool.num_free:
            return self.pool.take()
        if not self._unheld:
            return None
        block, _ = self._unheld.popitem(last=False)
        self._forget(block)
        self.pool.free(block)
        return self.pool.take()

    def publish(self, key: Key, block: int) -> bool:
        """Lets others find `block`, which the caller holds. False if another block already has this key."""
        assert self.pool.references(block) > 0
        if key in self._blocks:
            return False
        self._blocks[key] = block
        self._keys[block] = key
        return True

    def retract(self, block: int) -> None:
        """Nobody finds `block` any more; its holders must drop it. It is freed when the last one has."""
        self._forget(block)
        if self._unheld.pop(block, 0) is None:
            self.pool.free(block)

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
        """Forgets everything published; unheld blocks become free."""
        for block in list(self._keys):
            self.retract(block)

    def check(self) -> None:
        """Asserts the index and the pool agree."""
        self.pool.check(self._unheld)
        assert len(self._blocks) == len(self._keys)
        assert all(self._blocks[key] == block for block, key in self._keys.items())
        assert all(block in self._keys for block in self._unheld), "an unpublished block is kept without a holder"

    def _forget(self, block: int) -> None:
        key = self._keys.pop(block, None)
        if key is not None:
            del self._blocks[key]
