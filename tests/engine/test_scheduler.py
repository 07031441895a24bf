"""Groups -> forwards. The promises of the scheduler, without torch, against a model of hashes."""

import itertools
from collections import Counter

import numpy as np
import pytest
from rewardserve.engine.base import EngineRequest
from rewardserve.engine.native.block_pool import BlockPool
from rewardserve.engine.native.prefix_cache import PrefixCache
from rewardserve.engine.native.scheduler import Scheduler
from rewardserve.models.reads import Reader, ReadPlan
from rewardserve.types import EncodedGroup, ItemCode, ItemFailure
from toy_model import ToyModel, true_score


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def ids(length: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 1000, length).astype("<i4").tobytes()


def group(prompt_length: int, *response_lengths: int, seed: int = 0) -> EncodedGroup:
    responses = tuple(ids(n, 1000 * seed + i + 1) for i, n in enumerate(response_lengths))
    return EncodedGroup(ids(prompt_length, seed), responses)


def request(name: str, *groups: EncodedGroup, **options) -> EngineRequest:
    return EngineRequest(name, groups, **options)


def scheduler(num_blocks: int = 64, tokens: int = 1000, sequences: int = 100, clock: Clock | None = None) -> Scheduler:
    cache = PrefixCache(BlockPool(num_blocks)) if num_blocks else None
    return Scheduler(cache, tokens, sequences, clock or Clock())


def run_all(scheduler: Scheduler, num_blocks: int = 64):
    """Runs to the end; returns the plans and the outcomes by request."""
    model, plans, outcomes = ToyModel(num_blocks), [], {}
    while (plan := scheduler.schedule()) is not None:
        plans.append(plan)
        scheduler.begin(plan)
        scheduler.complete(plan, model.run(plan))
        scheduler.check()
        for outcome in scheduler.take_outcomes():
            assert outcome.request_id not in outcomes
            outcomes[outcome.request_id] = outcome
    assert scheduler.idle
    scheduler.check()
    return plans, outcomes


def assert_scores_are_true(request: EngineRequest, outcome) -> None:
    for encoded, scored in zip(request.groups, outcome.result.groups, strict=True):
        for response, item in zip(encoded.responses, scored.items, strict=True):
            assert item.score == true_score(encoded.prompt + response)


def test_a_prompt_is_computed_once_for_all_its_responses_in_one_forward() -> None:
    queue = scheduler()
    queue.add(request("r", group(200, 10, 20, 30)))
    plans, outcomes = run_all(queue)
    assert [plan.num_tokens for plan in plans] == [200 + 10 + 20 + 30]
    assert_scores_are_true(request("r", group(200, 10, 20, 30)), outcomes["r"])


def test_a_second_request_finds_the_prompt_and_the_common_beginning_of_another() -> None:
    queue = scheduler()
    queue.add(request("first", group(300, 10)))
    run_all(queue)
    queue.add(request("same", group(300, 20)))
    queue.add(request("half", EncodedGroup(ids(300)[: 4 * 260] + ids(40, 9), (ids(5, 7),))))
    # the toy model of run_all is new, so only plans are looked at here
    plan = queue.schedule()
    assert plan is not None
    assert [(c.start, c.stop) for c in plan.chunks] == [(300, 320), (256, 300), (300, 305)]
    assert plan.num_cached_tokens == 300 + 256


def test_two_requests_for_one_prompt_in_one_forward_compute_it_once() -> None:
    queue = scheduler()
    queue.add(request("a", group(200, 10)))
    queue.add(request("b", group(200, 20)))
    plans, outcomes = run_all(queue)
    assert sum(plan.num_tokens for plan in plans) == 200 + 10 + 20
    assert outcomes["b"].result.groups[0].num_cached_tokens == 200


