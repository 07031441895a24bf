"""ScoreStream: each request has exactly one reply, in any order; what fails is a reply too, and the stream lives on."""

import asyncio
import sys

import grpc
import pytest
from grpc.aio import EOF
from rewardserve.v1 import scoring_pb2, scoring_pb2_grpc

INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND, INTERNAL, RESOURCE_EXHAUSTED = 3, 4, 5, 13, 8


@pytest.fixture
async def stream(served):
    call = served.scoring.ScoreStream(timeout=60)
    yield call
    call.cancel()


async def read(stream, count):
    return [await asyncio.wait_for(stream.read(), 20) for _ in range(count)]


async def end(stream):
    await stream.done_writing()
    assert await asyncio.wait_for(stream.read(), 20) is EOF


async def test_each_request_is_answered_once_by_its_id(served, stream, kit):
    for i in range(300):
        await stream.write(kit.ids_request([i % 250], [[1]] * (i % 3 + 1), request_id=f"r{i}"))
    replies = await read(stream, 300)
    assert {reply.request_id: len(reply.groups[0].items) for reply in replies} == {
        f"r{i}": i % 3 + 1 for i in range(300)
    }
    await end(stream)


async def test_what_is_done_first_is_sent_first(served, stream, kit):
    served.engine.hold()
    await stream.write(kit.ids_request([1], [[1]], request_id="waits"))
    await kit.eventually(lambda: served.engine.num_in_flight == 1)
    await stream.write(kit.ids_request([1], [[]], request_id="needs no engine"))
    assert [reply.request_id for reply in await read(stream, 1)] == ["needs no engine"]
    served.engine.release()
    assert [reply.request_id for reply in await read(stream, 1)] == ["waits"]
    await end(stream)


async def test_what_fails_is_a_reply_with_an_error_and_the_stream_lives_on(served, stream, kit):
    await stream.write(kit.ids_request([], [[1]], request_id="no prompt"))
    await stream.write(kit.ids_request([1], [[1]], request_id="no model", model="other"))
    await stream.write(kit.ids_request([1], [[1]], request_id="good"))
    replies = {reply.request_id: reply for reply in await read(stream, 3)}
    assert {request_id: reply.error.code for request_id, reply in replies.items()} == {
        "no prompt": INVALID_ARGUMENT,
        "no model": NOT_FOUND,
        "good": 0,
    }
    assert not replies["no prompt"].groups and not replies["good"].HasField("error")
    assert "groups[0].prompt" in replies["no prompt"].error.message
    assert replies["no prompt"].error.details[0].type_url.endswith("BadRequest")
    await end(stream)


async def test_a_failure_nobody_foresaw_is_a_reply_too(served, stream, kit):
    served.engine.raises = RuntimeError("unforeseen")
    await stream.write(kit.ids_request([1], [[1]], request_id="a"))
    (reply,) = await read(stream, 1)
    assert (reply.request_id, reply.error.code) == ("a", INTERNAL)
    served.engine.raises = None
    await stream.write(kit.ids_request([1], [[1]], request_id="a"))
    (reply,) = await read(stream, 1)
    assert reply.groups
    await end(stream)


async def test_bytes_that_are_no_request_are_answered_and_the_stream_lives_on(served, kit):
    raw = served.channel.stream_stream("/rewardserve.v1.Scoring/ScoreStream")(timeout=30)
    await raw.write(b"\x0a\x02\xc3\x28")
    reply = scoring_pb2.ScoreResponse.FromString(await raw.read())
    assert reply.error.code == INVALID_ARGUMENT
    await raw.write(kit.ids_request([1], [[1]], request_id="good").SerializeToString())
    reply = scoring_pb2.ScoreResponse.FromString(await raw.read())
    assert reply.request_id == "good" and reply.groups
    raw.cancel()


async def test_what_nobody_waits_for_any_more_is_dropped_and_its_error_said(served, stream, kit):
    served.engine.hold()
    await stream.write(kit.ids_request([1], [[1]], request_id="late", timeout_s=0.2))
    await stream.write(kit.ids_request([2], [[1]], request_id="patient", timeout_s=60))
    (late,) = await read(stream, 1)
    assert (late.request_id, late.error.code) == ("late", DEADLINE_EXCEEDED)
    await kit.eventually(lambda: served.engine.num_in_flight == 1)
    served.engine.release()
    (patient,) = await read(stream, 1)
    assert patient.request_id == "patient" and not patient.HasField("error")
    await end(stream)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
async def test_a_time_that_is_none_is_named(served, stream, kit, seconds):
    await stream.write(kit.ids_request([1], [[1]], request_id="x", timeout_s=seconds))
    (reply,) = await read(stream, 1)
    assert reply.error.code == INVALID_ARGUMENT and reply.error.message.startswith("timeout_s: ")
    await end(stream)


@pytest.mark.parametrize("seconds", [5e-324, 1e12, sys.float_info.max])
async def test_any_other_time_is_one_however_long(served, kit, seconds):
    """For some, the largest number there is stands for no limit."""
    stream = served.scoring.ScoreStream()  # with no deadline of its own, as trainers leave it open
    await stream.write(kit.ids_request([1], [[1]], request_id="x", timeout_s=seconds))
    (reply,) = await read(stream, 1)
    assert reply.request_id == "x" and not reply.HasField("error")
    await end(stream)


async def test_an_id_that_is_under_way_may_not_be_sent_again(served, stream, kit):
    served.engine.hold()
    for _ in range(2):
        await stream.write(kit.ids_request([1], [[1]], request_id="twin"))
    (reply,) = await read(stream, 1)
    assert (reply.request_id, reply.error.code) == ("twin", INVALID_ARGUMENT)
    assert reply.error.details[0].type_url.endswith("BadRequest") and "request_id" in reply.error.message
    served.engine.release()
    (reply,) = await read(stream, 1)
    assert reply.request_id == "twin" and reply.groups
    await stream.write(kit.ids_request([1], [[1]], request_id="twin"))  # it is free again
    (reply,) = await read(stream, 1)
    assert reply.groups
    await end(stream)


