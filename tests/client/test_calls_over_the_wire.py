"""Every method against a real server: what is sent, what comes back, retries, deadlines, cancellation."""

import asyncio
import socket
import time

import grpc
import pytest
from rewardserve.client import (
    AsyncRewardClient,
    ChatMessage,
    DeadlineExceeded,
    Group,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    Rendered,
    RetryPolicy,
    RewardClientError,
    TokenIds,
    Unavailable,
)
from rewardserve.client.calls import gather_or_cancel

Code = grpc.StatusCode
GROUPS = [Group("p", ["a", "b"], id="first"), Group("q", ["c"], id="second")]


async def test_scores_come_back_in_the_order_sent(server, expected):
    async with AsyncRewardClient(server.target) as client:
        result = await client.score(GROUPS, model="toy", overflow="truncate_prompt_left", priority=7)
    assert [group.scores for group in result.groups] == [expected(group) for group in GROUPS]
    assert [group.id for group in result.groups] == ["first", "second"]
    assert (result.model_name, result.model_version, result.timings.total_s) == ("toy", "v1", 0.5)
    (request,) = server.servicer.requests
    assert request.request_id == result.request_id != ""
    assert (request.model, request.options.overflow, request.options.priority) == ("toy", 1, 7)


async def test_every_kind_of_prompt_arrives_as_it_is(server):
    turn = {"role": "user", "content": "hello"}
    prompts = ["plain", Rendered("<s>hello"), [turn, ChatMessage("assistant", "hi")], TokenIds([1, 2])]
    async with AsyncRewardClient(server.target) as client:
        await client.score([Group(prompt, ["a"]) for prompt in prompts])
    plain, rendered, chat, ids = (group.prompt for group in server.servicer.requests[0].groups)
    assert (plain.text, rendered.rendered, ids.token_ids) == ("plain", "<s>hello", bytes([1, 0, 0, 0, 2, 0, 0, 0]))
    assert [(m.role, m.content) for m in chat.conversation.messages] == [("user", "hello"), ("assistant", "hi")]


async def test_models_are_listed_got_loaded_and_unloaded(server):
    async with AsyncRewardClient(server.target) as client:
        models = await client.list_models()
        model = await client.get_model("toy")
        loaded = await client.load_model("new", "some/folder", "bfloat16")
        await client.unload_model("new")
    assert [each.name for each in models] == ["toy", "other"] and models[0] == model
    assert (model.state, model.path, model.max_length, model.endpoint) == ("serving", "packed", 4096, server.target)
    assert loaded.name == "new"
    assert (server.servicer.requests[2].source, server.servicer.requests[2].dtype) == ("some/folder", "bfloat16")


async def test_loading_is_not_tried_again(server, failure):
    server.servicer.failures = [failure(Code.UNAVAILABLE, "busy")]
    async with AsyncRewardClient(server.target) as client:
        with pytest.raises(Unavailable):
            await client.load_model("new", "folder")
    assert len(server.servicer.requests) == 1


async def test_metadata_travels_with_every_call(server):
    async with AsyncRewardClient(server.target, metadata=[("authorization", "Bearer x")]) as client:
        await client.score(GROUPS)
        await client.list_models()
    assert [each["authorization"] for each in server.servicer.metadata] == ["Bearer x"] * 2


async def test_credentials_are_used(serve):
    server = serve(grpc.local_server_credentials())
    async with AsyncRewardClient(server.target, credentials=grpc.local_channel_credentials()) as client:
        assert (await client.score(GROUPS)).groups[0].scores


async def test_a_call_is_tried_again_until_it_succeeds(server, failure, fast, expected):
    server.servicer.failures = [failure(code, "again") for code in (Code.UNAVAILABLE, Code.ABORTED, Code.CANCELLED)]
    async with AsyncRewardClient(server.target, retry=fast) as client:
        result = await client.score(GROUPS)
    assert result.groups[1].scores == expected(GROUPS[1])
    assert len(server.servicer.requests) == 4