@pytest.mark.parametrize("budget", [1, 7, 100, 128, 129, 500])
@pytest.mark.parametrize("num_blocks", [12, 64])
def test_any_token_budget_gives_the_same_scores(budget: int, num_blocks: int) -> None:
    work = request("r", group(200, 10, 300, 5, seed=1), group(1, 150, seed=2), group(300, 1, 1, 1, seed=3))
    queue = scheduler(num_blocks, budget)
    queue.add(work)
    plans, outcomes = run_all(queue, num_blocks)
    assert max(plan.num_tokens for plan in plans) <= budget
    assert_scores_are_true(work, outcomes["r"])


def test_without_a_cache_every_response_is_planned_whole_with_its_prompt() -> None:
    work = request("r", group(50, 10, 20), group(5, 2000, seed=1))
    queue = scheduler(num_blocks=0, tokens=100)
    queue.add(work)
    plans, outcomes = run_all(queue, 0)
    assert all(chunk.start == 0 and not chunk.store for plan in plans for chunk in plan.chunks)
    assert_scores_are_true(work, outcomes["r"])


def test_a_group_stays_together() -> None:
    queue = scheduler(tokens=1000)
    for seed in range(4):
        queue.add(request(str(seed), group(100, *[50] * 8, seed=seed), client=str(seed)))
    plans, _ = run_all(queue)
    owners = [chunk.group.request_id for plan in plans for chunk in plan.chunks]
    assert sum(a != b for a, b in itertools.pairwise(owners)) == 3


def test_expired_work_is_dropped_before_it_costs_a_token() -> None:
    clock = Clock()
    queue = scheduler(clock=clock)
    queue.add(request("late", group(100, 10), deadline=5.0))
    queue.add(request("fine", group(100, 10, seed=1), deadline=50.0))
    clock.now = 5.0
    plans, outcomes = run_all(queue)
    assert outcomes["late"].expired and outcomes["late"].result is None
    assert {chunk.group.request_id for plan in plans for chunk in plan.chunks} == {"fine"}


def test_cancelled_work_is_dropped_and_its_half_computed_prompt_too() -> None:
    queue = scheduler(tokens=128)
    queue.add(request("r", group(600, 10)))
    plan = queue.schedule()
    assert plan is not None
    queue.cancel("r")
    assert [o.result for o in queue.take_outcomes()] == [None]
    queue.check()
    assert queue.schedule() is None
    queue.complete(plan, [])
    assert queue.idle and not queue.take_outcomes()
    queue.check()


def test_a_huge_request_does_not_hold_up_anothers_small_one() -> None:
    queue = scheduler(tokens=200)
    queue.add(request("huge", *[group(100, *[50] * 20, seed=i) for i in range(20)], client="a"))
    for _ in range(3):
        plan = queue.schedule()
        assert plan is not None
        queue.complete(plan, [[0.0]] * plan.num_reads)
    queue.add(request("small", group(20, 10, seed=99), client="b"))
    finished = []
    for _ in range(2):
        plan = queue.schedule()
        assert plan is not None
        queue.complete(plan, [[0.0]] * plan.num_reads)
        finished += [outcome.request_id for outcome in queue.take_outcomes()]
    assert finished == ["small"]


def test_a_score_that_is_no_number_is_a_failure_of_that_item_only() -> None:
    queue = scheduler()
    queue.add(request("r", group(10, 1, 2, 3)))
    plan = queue.schedule()
    assert plan is not None
    queue.complete(plan, [[1.0], [float("nan")], [float("inf")]])
    (outcome,) = queue.take_outcomes()
    items = outcome.result.groups[0].items
    assert [item.score for item in items] == [1.0, None, None]
    assert all(item.failure.code is ItemCode.INTERNAL for item in items[1:])


def test_a_failed_forward_and_the_one_planned_behind_it_are_as_if_they_had_never_been() -> None:
    work = [request("a", group(300, 10, 20)), request("b", group(300, 30)), request("c", group(90, 5, seed=4))]
    queue = scheduler(tokens=310)
    for one in work:
        queue.add(one)
    assert queue.schedule() and queue.schedule()
    queue.rollback()
    queue.check()
    _, outcomes = run_all(queue)
    for one in work:
        assert_scores_are_true(one, outcomes[one.request_id])


NUMBERS = itertools.count()


