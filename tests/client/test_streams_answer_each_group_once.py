"""score_stream: complete, in any order, bounded, and whole after its servers were not."""

import asyncio
from collections import Counter

import grpc
import pytest
from rewardserve.client import (
    AsyncRewardClient,
    DeadlineExceeded,
    Group,
    GroupScore,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    RetryPolicy,
    Unavailable,
)

Code = grpc.StatusCode
PATIENT = RetryPolicy(max_attempts=100, initial_backoff_s=0.01, max_backoff_s=0.2)


def many(count: int) -> list[Group]:
    return [Group(f"prompt {n}", ["a", "b"], id=str(n)) for n in range(count)]


async def test_a_thousand_groups_come_back_complete_and_bounded(serve, expected):
    servers = [serve(), serve()]
    for server in servers:
        server.servicer.delay_s = 0.001
    groups = many(1000)
    taken = 0

    async def source():
        nonlocal taken
        for group in groups:
            taken += 1
            yield group

    order, num_yielded = [], 0
    async with AsyncRewardClient([server.target for server in servers]) as client:
        async for group, outcome in client.score_stream(source(), window=16):
            num_yielded += 1
            order.append(group.id)
            assert outcome.scores == expected(group) and outcome.id == group.id and outcome.model_version == "v1"
            assert taken - num_yielded <= 16 + 1  # one more is held back, not sent
    assert Counter(order) == Counter(group.id for group in groups)
    assert order != [group.id for group in groups]
    assert sum(server.servicer.max_in_flight for server in servers) <= 2 * 16
    assert max(server.servicer.max_in_flight for server in servers) <= 16
    assert [server.servicer.num_streams for server in servers] == [1, 1]


async def test_a_stream_that_is_done_ends_without_being_cancelled(server):
    async with AsyncRewardClient(server.target) as client:
        assert len([each async for each in client.score_stream(many(3))]) == 3
    assert server.servicer.half_closed == 1


async def test_streams_killed_in_the_middle_lose_and_repeat_nothing(server, expected):
    server.servicer.die_after = 7
    server.servicer.delay_s = 0.001
    groups = many(60)
    async with AsyncRewardClient(server.target, retry=PATIENT, timeout=30) as client:
        results = [each async for each in client.score_stream(groups, window=8)]
    assert Counter(group.id for group, _ in results) == Counter(group.id for group in groups)
    assert [outcome for _, outcome in results if not isinstance(outcome, GroupScore)] == []
    assert all(outcome.scores == expected(group) for group, outcome in results)
    assert server.servicer.num_streams >= 60 // 7


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.ABORTED, Code.INTERNAL, Code.UNKNOWN, Code.CANCELLED])
async def test_a_stream_that_broke_is_opened_again_whatever_it_died_of(server, expected, code):
    server.servicer.die_after, server.servicer.die_of = 3, code
    async with AsyncRewardClient(server.target, retry=PATIENT) as client:
        results = [each async for each in client.score_stream(many(8))]
    assert {group.id: outcome.scores for group, outcome in results} == {g.id: expected(g) for g in many(8)}


async def test_groups_of_a_stream_that_was_refused_are_refused(server):
    server.servicer.die_after, server.servicer.die_of = 0, Code.UNAUTHENTICATED
    async with AsyncRewardClient(server.target, retry=PATIENT) as client:
        outcomes = [outcome async for _, outcome in client.score_stream(many(4), window=4)]
    assert [type(outcome) for outcome in outcomes] == [PermissionDenied] * 4
    # Not for ever, that is: grpc.aio may mask the refusal once, where a write meets the end of the stream.
    assert server.servicer.num_streams <= 8


async def test_a_server_killed_in_the_middle_loses_and_repeats_nothing(server, expected):
    server.servicer.delay_s = 0.002
    groups = many(100)
    seen = []
    async with AsyncRewardClient(server.target, retry=PATIENT, timeout=30) as client:
        async for group, outcome in client.score_stream(groups, window=10):
            assert outcome.scores == expected(group)
            seen.append(group.id)
            if len(seen) == 40:
                await asyncio.to_thread(server.stop)
                asyncio.get_running_loop().call_later(
                    0.3, lambda: asyncio.ensure_future(asyncio.to_thread(server.start))
                )
    assert Counter(seen) == Counter(group.id for group in groups)
    assert server.servicer.num_streams >= 2


async def test_a_server_that_ends_the_stream_with_ok_owes_its_answers_still(server, expected, monkeypatch):
    real = server.servicer.ScoreStream
    calls = 0

    async def leave_early(requests, context):
        nonlocal calls
        calls += 1
        async for reply in real(requests, context):
            if calls == 1:
                return
            yield reply

    monkeypatch.setattr(server.servicer, "ScoreStream", leave_early)
    server.stop()
    server.start()
    async with AsyncRewardClient(server.target, retry=PATIENT) as client:
        results = [each async for each in client.score_stream(many(5))]
    assert all(outcome.scores == expected(group) for group, outcome in results) and len(results) == 5 and calls == 2


