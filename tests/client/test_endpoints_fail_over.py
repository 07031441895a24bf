"""Several endpoints: affinity, spreading, one that goes away and comes back, versions that differ."""

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2
from rewardserve.client import AsyncRewardClient, Group, InvalidRequest, RetryPolicy, Unavailable, VersionMismatch

FAST = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.1)
GROUPS = [Group(f"prompt {n}", ["a", "b"], id=str(n)) for n in range(30)]


@pytest.fixture
def servers(serve):
    return [serve() for _ in range(3)]


@pytest.fixture
def targets(servers):
    return [server.target for server in servers]


def prompts_of(servers) -> list[set[str]]:
    return [set(server.servicer.prompts) for server in servers]


def forget(servers) -> None:
    for server in servers:
        server.servicer.prompts.clear()


async def test_groups_spread_over_all_endpoints_and_return_in_order(servers, targets, expected):
    async with AsyncRewardClient(targets) as client:
        result = await client.score(GROUPS)
    assert [group.scores for group in result.groups] == [expected(group) for group in GROUPS]
    assert [group.id for group in result.groups] == [group.id for group in GROUPS]
    assert all(prompts_of(servers)) and sum(map(len, prompts_of(servers))) == len(GROUPS)
    ids = {request.request_id for server in servers for request in server.servicer.requests}
    assert len(ids) == 3 and all(part.startswith(result.request_id) for part in ids)


async def test_the_same_prompt_goes_to_the_same_endpoint_by_whatever_way(servers, targets):
    async with AsyncRewardClient(targets) as client:
        await client.score(GROUPS)
    before = prompts_of(servers)
    async with AsyncRewardClient(targets[::-1]) as client:
        for group in GROUPS[:6]:
            await client.score([group])
        async for _ in client.score_stream(GROUPS):
            pass
    assert prompts_of(servers) == before


async def test_timings_of_a_split_call_are_the_maximum_of_each_field(servers, targets):
    for n, server in enumerate(servers):

        def change(reply, n=n):
            reply.timings.queue_s, reply.timings.compute_s = n, 10 - n

        server.servicer.change_reply = change
    async with AsyncRewardClient(targets) as client:
        timings = (await client.score(GROUPS)).timings
    assert (timings.queue_s, timings.compute_s, timings.total_s) == (2, 10, 0.5)


async def test_an_endpoint_that_stops_passes_its_groups_on_and_gets_them_back(servers, targets, expected):
    async with AsyncRewardClient(targets, cool_down_s=0.2) as client:
        await client.score(GROUPS)
        before = prompts_of(servers)
        servers[0].stop()
        forget(servers)
        result = await client.score(GROUPS)
        assert [group.scores for group in result.groups] == [expected(group) for group in GROUPS]
        assert prompts_of(servers)[1:] > before[1:]
        # Its groups went to each one's own second choice, not all to one other endpoint.
        assert all(now - then for now, then in zip(prompts_of(servers)[1:], before[1:], strict=True))
        servers[0].start()
        async with asyncio.timeout(15):
            while prompts_of(servers) != before:
                await asyncio.sleep(0.1)
                forget(servers)
                await client.score(GROUPS)


async def test_an_endpoint_that_dies_in_the_middle_of_a_call_loses_nothing(servers, targets, expected):
    servers[0].servicer.hang = True
    async with AsyncRewardClient(targets) as client:
        call = asyncio.create_task(client.score(GROUPS, timeout=20))
        async with asyncio.timeout(10):
            while not servers[0].servicer.requests:
                await asyncio.sleep(0.01)
        await asyncio.to_thread(servers[0].stop)
        result = await call
    assert [group.scores for group in result.groups] == [expected(group) for group in GROUPS]


async def test_one_endpoint_that_changed_its_version_between_two_parts_is_not_mixed(servers, targets):
    """After a failover two parts are with the same endpoint, one of them scored before the change."""
    first, second = servers[:2]
    second.servicer.hang = True
    async with AsyncRewardClient(targets[:2]) as client:
        call = asyncio.create_task(client.score(GROUPS, timeout=20))
        async with asyncio.timeout(10):
            while not (first.servicer.prompts and second.servicer.requests):
                await asyncio.sleep(0.01)
        first.servicer.version = "v2"
        await asyncio.to_thread(second.stop)
        with pytest.raises(VersionMismatch) as caught:
            await call
    assert set(caught.value.versions.values()) == {"toy v1", "toy v2"}