def keep_waiting(queue: Scheduler, client: str, how_many: int) -> None:
    """Requests of 50 tokens each."""
    waiting = [one for one in queue.requests() if one.client == client]
    for _ in range(how_many - len(waiting)):
        queue.add(request(f"{client} {next(NUMBERS)}", group(0, 50), client=client))


def test_what_was_in_a_failed_forward_is_the_first_of_its_client_again() -> None:
    queue = scheduler(num_blocks=0, tokens=100)
    for name in "abcdef":
        queue.add(request(name, group(0, 50)))
    assert queue.schedule() and queue.schedule()
    queue.rollback()
    plans, _ = run_all(queue, 0)
    assert [[chunk.group.request_id for chunk in plan.chunks] for plan in plans] == [["a", "b"], ["c", "d"], ["e", "f"]]


def test_a_client_does_not_pay_for_forwards_that_failed() -> None:
    queue = scheduler(num_blocks=0, tokens=50)
    served, tried = Counter(), set()
    for _ in range(120):
        keep_waiting(queue, "fails once", 2)
        keep_waiting(queue, "other", 2)
        plan = queue.schedule()
        owner = plan.chunks[0].group.request_id
        if owner.startswith("fails once") and owner not in tried:
            tried.add(owner)
            queue.rollback()
            continue
        queue.complete(plan, [[0.0]])
        served[queue.take_outcomes()[0].request_id.split(" ")[0]] += 1
    assert served == {"fails": 40, "other": 40}


def test_a_client_does_not_pay_for_failed_forwards_of_requests_it_cancelled_meanwhile() -> None:
    queue = scheduler(num_blocks=0, tokens=50)
    served = Counter()
    for number in range(120):
        keep_waiting(queue, "leaves once", 2)
        keep_waiting(queue, "other", 2)
        plan = queue.schedule()
        owner = plan.chunks[0].group.request_id
        if owner.startswith("leaves") and number % 3 == 0:
            queue.cancel(owner)
            queue.rollback()
            queue.check()
        else:
            queue.complete(plan, [[0.0]])
            served[owner.split(" ")[0]] += 1
        queue.take_outcomes()
    assert abs(served["leaves"] - served["other"]) <= 1


def test_nobody_has_credit_for_a_failed_forward_since_which_nobody_waited() -> None:
    queue = scheduler(num_blocks=0, tokens=500)
    queue.add(request("gone", group(0, 500), client="fails"))
    assert queue.schedule()
    keep_waiting(queue, "fails", 10)
    keep_waiting(queue, "other", 10)
    queue.cancel("gone")
    queue.rollback()
    served = Counter(chunk.group.request_id.split(" ")[0] for chunk in queue.schedule().chunks)
    assert served == {"fails": 5, "other": 5}


def test_a_client_whose_requests_expire_while_they_wait_is_served_its_share() -> None:
    clock = Clock()
    queue = scheduler(num_blocks=0, tokens=100, clock=clock)  # two requests each second
    served = Counter()
    for second in range(400):
        clock.now = float(second)
        for number in range(2):
            name = f"asks for twice its share {second} {number}"
            queue.add(request(name, group(0, 50), client="asks", deadline=clock.now + 5))
        keep_waiting(queue, "other", 4)
        plan = queue.schedule()
        queue.complete(plan, [[0.0]] * plan.num_reads)
        served.update(one.request_id.split(" ")[0] for one in queue.take_outcomes() if one.result is not None)
    assert served == {"asks": 400, "other": 400}