async def test_attempts_are_counted(server, failure):
    server.servicer.failures = [failure(Code.UNAVAILABLE, "restarting")] * 10
    policy = RetryPolicy(max_attempts=3, initial_backoff_s=0.001)
    async with AsyncRewardClient(server.target, retry=policy) as client:
        with pytest.raises(Unavailable, match="after 3 attempts") as raised:
            await client.rank("p", ["a"])
    assert raised.value.attempts == len(server.servicer.requests) == 3


async def test_what_runs_out_of_time_says_what_it_failed_of_before(server, failure):
    server.servicer.failures = [failure(Code.UNAVAILABLE, "its member is away")]
    policy = RetryPolicy(initial_backoff_s=0.3, jitter=0.1)
    async with AsyncRewardClient(server.target, retry=policy) as client:
        call = asyncio.create_task(client.score(GROUPS, timeout=1.5))
        while not server.servicer.requests or server.servicer.failures:
            await asyncio.sleep(0.005)
        server.servicer.hang = True
        with pytest.raises(DeadlineExceeded, match=r"\(after 2 attempts\); before that: UNAVAILABLE: its member"):
            await call


async def test_the_servers_wish_is_honoured(server, failure, come_back_in, fast):
    server.servicer.failures = [failure(Code.RESOURCE_EXHAUSTED, "full", come_back_in(0.3))]
    async with AsyncRewardClient(server.target, retry=fast) as client:
        begun = time.monotonic()
        await client.score(GROUPS)
    assert time.monotonic() - begun >= 0.3
    assert len(server.servicer.requests) == 2


async def test_a_wish_beyond_the_deadline_ends_the_call_at_once(server, failure, come_back_in):
    server.servicer.failures = [failure(Code.RESOURCE_EXHAUSTED, "full", come_back_in(0.9))]
    async with AsyncRewardClient(server.target, timeout=0.8) as client:
        with pytest.raises(Overloaded) as raised:
            await client.score(GROUPS)
    assert raised.value.retry_after_s == pytest.approx(0.9)


async def test_a_message_too_large_for_the_server_is_not_sent_twice(server, failure):
    server.servicer.failures = [failure(Code.RESOURCE_EXHAUSTED, "message larger than max")]
    async with AsyncRewardClient(server.target) as client:
        with pytest.raises(Overloaded) as raised:
            await client.score(GROUPS)
    assert raised.value.retry_after_s is None and len(server.servicer.requests) == 1


async def unanswered(client: AsyncRewardClient) -> int:
    """How many calls, of every kind, ended over their deadline."""
    calls = [
        client.score(GROUPS, timeout=0.2),
        client.rank("p", ["a"], timeout=0.2),
        client.compare("p", "a", "b", timeout=0.2),
        client.list_models(timeout=0.2),
        client.get_model("toy", timeout=0.2),
    ]
    for call in calls:
        with pytest.raises((DeadlineExceeded, Unavailable)):
            await call
    outcomes = [outcome async for _, outcome in client.score_stream(GROUPS, timeout=0.2)]
    return len(calls) + sum(isinstance(outcome, DeadlineExceeded | Unavailable) for outcome in outcomes)


async def test_no_call_outlasts_its_deadline_where_the_server_never_answers(server):
    server.servicer.hang = True
    async with AsyncRewardClient(server.target) as client, asyncio.timeout(10):
        assert await unanswered(client) == 5 + len(GROUPS)


async def test_no_call_outlasts_its_deadline_where_nobody_listens():
    with socket.socket() as taken:  # bound and not listening: connections are refused, and nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        async with AsyncRewardClient(f"127.0.0.1:{taken.getsockname()[1]}") as client, asyncio.timeout(10):
            assert await unanswered(client) == 5 + len(GROUPS)


async def test_no_call_outlasts_its_deadline_where_nobody_speaks():
    with socket.socket() as mute:  # accepts connections by its backlog and never says a word
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        async with AsyncRewardClient(f"127.0.0.1:{mute.getsockname()[1]}") as client, asyncio.timeout(10):
            assert await unanswered(client) == 5 + len(GROUPS)


async def until(condition, limit_s: float = 10.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_cancelled_call_is_cancelled_at_the_server(server):
    server.servicer.hang = True
    async with AsyncRewardClient(server.target) as client:
        call = asyncio.create_task(client.score(GROUPS))
        await until(lambda: server.servicer.requests)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: server.servicer.num_cancelled == 1)


