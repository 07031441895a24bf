"""The generator against senders made up here, which answer as the test wants."""

import asyncio
import dataclasses
import itertools
import statistics
import time

import pytest
from rewardserve.client import Group, TokenIds
from rewardserve.loadtest.loadgen import (
    INTERRUPTED,
    NOT_SENT,
    OK,
    Bounds,
    ClosedLoop,
    OpenLoop,
    Progress,
    Reply,
    Requests,
    arrivals,
    fell_behind,
    measure,
    percentile,
    warm_up,
)
from rewardserve.loadtest.report import figures
from rewardserve.loadtest.workloads import Workload

ANSWER = Reply(OK, "", num_pairs=2, num_tokens=30, num_prompt_tokens=10, num_cached_tokens=4)
STALL_S = 0.3


@pytest.fixture
def workload() -> Workload:
    return Workload("four", "four groups", tuple(Group(TokenIds([100 + n] * 20), [TokenIds([1])]) for n in range(4)))


@pytest.fixture
def requests(workload: Workload) -> Requests:
    return Requests(workload)


async def answer(groups) -> Reply:
    return ANSWER


async def never(groups) -> Reply:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


def test_arrivals_are_poisson_seeded_and_at_the_rate_asked_for():
    times = list(itertools.islice(arrivals(OpenLoop(50.0, seed=3)), 20_000))
    gaps = [later - earlier for earlier, later in itertools.pairwise([0.0, *times])]
    assert times == list(itertools.islice(arrivals(OpenLoop(50.0, seed=3)), 20_000))
    assert times[0] != next(arrivals(OpenLoop(50.0, seed=4)))
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.03)  # of an exponential gap: its mean
    assert statistics.median(gaps) == pytest.approx(0.6931 / 50, rel=0.03)


async def test_the_open_loop_sends_what_the_schedule_holds(requests):
    load = OpenLoop(400.0, seed=1)
    run = await measure(requests, answer, load, Bounds(0.5))
    assert run.num_answered == sum(1 for _ in itertools.takewhile(lambda due: due < 0.5, arrivals(load)))
    assert not run.failures and not run.interrupted and run.duration_s == 0.5
    assert run.num_pairs == 2 * run.num_answered
    assert run.pairs_per_s == pytest.approx(2 * run.requests_per_s)
    assert (run.num_cached_tokens, run.num_prompt_tokens) == (4 * run.num_answered, 10 * run.num_answered)


async def test_a_server_that_stalls_shows_in_everything_that_arrives_meanwhile(requests):
    first: list[float] = []

    async def stall(groups) -> Reply:
        first.append(time.monotonic())
        await asyncio.sleep(max(0.0, first[0] + STALL_S - time.monotonic()))
        return ANSWER

    run = await measure(requests, stall, OpenLoop(200.0), Bounds(0.6))
    assert run.latencies_s[-1] > 0.8 * STALL_S
    waited = [latency for latency in run.latencies_s if latency > STALL_S / 3]
    assert len(waited) > 20  # about 200/s x 0.2 s: not the one request that met the stall


async def test_a_generator_that_stalls_hides_nothing_and_says_so(requests):
    calls = itertools.count()

    async def block_once(groups) -> Reply:
        if next(calls) == 20:
            time.sleep(STALL_S)  # the event loop itself
        return ANSWER

    run = await measure(requests, block_once, OpenLoop(200.0), Bounds(0.6))
    waited = [latency for latency in run.latencies_s if latency > STALL_S / 3]
    assert len(waited) > 20  # their sender answered at once; they were due long before they were sent
    assert run.lags_s[-1] > STALL_S / 3
    assert fell_behind(run)


async def test_failures_are_counted_by_status_and_have_no_latency(requests):
    calls = itertools.count()

    async def every_third(groups) -> Reply:
        number = next(calls)
        return ANSWER if number % 3 else Reply("RESOURCE_EXHAUSTED", f"full, at {number}")

    run = await measure(requests, every_third, ClosedLoop(2), Bounds(30.0, max_requests=30))
    assert run.num_answered == len(run.latencies_s) == 20
    assert run.num_failed == 10 and run.failures["RESOURCE_EXHAUSTED"].count == 10
    assert run.failures["RESOURCE_EXHAUSTED"].example == "full, at 0"
    assert run.num_pairs == 40 and len(run.lags_s) == 30


async def test_no_more_are_in_flight_than_allowed_and_the_rest_is_not_dropped_from_sight(requests):
    stop = asyncio.Event()

    def stop_after_some(progress: Progress) -> None:
        if progress.num_failed > 20:
            stop.set()

    run = await measure(requests, never, OpenLoop(300.0), Bounds(30.0, max_in_flight=10), stop, stop_after_some)
    assert run.failures[INTERRUPTED].count == 10 and run.failures[NOT_SENT].count > 20
    assert run.interrupted and run.num_answered == 0 and run.requests_per_s == 0