async def test_requests_without_an_id_are_each_given_one(served, stream, kit):
    served.engine.hold()
    for _ in range(3):
        await stream.write(kit.ids_request([1], [[1]]))
    await kit.eventually(lambda: served.engine.num_in_flight == 3)
    served.engine.release()
    replies = await read(stream, 3)
    assert all(reply.groups for reply in replies), replies[0].error
    assert len({reply.request_id for reply in replies} - {""}) == 3
    await end(stream)


async def test_the_server_reads_no_further_than_it_may_have_under_way(serve, kit):
    async with serve(max_stream_requests=4) as served:
        served.engine.hold()
        stream = served.scoring.ScoreStream()
        for i in range(20):
            await asyncio.wait_for(stream.write(kit.ids_request([1], [[1]], request_id=str(i))), 20)
        await kit.eventually(lambda: served.engine.num_in_flight == 4)
        await asyncio.sleep(0.2)
        assert len(served.engine.seen) == 4
        served.engine.release()
        assert len({reply.request_id for reply in await read(stream, 20)}) == 20
        await end(stream)


async def test_a_client_that_does_not_read_is_not_read_from_without_bound(serve, kit):
    """Replies of 40 kB each fill the connection's small window long before 500 requests; grpc buffers a little more."""
    window = [("grpc.http2.lookahead_bytes", 1 << 16), ("grpc.http2.bdp_probe", 0)]
    async with serve(max_stream_requests=4) as served, grpc.aio.insecure_channel(served.target, window) as channel:
        stream = scoring_pb2_grpc.ScoringStub(channel).ScoreStream()
        request = kit.ids_request([1], [[1]] * 2000)

        async def write_all() -> None:
            for i in range(500):
                request.request_id = str(i)
                await stream.write(request)

        writing = asyncio.create_task(write_all())
        await kit.eventually(lambda: len(served.engine.seen) >= 4)
        seen = -1
        while seen != len(served.engine.seen):  # until it stands still
            seen = len(served.engine.seen)
            await asyncio.sleep(0.3)
        assert seen < 100
        assert not writing.done()
        await read(stream, seen)  # once it reads, things move again
        await kit.eventually(lambda: len(served.engine.seen) > seen)
        writing.cancel()
        stream.cancel()
        await asyncio.gather(writing, return_exceptions=True)


async def test_cancelling_the_stream_drops_its_work(served, kit):
    served.engine.hold()
    stream = served.scoring.ScoreStream()
    for i in range(10):
        await stream.write(kit.ids_request([1], [[1]], request_id=str(i)))
    await kit.eventually(lambda: served.engine.num_in_flight == 10)
    stream.cancel()
    await kit.eventually(lambda: served.engine.num_cancelled == 10)
    await kit.eventually(lambda: served.app.registry.get("m").admission.num_requests == 0)
    assert served.engine.num_in_flight == 0
    served.engine.release()
    await served.good()


async def test_a_client_that_vanishes_has_its_work_dropped(served, kit):
    served.engine.hold()
    channel = grpc.aio.insecure_channel(served.target, options=[("grpc.use_local_subchannel_pool", 1)])
    stream = channel.stream_stream("/rewardserve.v1.Scoring/ScoreStream")()
    await stream.write(kit.ids_request([1], [[1]], request_id="x").SerializeToString())
    await kit.eventually(lambda: served.engine.num_in_flight == 1)
    await channel.close()
    await kit.eventually(lambda: served.engine.num_cancelled == 1)
    assert served.engine.num_in_flight == 0
    served.engine.release()


async def test_half_closing_waits_for_what_is_under_way(served, stream, kit):
    served.engine.hold()
    for i in range(5):
        await stream.write(kit.ids_request([1], [[1]], request_id=str(i)))
    await stream.done_writing()
    await kit.eventually(lambda: served.engine.num_in_flight == 5)
    served.engine.release()
    assert len({reply.request_id for reply in await read(stream, 5)}) == 5
    assert await asyncio.wait_for(stream.read(), 20) is EOF
    assert await stream.code() is grpc.StatusCode.OK


async def test_one_stream_with_a_full_server_is_told_when_to_come_back(serve, kit):
    async with serve(max_queued_requests=1) as served:
        served.engine.hold()
        stream = served.scoring.ScoreStream()
        await stream.write(kit.ids_request([1], [[1]], request_id="first"))
        await kit.eventually(lambda: served.engine.num_in_flight == 1)
        await stream.write(kit.ids_request([1], [[1]], request_id="second"))
        (reply,) = await read(stream, 1)
        assert (reply.request_id, reply.error.code) == ("second", RESOURCE_EXHAUSTED)
        assert reply.error.details[0].type_url.endswith("RetryInfo")
        served.engine.release()
        (reply,) = await read(stream, 1)
        assert reply.request_id == "first" and reply.groups
        await end(stream)


async def test_draining_answers_what_a_stream_has_under_way_and_then_cuts_it_short(served, kit):
    served.engine.hold()
    stream = served.scoring.ScoreStream()
    for i in range(3):
        await stream.write(kit.ids_request([1], [[1]], request_id=str(i)))
    await kit.eventually(lambda: served.engine.num_in_flight == 3)
    draining = asyncio.create_task(served.app.drain())
    await asyncio.sleep(0.1)
    served.engine.release()
    assert {reply.request_id for reply in await read(stream, 3)} == {"0", "1", "2"}
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.wait_for(stream.read(), 20)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await draining
