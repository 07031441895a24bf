"""Prompts that leave the prefix cache for host memory come back as they were, or are computed anew: never as something
else."""

from pathlib import Path

import pytest
import torch
from checkpoints import VOCAB_SIZE, padded_scores, save_checkpoint
from rewardserve.engine.base import EngineItem, EngineRequest
from rewardserve.engine.native import sizing
from rewardserve.engine.native.block_pool import BlockPool
from rewardserve.engine.native.prefix_cache import PrefixCache
from rewardserve.engine.native.scheduler import Scheduler
from rewardserve.engine.native.sequence import Move
from rewardserve.types import EncodedGroup
from scoring import IdGroup, joined, native, pack
from toy_model import ToyModel, true_score


def filled(num_blocks: int = 2, host_slots: int = 2) -> PrefixCache:
    """Every block is published, under b"0", b"1", ..., and held by nobody; b"0" is the least recently used."""
    cache = PrefixCache(BlockPool(num_blocks), host_slots)
    for number in range(num_blocks):
        block = cache.allocate()
        assert block is not None and cache.publish(str(number).encode(), block)
        cache.release([block])
    return cache


def test_an_evicted_block_is_copied_out_and_comes_back_to_who_asks_for_it() -> None:
    cache = filled()
    block = cache.allocate()
    assert cache.take_moves() == (Move(b"0", block, 0, out=True),)
    back = cache.acquire(b"0")
    assert cache.take_moves() == (Move(b"1", back, 1, out=True), Move(b"0", back, 0, out=False))
    assert cache.acquire(b"0") == back and cache.take_moves() == (), "it is there now"
    cache.release([block, back, back])
    cache.check()


def test_a_block_that_came_back_is_not_copied_out_again() -> None:
    cache = filled()
    cache.release([cache.allocate()])
    cache.release([cache.acquire(b"0")])
    cache.take_moves()
    held = [cache.allocate(), cache.allocate()]
    assert not [move for move in cache.take_moves() if move.key == b"0"]
    cache.release(held)
    cache.release([cache.acquire(b"0")])
    assert [move.out for move in cache.take_moves()] == [False]
    cache.check()


def test_what_gives_way_to_a_block_may_take_its_place_in_host_memory() -> None:
    """One slot: bringing back what is in it evicts a block that goes there. So nothing is brought back."""
    cache = filled(host_slots=1)
    first = cache.allocate()  # b"0" goes to the slot
    assert cache.acquire(b"0") is None
    moves = cache.take_moves()
    assert [(move.key, move.slot, move.out) for move in moves] == [(b"0", 0, True), (b"1", 0, True)]
    cache.release([first])
    cache.check()


def test_a_copy_of_a_plan_that_failed_is_not_trusted() -> None:
    cache = filled()
    held = cache.allocate()
    cache.undo(cache.take_moves())
    assert cache.acquire(b"0") is None, "it was never copied out"
    cache.release([held])
    cache.check()


def test_a_block_whose_way_back_failed_is_found_by_nobody_but_may_come_back_again() -> None:
    cache = filled()
    cache.release([cache.allocate()])
    cache.take_moves()  # of a plan that ran
    back = cache.acquire(b"0")
    cache.undo(cache.take_moves())
    cache.release([back])
    again = cache.acquire(b"0")
    assert [(move.key, move.block, move.out) for move in cache.take_moves()] == [(b"0", again, False)]
    cache.release([again])
    cache.check()


def test_moves_that_no_plan_took_are_undone_with_the_plans_that_failed() -> None:
    cache = filled()
    held = cache.allocate()
    cache.undo(())
    assert cache.take_moves() == () and cache.acquire(b"0") is None
    cache.release([held])
    cache.check()


def ids(length: int, seed: int) -> bytes:
    return pack([(seed * 1000 + i) % 997 for i in range(length)])


def test_a_forward_that_fails_between_two_prompts_leaves_true_scores() -> None:
    """The failed forward evicts the first prompt: had its copy been trusted, the first prompt would come back wrong."""
    scheduler, model = Scheduler(PrefixCache(BlockPool(4), 8), 1000, 100), ToyModel(4)
    prompts = [ids(300, 1), ids(300, 2), ids(300, 1)]
    for number, prompt in enumerate(prompts):
        scheduler.add(EngineRequest(str(number), (EncodedGroup(prompt, (ids(5, 7),)),)))
        plan = scheduler.schedule()
        if number == 1:
            assert any(move.out for move in plan.moves)
            scheduler.rollback()
            plan = scheduler.schedule()
        scheduler.complete(plan, model.run(plan))
        (outcome,) = scheduler.take_outcomes()
        assert outcome.result.groups[0].items[0].score == true_score(prompt + ids(5, 7))
        scheduler.check()


def test_features_of_a_forward_that_failed_are_not_trusted_for_a_copy_in_host_memory() -> None:
    """Asked for at more positions, a block that lies in host memory is computed anew; that forward fails."""
    scheduler, model = Scheduler(PrefixCache(BlockPool(4), 8), 1000, 100), ToyModel(4)
    prompt, other, response = ids(300, 1), ids(300, 2), ids(5, 7)

    def add(name: str, text: bytes, *steps: int) -> None:
        group = EncodedGroup(text, (response,), (steps,) if steps else ())
        scheduler.add(EngineRequest(name, (group,)))

    def run() -> EngineItem:
        while (plan := scheduler.schedule()) is not None:
            scheduler.complete(plan, model.run(plan))
            scheduler.check()
        (outcome,) = scheduler.take_outcomes()
        return outcome.result.groups[0].items[0]

    for name, text in (("first", prompt), ("second", other)):  # the second drives the first into host memory
        add(name, text)
        run()
    add("third", prompt, 200, 304)
    assert scheduler.schedule() is not None
    scheduler.rollback()
    scheduler.cancel("third")
    scheduler.take_outcomes()
    add("fourth", prompt)  # finds the second block in host memory, and needs nothing that was read there
    run()
    add("fifth", prompt, 200, 304)
    whole = prompt + response
    assert list(run().steps) == [true_score(whole[: 4 * (position + 1)]) for position in (200, 304)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    save_checkpoint(folder)
    return folder


async def test_a_prompt_that_came_back_gives_the_same_scores_and_costs_no_tokens(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing, "MAX_BLOCKS", 8)
    groups: list[IdGroup] = [
        ([(seed * 31 + i) % VOCAB_SIZE for i in range(280)], [list(range(10, 10 + n)) for n in (7, 40)])
        for seed in range(5)
    ]
    wanted = padded_scores(checkpoint, joined(groups), torch.float32)
    async with native(checkpoint, host_cache_bytes=64 << 20) as scorer:
        for _ in range(3):
            got, cached = [], []
            for group in groups:  # three blocks each: two prompts at a time have room
                result = await scorer.run([group])
                got += [item.score for item in result.groups[0].items]
                cached.append(result.groups[0].num_cached_tokens)
            assert (torch.tensor(got) - wanted).abs().max() < 1e-5 * wanted.abs().max()
        assert cached == [280] * 5
    async with native(checkpoint) as scorer:
        for _ in range(3):
            cached = [(await scorer.run([group])).groups[0].num_cached_tokens for group in groups]
        assert cached == [0] * 5, "without host memory none would be left"