def test_memory_exhaustion_splits_until_only_the_item_that_cannot_fit_fails() -> None:
    """The toy device runs out of memory whenever the poisoned response is computed."""
    work = request("r", group(100, 30, 40, 50), group(60, 20, 25, seed=1))
    poison = work.groups[0].responses[1]
    queue, model = scheduler(), ToyModel(64)
    queue.add(work)
    for _ in range(100):
        plan = queue.schedule()
        if plan is None:
            break
        if any(chunk.tokens == poison for chunk in plan.chunks):
            queue.rollback()
            if not queue.split(plan):
                queue.fail(plan, ItemFailure(ItemCode.RESOURCE_EXHAUSTED, "no memory"))
        else:
            queue.complete(plan, model.run(plan))
        queue.check()
    (outcome,) = queue.take_outcomes()
    for number, (encoded, scored) in enumerate(zip(work.groups, outcome.result.groups, strict=True)):
        for index, (response, item) in enumerate(zip(encoded.responses, scored.items, strict=True)):
            if (number, index) == (0, 1):
                assert item.failure.code is ItemCode.RESOURCE_EXHAUSTED
            else:
                assert item.score == true_score(encoded.prompt + response)


def test_a_prompt_that_cannot_be_computed_fails_all_its_responses_and_no_others() -> None:
    work = request("r", group(100, 30, 40), group(60, 20, seed=1))
    poison = work.groups[0].prompt[:40]
    queue, model = scheduler(), ToyModel(64)
    queue.add(work)
    while (plan := queue.schedule()) is not None:
        if any(chunk.tokens.startswith(poison) for chunk in plan.chunks):
            queue.rollback()
            if not queue.split(plan):
                queue.fail(plan, ItemFailure(ItemCode.RESOURCE_EXHAUSTED, "no memory"))
        else:
            queue.complete(plan, model.run(plan))
        queue.check()
    (outcome,) = queue.take_outcomes()
    assert [[item.score is None for item in g.items] for g in outcome.result.groups] == [[True, True], [False]]


def test_groups_wait_for_blocks_without_ever_blocking_one_another() -> None:
    """Each needs most of the pool; whatever is started must be able to finish."""
    queue = scheduler(num_blocks=7, tokens=150)
    work = [request(str(i), group(500, 200, 150, seed=i), client=str(i)) for i in range(6)]
    for one in work:
        queue.add(one)
    _, outcomes = run_all(queue, 7)
    for one in work:
        assert_scores_are_true(one, outcomes[one.request_id])


def test_blocks_of_a_group_are_not_given_away_in_the_forward_that_reads_them() -> None:
    """Two groups that fit the token budget together, but not the pool: the second one waits for the next forward."""
    queue = scheduler(num_blocks=6, tokens=5000)
    first, second = request("a", group(300, 20, seed=1)), request("b", group(600, 20, seed=2))
    queue.add(first)
    queue.add(second)
    plans, outcomes = run_all(queue, num_blocks=6)
    assert_scores_are_true(first, outcomes["a"])
    assert_scores_are_true(second, outcomes["b"])
    for plan in plans:
        written = [block for chunk in plan.chunks if chunk.store for block in chunk.blocks]
        assert len(written) == len(set(written)), "one block stands for two prompts in one forward"


def test_a_block_that_is_filled_in_part_is_found_by_nobody() -> None:
    """A prompt is cut in mid-block; a more urgent request for it fills the forward before the rest is there."""
    queue, model = scheduler(tokens=100), ToyModel(64)
    first, second = request("a", group(120, 5, seed=1)), request("b", group(120, 100, seed=1), priority=1)
    queue.add(first)
    plan = queue.schedule()
    assert plan is not None and plan.num_tokens == 100
    queue.add(second)
    outcomes = {}
    while plan is not None:
        queue.begin(plan)
        queue.complete(plan, model.run(plan))
        outcomes.update({outcome.request_id: outcome for outcome in queue.take_outcomes()})
        plan = queue.schedule()
    assert_scores_are_true(first, outcomes["a"])
    assert_scores_are_true(second, outcomes["b"])


def sharing(trunks: tuple[int, ...], num_blocks: int = 64, tokens: int = 1000) -> Scheduler:
    """Of several models over one backbone."""
    readers = [Reader(ReadPlan())] * len(trunks)
    return Scheduler(PrefixCache(BlockPool(num_blocks)), tokens, 100, Clock(), readers, trunks)


