"""Blocks of prompt beginnings: found, shared, evicted, retracted."""

import numpy as np
import pytest
from rewardserve.engine.native.block_pool import BlockPool
from rewardserve.engine.native.prefix_cache import PrefixCache, block_keys

BLOCK = 128


def prompt(*runs: tuple[int, int]) -> bytes:
    """(token, count) runs -> ids."""
    return np.concatenate([np.full(count, token) for token, count in runs]).astype("<i4").tobytes()


@pytest.fixture
def cache():
    cache = PrefixCache(BlockPool(4))
    yield cache
    cache.check()


def publish(cache: PrefixCache, key: bytes) -> int:
    block = cache.allocate()
    assert block is not None
    assert cache.publish(key, block)
    return block


def test_prompts_with_a_common_beginning_share_its_blocks_and_no_others() -> None:
    first = list(block_keys(prompt((1, 2 * BLOCK), (2, 50))))
    second = list(block_keys(prompt((1, 2 * BLOCK), (3, 50))))
    assert first[:2] == second[:2]
    assert first[2] != second[2]


def test_a_block_is_known_by_all_tokens_before_it_too() -> None:
    first = list(block_keys(prompt((1, BLOCK), (9, BLOCK))))
    second = list(block_keys(prompt((2, BLOCK), (9, BLOCK))))
    assert first[1] != second[1]


def test_a_partial_block_is_found_only_by_a_prompt_that_ends_there() -> None:
    short, long = list(block_keys(prompt((1, 60)))), list(block_keys(prompt((1, BLOCK))))
    assert len(short) == len(long) == 1
    assert short != long


def test_a_published_block_is_found_while_held_and_after(cache: PrefixCache) -> None:
    block = publish(cache, b"k")
    assert cache.acquire(b"k") == block
    cache.release([block, block])
    assert cache.acquire(b"k") == block
    cache.release([block])


def test_held_blocks_are_never_evicted(cache: PrefixCache) -> None:
    held = [publish(cache, bytes([i])) for i in range(4)]
    assert cache.allocate() is None
    cache.release(held[:1])
    assert cache.allocate() == held[0]
    assert cache.acquire(bytes([0])) is None
    cache.release(held)


def test_the_least_recently_used_block_is_evicted_first_and_a_prompts_end_before_its_beginning(
    cache: PrefixCache,
) -> None:
    early = [publish(cache, bytes([i])) for i in range(2)]
    cache.release(early)
    late = [publish(cache, bytes([i])) for i in range(2, 4)]
    cache.release(late)
    assert [cache.allocate() for _ in range(4)] == [early[1], early[0], late[1], late[0]]
    cache.release(range(4))


def test_a_retracted_block_is_found_by_nobody_and_free_when_its_holders_are_done(cache: PrefixCache) -> None:
    block = publish(cache, b"k")
    cache.retract(block)
    assert cache.acquire(b"k") is None
    assert cache.pool.num_free == 3
    cache.release([block])
    assert cache.pool.num_free == 4


def test_retracting_twice_or_after_eviction_is_harmless(cache: PrefixCache) -> None:
    block = publish(cache, b"k")
    cache.release([block])
    cache.retract(block)
    cache.retract(block)
    assert cache.pool.num_free == 4


def test_the_second_block_with_a_key_stays_private(cache: PrefixCache) -> None:
    first = publish(cache, b"k")
    second = cache.allocate()
    assert second is not None and not cache.publish(b"k", second)
    cache.release([second])
    assert cache.acquire(b"k") == first
    cache.release([first, first])


def test_clearing_forgets_everything_but_spares_what_is_held(cache: PrefixCache) -> None:
    held, unheld = publish(cache, b"a"), publish(cache, b"b")
    cache.release([unheld])
    cache.clear()
    assert cache.acquire(b"a") is None and cache.acquire(b"b") is None
    cache.check()
    cache.release([held])
    assert cache.pool.num_free == 4
