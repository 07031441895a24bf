"""Whatever makes forwards fail, every request ends after few of them, and only what cannot be computed has no score."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewardserve.engine.base import EngineRequest
from rewardserve.engine.native.block_pool import BlockPool
from rewardserve.engine.native.prefix_cache import PrefixCache
from rewardserve.engine.native.scheduler import Scheduler
from rewardserve.engine.native.step_limit import MAX_PATIENCE, StepLimit
from rewardserve.types import EncodedGroup, ItemCode, ItemFailure
from toy_model import ToyModel, true_score

NUM_BLOCKS, MAX_TOKENS, MAX_CHUNKS = 400, 4096, 64
FAILURE = ItemFailure(ItemCode.INTERNAL, "it cannot be computed")
_numbers = itertools.count(1)


def new_ids(length: int) -> bytes:
    """No two calls give the same first token."""
    first = 1000 * next(_numbers)
    return b"".join((first + i % 1000).to_bytes(4, "little") for i in range(length))


class Device:
    """Has memory for `capacity` tokens of a forward, and fails on whatever touches one of `bad`: (response, position in
    it)."""

    def __init__(self, capacity: int, bad: dict[bytes, int]) -> None:
        self.capacity, self.bad = capacity, bad
        self.num_failures = self.num_forwards = 0

    def out_of_memory(self, plan) -> bool:
        return plan.num_tokens > self.capacity

    def fails(self, plan) -> bool:
        return self.out_of_memory(plan) or any(
            chunk.sequence is not None
            and chunk.sequence.tokens in self.bad
            and chunk.start <= chunk.group.prompt_length + self.bad[chunk.sequence.tokens] < chunk.stop
            for chunk in plan.chunks
        )


def run(requests: list[EngineRequest], device: Device, num_ahead: int) -> dict[str, object]:
    """As the engine's two threads do: up to `num_ahead` forwards are planned before the first of them ends."""
    scheduler, model = Scheduler(PrefixCache(BlockPool(NUM_BLOCKS)), MAX_TOKENS, MAX_CHUNKS), ToyModel(NUM_BLOCKS)
    outcomes: dict[str, object] = {}
    for request in requests:
        scheduler.add(request)
    planned = []
    while not scheduler.idle:
        while len(planned) < num_ahead and (plan := scheduler.schedule()) is not None:
            planned.append(plan)
        plan = planned.pop(0)
        device.num_forwards += 1
        assert device.num_forwards < 5000, "it goes on for ever"
        if device.fails(plan):
            device.num_failures += 1
            planned.clear()
            scheduler.rollback()
            if not scheduler.split(plan, device.out_of_memory(plan)):
                scheduler.fail(plan, FAILURE)
        else:
            scheduler.complete(plan, model.run(plan))
        scheduler.check()
        for outcome in scheduler.take_outcomes():
            assert outcome.request_id not in outcomes
            outcomes[outcome.request_id] = outcome
    return outcomes


def check(requests: list[EngineRequest], device: Device, outcomes: dict) -> None:
    for request in requests:
        for encoded, scored in zip(request.groups, outcomes[request.request_id].result.groups, strict=True):
            for response, item in zip(encoded.responses, scored.items, strict=True):
                if response in device.bad:
                    assert item.failure == FAILURE
                else:
                    assert item.score == true_score(encoded.prompt + response)


@pytest.mark.parametrize("num_ahead", [1, 2, 3])
@pytest.mark.parametrize("length", [200, 600, 2000, 9000, 24_000])
def test_a_response_longer_than_what_fits_is_computed_in_chunks_that_do(length: int, num_ahead: int) -> None:
    requests = [EngineRequest("r", (EncodedGroup(new_ids(200), (new_ids(length),)),))]
    device = Device(capacity=150, bad={})
    check(requests, device, run(requests, device, num_ahead))
    assert device.num_failures < 10