async def test_closing_ends_calls_in_flight_with_an_error(server):
    server.servicer.hang = True
    client = AsyncRewardClient(server.target)
    call = asyncio.create_task(client.score(GROUPS))
    await until(lambda: server.servicer.requests)
    await client.close()
    await client.close()
    with pytest.raises(RewardClientError, match="closed"):
        await asyncio.wait_for(call, 10)
    with pytest.raises(RuntimeError, match="closed"):
        await client.score(GROUPS)


async def test_ready_is_waited_for(serve):
    server = serve()
    server.stop()
    async with AsyncRewardClient(server.target) as client:
        waiting = asyncio.create_task(client.wait_ready(20, model="toy"))
        await asyncio.sleep(0.3)
        server.servicer.health = 2  # NOT_SERVING
        server.start()
        await until(lambda: server.servicer.requests)
        assert not waiting.done()
        server.servicer.health = 1
        await waiting
    assert server.servicer.requests[-1] == b"\x0a\x1a" + b"rewardserve.v1.Scoring/toy"


async def test_waiting_for_ready_names_who_is_late(serve):
    ready, late = serve(), serve()
    late.servicer.health = 2
    async with AsyncRewardClient([ready.target, late.target]) as client:
        with pytest.raises(DeadlineExceeded, match=f"{late.target} .not serving") as raised:
            await client.wait_ready(0.5)
    assert ready.target not in str(raised.value)


async def test_waiting_ends_at_once_where_it_cannot_help(server, monkeypatch):
    async def refuse(request, context):
        await context.abort(Code.UNAUTHENTICATED, "who are you")

    monkeypatch.setattr(server.servicer, "Check", refuse)
    server.stop()
    server.start()
    async with AsyncRewardClient(server.target) as client:
        with pytest.raises(PermissionDenied):
            await asyncio.wait_for(client.wait_ready(60), 10)


async def test_a_model_that_stays_unknown_is_not_found_in_words_for_people(server, monkeypatch):
    async def unknown(request, context):
        context.set_code(Code.NOT_FOUND)  # as grpcio-health-checking does: a status, and no details
        return b""

    monkeypatch.setattr(server.servicer, "Check", unknown)
    server.stop()
    server.start()
    async with AsyncRewardClient(server.target) as client:
        with pytest.raises(ModelNotFound) as raised:
            await client.wait_ready(0.3, "nope")
        with pytest.raises(DeadlineExceeded, match="NOT_FOUND") as nameless:
            await client.wait_ready(0.3)
    assert str(raised.value) == f"NOT_FOUND: no model 'nope' is served there: {server.target}"
    assert "AioRpcError" not in str(nameless.value) and "debug_error_string" not in str(nameless.value)


async def test_a_model_that_appears_while_it_is_waited_for_is_ready(server, monkeypatch):
    answers = iter([Code.NOT_FOUND, Code.NOT_FOUND, Code.OK])

    async def check(request, context):
        context.set_code(next(answers))
        return b"\x08\x01"

    monkeypatch.setattr(server.servicer, "Check", check)
    server.stop()
    server.start()
    async with AsyncRewardClient(server.target) as client:
        await client.wait_ready(20, "late")
    assert next(answers, None) is None, "it was called ready before it was"


async def test_a_call_of_one_part_runs_in_the_callers_task():
    async def task() -> object:
        return asyncio.current_task()

    assert await gather_or_cancel([task()]) == [asyncio.current_task()]
    others = await gather_or_cancel([task(), task()])
    assert asyncio.current_task() not in others and len(set(others)) == 2


@pytest.mark.parametrize(
    "wrong", [("Authorization", "x"), ("a b", "x"), ("a", "x\ny"), ("a", "\u00e9"), ("a", b"x"), ("", "x")]
)
def test_metadata_that_grpc_cannot_send_is_refused_at_once(wrong):
    with pytest.raises(ValueError, match="metadata"):
        AsyncRewardClient("127.0.0.1:1", metadata=[("authorization", "Bearer x"), ("trace-bin", b"\x00"), wrong])