async def test_another_endpoint_takes_over(serve, expected):
    servers = [serve(), serve()]
    groups = many(60)
    seen = []
    async with AsyncRewardClient([server.target for server in servers], retry=PATIENT) as client:
        async for group, outcome in client.score_stream(groups, window=6):
            assert outcome.scores == expected(group)
            seen.append(group.id)
            if len(seen) == 20:
                await asyncio.to_thread(servers[0].stop)
    assert Counter(seen) == Counter(group.id for group in groups)


async def test_one_failing_group_does_not_disturb_the_others(server, failure, come_back_in):
    server.servicer.failures = [
        failure(Code.INVALID_ARGUMENT, "bad"),
        failure(Code.RESOURCE_EXHAUSTED, "full", come_back_in(0.05)),
        failure(Code.UNAVAILABLE, "restarting"),
    ]
    async with AsyncRewardClient(server.target, retry=PATIENT) as client:
        outcomes = [outcome async for _, outcome in client.score_stream(many(10))]
    assert Counter(type(outcome) for outcome in outcomes) == {GroupScore: 9, InvalidRequest: 1}
    assert server.servicer.num_streams == 1


async def test_each_group_has_its_own_time(server):
    server.servicer.hang = True
    async with AsyncRewardClient(server.target, retry=PATIENT) as client, asyncio.timeout(10):
        outcomes = [outcome async for _, outcome in client.score_stream(many(4), window=2, timeout=0.2)]
    assert [type(outcome) for outcome in outcomes] == [DeadlineExceeded] * 4


async def test_the_server_hears_for_how_long_each_group_is_waited_for(server):
    async with AsyncRewardClient(server.target) as client:
        async for _ in client.score_stream(many(3), timeout=7):
            pass
    assert [6 < request.timeout_s <= 7 for request in server.servicer.requests] == [True] * 3


async def test_each_failed_group_has_an_error_of_its_own(server):
    server.stop()
    policy = RetryPolicy(max_attempts=2, initial_backoff_s=0.001)
    async with AsyncRewardClient(server.target, retry=policy) as client:
        outcomes = [outcome async for _, outcome in client.score_stream(many(5))]
    assert all(isinstance(outcome, Unavailable) and outcome.attempts == 2 for outcome in outcomes)
    assert len({id(outcome) for outcome in outcomes}) == 5


async def test_a_group_that_is_too_large_for_the_server_fails_alone(server):
    """gRPC ends the whole stream over it: 4 MiB is what this server takes."""
    server.servicer.delay_s = 0.05
    groups = [*many(10), Group("x" * 5_000_000, ["a"], id="large"), *many(10)]
    async with AsyncRewardClient(server.target, retry=PATIENT) as client:
        outcomes = [(group, outcome) async for group, outcome in client.score_stream(groups, window=30)]
    assert len(outcomes) == 21
    for group, outcome in outcomes:
        if group.id == "large":
            assert isinstance(outcome, Overloaded) and outcome.retry_after_s is None and "larger" in outcome.message
        else:
            assert isinstance(outcome, GroupScore)


async def test_leaving_early_ends_the_stream_at_the_server(server):
    server.servicer.delay_s = 0.01
    async with AsyncRewardClient(server.target) as client:
        results = client.score_stream(many(1000), window=8)
        async for _ in results:
            break
        await asyncio.wait_for(results.aclose(), 10)
        async with asyncio.timeout(10):
            while server.servicer.num_in_flight:
                await asyncio.sleep(0.01)
    assert len(server.servicer.requests) < 100


async def test_what_the_callers_iterable_raises_reaches_the_caller(server):
    def broken():
        yield from many(3)
        raise KeyError("no more")

    async with AsyncRewardClient(server.target) as client:
        with pytest.raises(KeyError):
            async for _ in client.score_stream(broken()):
                pass


async def test_results_do_not_wait_for_a_slow_source(server):
    release = asyncio.Event()

    async def slow():
        yield many(1)[0]
        await release.wait()

    async with AsyncRewardClient(server.target) as client, asyncio.timeout(10):
        async for _, outcome in client.score_stream(slow()):
            assert outcome.scores
            release.set()


async def test_no_groups_are_no_results(server):
    async with AsyncRewardClient(server.target) as client:
        assert [each async for each in client.score_stream([])] == []
        with pytest.raises(ValueError):
            await anext(client.score_stream(many(1), window=0))