@pytest.mark.parametrize("num_ahead", [1, 2, 3])
@pytest.mark.parametrize("length", [100, 300, 1000, 6000])
def test_a_response_with_a_token_that_cannot_be_computed_fails_wherever_it_is(length: int, num_ahead: int) -> None:
    bad, good = new_ids(length), new_ids(length)
    requests = [EngineRequest("r", (EncodedGroup(new_ids(200), (good, bad)),))]
    device = Device(capacity=10**9, bad={bad: length - 5})
    check(requests, device, run(requests, device, num_ahead))
    assert device.num_failures < 15


@settings(max_examples=60)
@given(st.data())
def test_every_request_ends_after_few_failures_and_nothing_else_fails(data: st.DataObject) -> None:
    bad: dict[bytes, int] = {}
    requests = []
    for number in range(data.draw(st.integers(1, 3), "requests")):
        groups = []
        for _ in range(data.draw(st.integers(1, 3), "groups")):
            lengths = data.draw(st.lists(st.sampled_from([1, 40, 130, 700, 5000]), min_size=1, max_size=4), "responses")
            responses = tuple(map(new_ids, lengths))
            for response in responses:
                if data.draw(st.integers(0, 5), "is bad") == 0:
                    bad[response] = data.draw(st.integers(0, len(response) // 4 - 1), "at")
            groups.append(EncodedGroup(new_ids(data.draw(st.sampled_from([1, 128, 300, 2000]), "prompt")), responses))
        requests.append(EngineRequest(str(number), tuple(groups), client=str(number)))
    device = Device(data.draw(st.sampled_from([128, 1000, 10**9]), "capacity"), bad)
    check(requests, device, run(requests, device, data.draw(st.integers(1, 3), "ahead")))
    assert device.num_failures <= 16 * (len(bad) + sum(len(request.groups) for request in requests))


def test_a_device_that_stays_short_of_memory_runs_out_ever_more_seldom() -> None:
    limit, ran_out = StepLimit(8192, least=128), []
    for number in range(4000):
        if limit.tokens > 3000:
            ran_out.append(number)
            limit.ran_out(limit.tokens)
        else:
            limit.ended_well()
    gaps = [later - earlier for earlier, later in itertools.pairwise(ran_out)]
    assert len(ran_out) < 25 and gaps[-1] >= MAX_PATIENCE


def test_a_device_that_was_short_of_memory_for_a_moment_is_soon_given_whole_forwards_again() -> None:
    limit = StepLimit(8192, least=128)
    for _ in range(6):
        limit.ran_out(limit.tokens)
    assert limit.tokens == 128
    for _ in range(30):
        limit.ended_well()
    assert limit.tokens == 8192


@pytest.mark.parametrize("out_of_memory", [False, True])
def test_items_that_never_fit_do_not_make_the_forwards_of_others_small(out_of_memory: bool) -> None:
    """One client has a failing item in every tenth forward or so; another keeps the device busy."""
    scheduler = Scheduler(PrefixCache(BlockPool(NUM_BLOCKS)), MAX_TOKENS, MAX_CHUNKS)
    failure = ItemFailure(ItemCode.RESOURCE_EXHAUSTED if out_of_memory else ItemCode.INTERNAL, "no")
    bad, sizes = set(), []
    for number in range(1500):
        while scheduler.num_waiting_tokens() < 4 * MAX_TOKENS:
            group = EncodedGroup(new_ids(256), (new_ids(256), new_ids(256)))
            scheduler.add(EngineRequest(f"good {next(_numbers)}", (group,), client="busy"))
        if number % 10 == 0:
            bad.add(name := f"bad {number}")
            scheduler.add(EngineRequest(name, (EncodedGroup(new_ids(10), (new_ids(600),)),), client="other"))
        plan = scheduler.schedule()
        if any(chunk.group.request_id in bad and chunk.sequence is not None for chunk in plan.chunks):
            scheduler.rollback()
            if not scheduler.split(plan, out_of_memory):
                scheduler.fail(plan, failure)
            continue
        scheduler.complete(plan, [[0.0]] * plan.num_reads)
        if number > 700:
            sizes.append(plan.num_tokens)
    assert sum(sizes) / len(sizes) > MAX_TOKENS / 4
