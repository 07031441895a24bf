"""A host that lost power says nothing, and TCP keeps its connections: its prompts move, those of a slow one stay."""

import asyncio
import contextlib

import grpc
import pytest
from rewardserve.client import (
    AsyncRewardClient,
    DeadlineExceeded,
    Group,
    GroupScore,
    RetryPolicy,
    RewardClient,
    Unavailable,
    pulse,
)

GROUPS = [Group(f"prompt {n}", ["a", "b"], id=str(n)) for n in range(16)]
FAST = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.1)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(pulse, "SILENCE_S", 0.2)
    monkeypatch.setattr(pulse, "ANSWER_S", 0.5)


@pytest.fixture
def servers(serve):
    return [serve(), serve()]


@pytest.fixture
def host(proxy, servers):
    """Of the first server."""
    return proxy(servers[0])


@pytest.fixture
def targets(host, servers):
    return [host.target, servers[1].target]


async def test_no_call_fails_over_it(servers, host, targets, expected):
    async with AsyncRewardClient(targets, cool_down_s=0.2) as client:
        await client.score(GROUPS)
        host.lose_power()
        for _ in range(3):
            result = await client.score(GROUPS, timeout=30)
            assert [group.scores for group in result.groups] == [expected(group) for group in GROUPS]
            assert (await client.rank("p", ["a", "b"], timeout=30)).best
    assert set(servers[1].servicer.prompts) == {group.prompt for group in GROUPS}


async def test_no_group_of_a_stream_fails_over_it(host, targets, expected):
    async with AsyncRewardClient(targets, cool_down_s=0.2) as client, asyncio.timeout(30):
        outcomes = {}
        async for group, outcome in client.score_stream(GROUPS, window=4):
            outcomes[group.id] = outcome
            host.lose_power()
        async for group, outcome in client.score_stream(GROUPS):
            assert isinstance(outcome, GroupScore) and outcome.scores == expected(group)
    assert {id: outcome.scores for id, outcome in outcomes.items()} == {g.id: expected(g) for g in GROUPS}


@pytest.mark.parametrize("how", ["calls", "stream"])
def test_the_blocking_client_loses_nothing_either(host, targets, expected, how: str):
    with RewardClient(targets, timeout=30) as client:
        client.score(GROUPS)
        host.lose_power()
        if how == "stream":
            found = {group.id: outcome.scores for group, outcome in client.score_stream(GROUPS)}
        else:
            found = {group.id: group.scores for group in client.score(GROUPS).groups}
    assert found == {group.id: expected(group) for group in GROUPS}


@pytest.mark.parametrize("how", ["calls", "stream"])
async def test_callers_whose_time_is_shorter_than_its_silence_are_heeded_too(host, targets, how: str):
    async def num_answered(client) -> int:
        if how == "stream":
            return sum([isinstance(each, GroupScore) async for _, each in client.score_stream(GROUPS, timeout=0.1)])
        calls = [client.score([group], timeout=0.1) for group in GROUPS]
        return sum(not isinstance(each, Exception) for each in await asyncio.gather(*calls, return_exceptions=True))

    async with AsyncRewardClient(targets, cool_down_s=60) as client:
        await client.score(GROUPS)
        host.lose_power()
        assert await num_answered(client) < len(GROUPS)
        async with asyncio.timeout(30):
            while await num_answered(client) < len(GROUPS):
                await asyncio.sleep(0.05)


async def test_it_gets_its_prompts_back_when_it_is_back(servers, host, targets):
    async with AsyncRewardClient(targets, timeout=30, cool_down_s=0.2) as client:
        await client.score(GROUPS)
        before = set(servers[0].servicer.prompts)
        host.lose_power()
        await client.score(GROUPS)
        servers[0].servicer.prompts.clear()
        host.come_back()
        async with asyncio.timeout(30):
            while set(servers[0].servicer.prompts) != before:
                await asyncio.sleep(0.1)
                await client.score(GROUPS)
        assert before and set(servers[0].servicer.prompts) == before


async def test_where_there_is_no_other_it_is_waited_for(host, expected):
    async with AsyncRewardClient(host.target, timeout=60, retry=FAST) as client, asyncio.timeout(50):
        await client.score(GROUPS)
        host.lose_power()
        call = asyncio.create_task(client.score(GROUPS))
        while host.num_connections < 2:
            await asyncio.sleep(0.01)
        host.come_back()
        assert [group.scores for group in (await call).groups] == [expected(group) for group in GROUPS]


async def test_what_is_sent_once_only_fails_and_does_not_wait_for_its_time(host, targets):
    async with AsyncRewardClient(targets) as client, asyncio.timeout(30):
        await client.list_models()
        host.lose_power()
        with pytest.raises(Unavailable, match="silent") as failed:
            await client.load_model("new", "folder", timeout=600)
        assert failed.value.endpoint == host.target


async def test_one_client_does_not_take_over_what_another_gave_up(host):
    """gRPC shares connections within a process unless it is told not to."""
    retry = RetryPolicy(max_attempts=1)
    async with AsyncRewardClient(host.target, retry=retry) as one, AsyncRewardClient(host.target, retry=retry) as other:
        for client in (one, other):
            await client.score(GROUPS[:1])
        host.lose_power()
        with pytest.raises(Unavailable):
            await one.score(GROUPS[:1], timeout=30)
        async with asyncio.timeout(30):
            while host.num_connections < 3:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("health", [None, grpc.StatusCode.UNIMPLEMENTED])
async def test_a_slow_server_is_waited_for(server, proxy, expected, health):
    """It is asked for its health, and whatever it says to that, it lives."""
    server.servicer.delay_s, server.servicer.health_code = 0.8, health
    way = proxy(server)
    async with AsyncRewardClient(way.target, timeout=30) as client:
        result = await client.score(GROUPS)
        assert [group.scores for group in result.groups] == [expected(group) for group in GROUPS]
        streamed = {group.id: outcome.scores async for group, outcome in client.score_stream(GROUPS)}
        assert streamed == {group.id: expected(group) for group in GROUPS}
    assert server.servicer.num_checks >= 3
    assert set(server.servicer.prompts.values()) == {2} and server.servicer.num_cancelled == 0
    assert (way.num_connections, server.servicer.num_streams) == (1, 1)


async def test_a_slow_server_whose_callers_have_little_time_keeps_its_connection(server, proxy):
    server.servicer.hang = True
    way = proxy(server)
    async with AsyncRewardClient(way.target, timeout=0.1) as client, asyncio.timeout(30):
        while server.servicer.num_checks < 3:
            with contextlib.suppress(DeadlineExceeded):
                await client.score(GROUPS[:1])
        outcomes = [outcome async for _, outcome in client.score_stream(GROUPS, window=1)]
    assert [type(outcome) for outcome in outcomes] == [DeadlineExceeded] * len(GROUPS)
    assert (way.num_connections, server.servicer.num_streams) == (1, 1)


async def test_a_server_that_answers_its_callers_need_not_say_how_it_is(server, proxy, expected):
    server.servicer.health_hangs = True
    way = proxy(server)
    async with AsyncRewardClient(way.target, timeout=30) as client:

        async def call(after_s: float) -> None:
            await asyncio.sleep(after_s)
            result = await client.score(GROUPS[:1])
            assert result.groups[0].scores == expected(GROUPS[0])

        server.servicer.delay_s = 0.45  # so that it is asked, and answers a call before it would have to answer that
        await asyncio.gather(*(call(n * 0.2) for n in range(10)))
    assert way.num_connections == 1 and server.servicer.num_cancelled == 0