async def test_the_closed_loop_has_so_many_callers_and_ends_with_its_count(requests):
    in_flight = most = 0

    async def count(groups) -> Reply:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0.001)
        in_flight -= 1
        return ANSWER

    run = await measure(requests, count, ClosedLoop(5), Bounds(30.0, max_requests=50))
    assert most == 5 and run.num_answered == 50 and not run.interrupted
    assert 0 < run.duration_s < 30


async def test_a_request_longer_than_the_run_counts_by_its_share(requests):
    async def slow(groups) -> Reply:
        await asyncio.sleep(0.4)
        return ANSWER

    run = await measure(requests, slow, ClosedLoop(3), Bounds(0.2))
    assert run.num_answered == 3
    assert run.requests_per_s == pytest.approx(sum(1 / latency for latency in run.latencies_s), rel=0.3)


async def test_a_run_that_is_stopped_reports_what_it_has(requests):
    stop = asyncio.Event()
    calls = itertools.count()

    async def stop_at_ten(groups) -> Reply:
        if next(calls) == 10:
            stop.set()
            await asyncio.Event().wait()
        return ANSWER

    run = await measure(requests, stop_at_ten, ClosedLoop(1), Bounds(30.0), stop)
    assert run.interrupted and run.num_answered == 10
    assert run.failures[INTERRUPTED].count == 1 and run.duration_s < 30


async def test_a_mistake_of_ours_is_raised_and_not_counted(requests):
    async def broken(groups) -> Reply:
        raise ZeroDivisionError

    for load in (OpenLoop(100.0), ClosedLoop(2)):
        with pytest.raises(ExceptionGroup):
            await measure(requests, broken, load, Bounds(1.0))


async def test_progress_is_told_while_it_goes_on(requests):
    seen = []
    await measure(requests, answer, OpenLoop(100.0), Bounds(0.6), on_progress=seen.append)
    assert len(seen) >= 2
    assert [each.num_answered for each in seen] == sorted(each.num_answered for each in seen)


async def test_the_warm_up_sends_everything_once(workload):
    sent = []

    async def note(groups) -> Reply:
        sent.extend(groups)
        return ANSWER

    run = await warm_up(Requests(workload), note, within_s=30.0)
    assert run.num_answered == 4 and sorted(group.prompt.data for group in sent) == sorted(
        group.prompt.data for group in workload.groups
    )


def test_warm_requests_come_again_and_cold_ones_never(workload):
    warm = Requests(workload, groups_per_request=3)
    first = [next(warm) for _ in range(len(warm))]
    assert [len(groups) for groups in first] == [3, 1]
    assert [next(warm) for _ in range(len(warm))] == first

    cold = Requests(workload, cold_fraction=1.0)
    prompts = [next(cold)[0].prompt.data for _ in range(40_000)]
    assert len(set(prompts)) == len(prompts)
    assert all(len(prompt) == 80 for prompt in prompts)
    assert all(max(TokenIds(prompt)) <= 103 for prompt in prompts[:100])


def test_the_cold_prompts_of_one_generator_are_not_those_of_the_next(workload):
    runs = [Requests(workload, cold_fraction=1.0) for _ in range(2)]
    first, second = ({next(run)[0].prompt.data for _ in range(100)} for run in runs)
    assert not first & second


def test_a_share_in_between_is_cold_in_a_seeded_order(workload):
    def sent(seed: int) -> list[bytes]:
        requests = Requests(workload, cold_fraction=0.25, seed=seed, first_salt=0)
        return [next(requests)[0].prompt.data for _ in range(4000)]

    known = {group.prompt.data for group in workload.groups}
    assert sum(prompt not in known for prompt in sent(1)) == pytest.approx(1000, abs=120)
    assert sent(1) == sent(1) != sent(2)


def test_a_percentile_is_a_value_that_was_seen():
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert percentile([7.0], 0.5) == percentile([7.0], 0.99) == 7.0
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0


@pytest.mark.parametrize("taken_s", [0.25, 0.8])
async def test_a_server_that_answers_late_and_steadily_has_kept_up(requests: Requests, taken_s: float) -> None:
    """Also where each request takes a good part of the run, or longer than all of it."""

    async def slowly(groups) -> Reply:
        await asyncio.sleep(taken_s)
        return ANSWER

    run = await measure(requests, slowly, OpenLoop(200.0), Bounds(0.5))
    assert figures(run).requests_per_s < 160 and figures(run).kept_up
    behind = dataclasses.replace(run, latencies_s=[number / 50 for number in range(run.num_answered)])
    assert not figures(behind).kept_up
