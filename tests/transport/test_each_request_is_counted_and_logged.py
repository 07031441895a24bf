"""Every request is counted once by its status and, unless it went well or was given up, logged with its id."""

import asyncio
import logging

import grpc
import pytest
from grpc._cython import cygrpc
from rewardserve.v1 import scoring_pb2

Code = grpc.StatusCode
NOT_UTF8 = b"\x0a\x02\xc3\x28"


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture):
    """The fields of each line about a request, so far."""
    caplog.set_level(logging.INFO, "rewardserve.transport.grpc_server")
    return lambda: [record.fields for record in caplog.records if record.getMessage() == "request"]


def counted(served, model: str = "m") -> dict[str, float]:
    """Requests by status."""
    family = next(f for f in served.app.metrics.requests.collect())
    return {
        sample.labels["status"]: sample.value
        for sample in family.samples
        if sample.name.endswith("_total") and sample.labels["model"] == model and sample.value
    }


async def test_a_line_has_the_id_that_the_reply_has_and_the_model_that_was_asked(serve, kit, logged) -> None:
    async with serve(log_requests=True) as served:
        reply = await served.scoring.Score(kit.ids_request([1], [[2]]))
        own = await served.scoring.Score(kit.ids_request([1], [[2]], request_id="mine"))
    first, second = logged()
    assert reply.request_id and first["request_id"] == reply.request_id
    assert own.request_id == second["request_id"] == "mine"
    assert {line["model"] for line in (first, second)} == {"m"}
    assert {line["status"] for line in (first, second)} == {"OK"}


async def test_a_failure_is_logged_with_an_id_too(served, kit, logged) -> None:
    await kit.refused(served.scoring.Score(kit.ids_request([], [[2]])))
    (line,) = logged()
    assert line["request_id"] and (line["model"], line["status"]) == ("m", "INVALID_ARGUMENT")
    assert "groups[0].prompt" in line["error"]


async def test_a_failure_on_a_stream_has_the_id_of_its_line(served, kit, logged) -> None:
    stream = served.scoring.ScoreStream(timeout=30)
    await stream.write(kit.ids_request([], [[1]]))
    reply = await stream.read()
    (line,) = logged()
    assert reply.request_id and reply.request_id == line["request_id"]
    stream.cancel()


@pytest.mark.parametrize("method", ["Scoring/Score", "Scoring/Rank", "Scoring/Compare", "Models/Load"])
async def test_what_is_no_message_is_counted_and_logged(served, kit, logged, method: str) -> None:
    assert (await kit.refused(served.raw(method, NOT_UTF8))).code is Code.INVALID_ARGUMENT
    assert counted(served, "") == {"INVALID_ARGUMENT": 1}
    (line,) = logged()
    assert line["request_id"] and (line["model"], line["status"]) == ("", "INVALID_ARGUMENT")
    assert "not a valid rewardserve.v1" in line["error"]


async def test_what_is_no_message_on_a_stream_is_counted_and_logged(served, logged) -> None:
    raw = served.channel.stream_stream("/rewardserve.v1.Scoring/ScoreStream")(timeout=30)
    await raw.write(NOT_UTF8)
    reply = scoring_pb2.ScoreResponse.FromString(await raw.read())
    assert counted(served, "") == {"INVALID_ARGUMENT": 1}
    (line,) = logged()
    assert reply.request_id == line["request_id"] != ""
    raw.cancel()


async def test_a_model_nobody_serves_is_counted_without_its_name(served, kit, logged) -> None:
    await kit.refused(served.scoring.Score(kit.ids_request([1], [[2]], model="made up")))
    assert counted(served, "") == {"NOT_FOUND": 1} and not counted(served, "made up")
    assert logged()[0]["model"] == "made up"


@pytest.mark.parametrize("timeout_s", [0.05, 0.213, 1.037])
async def test_a_deadline_that_passed_is_counted_as_such_whoever_noticed_first(served, kit, logged, timeout_s) -> None:
    served.engine.hold()
    calls = [served.scoring.Score(kit.ids_request([1], [[2]]), timeout=timeout_s) for _ in range(20)]
    assert {(await kit.refused(call)).code for call in calls} == {Code.DEADLINE_EXCEEDED}
    await kit.eventually(lambda: served.engine.num_in_flight == 0)
    # On a busy machine one may be late before the engine sees it, and is counted all the same.
    await kit.eventually(lambda: sum(counted(served).values()) >= len(served.engine.seen))
    lines, counts = logged(), counted(served)
    assert counts == {"DEADLINE_EXCEEDED": len(lines)}
    assert all(line["status"] == "DEADLINE_EXCEEDED" and "deadline passed" in line["error"] for line in lines)


async def test_a_reply_that_finds_nobody_is_no_traceback_and_what_else_grpc_says_is_told(served, caplog) -> None:
    grpcs = logging.getLogger("grpc._cython.cygrpc")
    for error in (cygrpc.ExecuteBatchError("a batch", ()), ValueError("a bug of ours")):
        try:
            raise error
        except Exception:
            grpcs.exception("%s raised by servicer method", type(error).__name__)
    grpcs.error("no exception")
    told = [record.getMessage() for record in caplog.records if record.name == grpcs.name]
    assert told == ["ValueError raised by servicer method", "no exception"]


@pytest.mark.parametrize("timeout_s", [None, 30])
async def test_a_caller_who_gives_up_before_its_deadline_is_cancelled(served, kit, logged, timeout_s) -> None:
    served.engine.hold()
    call = served.scoring.Score(kit.ids_request([1], [[2]]), timeout=timeout_s)
    await kit.eventually(lambda: served.engine.num_in_flight == 1)
    call.cancel()
    await kit.eventually(lambda: counted(served))
    await asyncio.sleep(0)
    assert counted(served) == {"CANCELLED": 1} and not logged()