def test_models_over_one_backbone_take_turns_and_a_forward_is_of_one_of_them() -> None:
    queue = sharing((0, 1, 2))
    for number in range(9):
        queue.add(request(f"r{number}", group(100, 10, seed=number), variant=0 if number < 7 else number - 6))
    plans = [plan for plan in iter(queue.schedule, None)]
    assert [plan.variant for plan in plans] == [0, 1, 2]
    assert [len(plan.chunks) for plan in plans] == [14, 2, 2]


def test_a_higher_priority_comes_before_a_turn() -> None:
    queue = sharing((0, 1, 2))
    for variant in range(3):
        queue.add(request(f"r{variant}", group(100, 10), variant=variant, priority=variant))
    assert [plan.variant for plan in iter(queue.schedule, None)] == [2, 1, 0]


@pytest.mark.parametrize(("trunks", "num_computed"), [((0, 0), 200), ((0, 1), 400)])
def test_a_prompt_is_found_where_the_backbone_computes_the_same(trunks: tuple[int, ...], num_computed: int) -> None:
    queue = sharing(trunks)
    for variant in range(2):
        queue.add(request(f"r{variant}", group(200, 10), variant=variant))
    plans = [plan for plan in iter(queue.schedule, None)]
    assert sum(plan.num_prompt_tokens for plan in plans) == num_computed
    model = ToyModel(64, trunks)
    for variant, plan in enumerate(plans):
        queue.complete(plan, model.run(plan))
        (outcome,) = queue.take_outcomes()
        assert outcome.result.groups[0].items[0].score == true_score(ids(200) + ids(10, 1), variant)


def test_one_model_does_not_take_the_blocks_that_another_waits_for() -> None:
    """A long request of the second waits for blocks, while small ones of the first keep coming."""
    queue, model = sharing((0, 1), num_blocks=6, tokens=130), ToyModel(6, (0, 1))
    numbers = itertools.count()
    for _ in range(3):
        queue.add(request(f"small {next(numbers)}", group(100, 10, seed=next(numbers))))
    queue.add(request("large", group(500, 10, seed=1000), variant=1))
    variants = set()
    for _ in range(10):
        plan = queue.schedule()
        variants.add(plan.variant)
        queue.complete(plan, model.run(plan))
        for outcome in queue.take_outcomes():
            if outcome.request_id.startswith("small"):
                queue.add(request(f"small {next(numbers)}", group(100, 10, seed=next(numbers))))
    assert variants == {0, 1}


def test_deadlines_of_requests_that_ended_are_forgotten() -> None:
    queue, model = scheduler(), ToyModel(64)
    for number in range(5000):
        queue.add(request(f"r{number}", group(10, 5), deadline=1e9))
        while (plan := queue.schedule()) is not None:
            queue.complete(plan, model.run(plan))
    assert queue.idle and len(queue._jobs._deadlines) < 2000


@pytest.mark.parametrize("priority", [0, 10])
@pytest.mark.parametrize("length", [100, 300, 550, 600])
def test_a_backlog_of_one_model_leaves_another_its_turns(length: int, priority: int) -> None:
    """Also where a forward takes more blocks than there are, so that each ends with something that waits for blocks."""
    queue, model = sharing((0, 1), num_blocks=8), ToyModel(8, (0, 1))
    for number in range(60):
        queue.add(request(f"backlog {number}", group(length, 10, seed=number)))
    queue.complete((plan := queue.schedule()), model.run(plan))
    queue.add(request("other", group(200, 10, seed=99), variant=1, priority=priority))
    ended = []
    for _ in range(4):
        plan = queue.schedule()
        queue.complete(plan, model.run(plan))
        ended += [outcome.request_id for outcome in queue.take_outcomes()]
    assert "other" in ended


def test_what_waits_is_counted_for_each_model() -> None:
    queue = sharing((0, 1))
    queue.add(request("a", group(100, 10, 20), variant=1))
    assert (queue.num_waiting_requests(0), queue.num_waiting_tokens(0)) == (0, 0)
    assert (queue.num_waiting_requests(1), queue.num_waiting_tokens(1)) == (1, 130)