async def test_a_wrong_group_is_named_by_its_place_in_the_whole_call(servers, targets, failure):
    async with AsyncRewardClient(targets) as client:
        await client.score(GROUPS)
        server = next(server for server in servers if server.servicer.prompts)
        sent = [group.prompt.text for group in server.servicer.requests[0].groups]
        place, index = len(sent) - 1, next(n for n, group in enumerate(GROUPS) if group.prompt == sent[-1])
        detail = error_details_pb2.BadRequest()
        detail.field_violations.add(field=f"groups[{place}].responses", description="must not be empty")
        message = f"groups[{place}].responses: must not be empty"
        server.servicer.failures.append(failure(grpc.StatusCode.INVALID_ARGUMENT, message, detail))
        with pytest.raises(InvalidRequest) as caught:
            await client.score(GROUPS)
    assert index > place, "all went to one"
    assert str(caught.value).startswith(f"INVALID_ARGUMENT: groups[{index}].responses: must not be empty")
    assert caught.value.violations == [(f"groups[{index}].responses", "must not be empty")]


async def test_a_server_that_is_replaced_is_waited_for(serve, expected):
    """An address that has answered is right; one that never has is given up soon."""
    server = serve()
    async with AsyncRewardClient(server.target, retry=FAST) as client:
        await client.score(GROUPS[:1])
        server.stop()
        call = asyncio.create_task(client.score(GROUPS, timeout=60))
        await asyncio.sleep(1.5)  # many more attempts than a stranger gets
        assert not call.done()
        server.start()
        result = await call
        assert [group.scores for group in result.groups] == [expected(group) for group in GROUPS]
        server.stop()
    async with AsyncRewardClient(server.target, retry=FAST) as client:
        with pytest.raises(Unavailable, match="after 6 attempts"):
            await client.score(GROUPS, timeout=60)


async def test_a_server_that_says_when_to_come_back_is_asked_until_there_is_no_time(serve, failure, come_back_in):
    server = serve()
    async with AsyncRewardClient(server.target, retry=FAST) as client:
        server.servicer.failures += [failure(grpc.StatusCode.UNAVAILABLE, "restarting", come_back_in(0.01))] * 20
        await client.score(GROUPS, timeout=60)
        assert len(server.servicer.requests) == 21
        server.servicer.failures += [failure(grpc.StatusCode.UNAVAILABLE, "failed for good")] * 20
        with pytest.raises(Unavailable, match="after 6 attempts"):
            await client.score(GROUPS, timeout=60)


async def test_a_call_fails_only_when_no_endpoint_is_left(servers, targets, expected):
    policy = RetryPolicy(max_attempts=1)  # no waiting, but still every endpoint
    async with AsyncRewardClient(targets, retry=policy) as client:
        servers[0].stop()
        servers[1].stop()
        result = await client.score(GROUPS)
        assert [group.scores for group in result.groups] == [expected(group) for group in GROUPS]
        assert (await client.rank("p", ["a", "b"])).best
        assert (await client.get_model("toy")).endpoint == targets[2]
        servers[2].stop()
        with pytest.raises(Unavailable):
            await client.score(GROUPS, timeout=10)


async def test_an_error_that_is_not_unavailability_does_not_move_the_group(servers, targets, failure):

    for server in servers:
        server.servicer.failures = [failure(grpc.StatusCode.INTERNAL, "bug")]
    async with AsyncRewardClient(targets) as client:
        with pytest.raises(Exception, match="bug"):
            await client.score(GROUPS[:1])
    assert sum(len(server.servicer.requests) for server in servers) == 1


async def test_versions_are_never_mixed(servers, targets):
    servers[1].servicer.version = "v2"
    async with AsyncRewardClient(targets) as client:
        with pytest.raises(VersionMismatch) as raised:
            await client.score(GROUPS)
        with pytest.raises(VersionMismatch):
            async for _ in client.score_stream(GROUPS):
                pass
        with pytest.raises(VersionMismatch):
            await client.load_model("new", "folder")
    assert raised.value.versions == {name: f"toy v{2 if name == targets[1] else 1}" for name in targets}


async def test_models_are_listed_and_loaded_on_every_endpoint(servers, targets):
    async with AsyncRewardClient(targets) as client:
        assert [model.endpoint for model in await client.list_models()] == [t for t in targets for _ in range(2)]
        await client.load_model("new", "folder")
        await client.wait_ready(10)
    assert [server.servicer.requests[1].source for server in servers] == ["folder"] * 3
