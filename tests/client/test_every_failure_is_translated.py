"""Each gRPC status has its place in the drawn tree, and nothing else comes out of a call."""

import pickle
import re

import grpc
import pytest
from google.rpc import error_details_pb2
from rewardserve.client import AsyncRewardClient, Group, RetryPolicy, errors
from rewardserve.client.translate import from_rpc_error, from_status

Code = grpc.StatusCode
GROUPS = [Group("prompt", ["a"])]
ONCE = RetryPolicy(max_attempts=1)
EXPECTED = {
    Code.CANCELLED: errors.Unavailable,
    Code.UNKNOWN: errors.ServerError,
    Code.INVALID_ARGUMENT: errors.InvalidRequest,
    Code.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    Code.NOT_FOUND: errors.ModelNotFound,
    Code.ALREADY_EXISTS: errors.ServerError,
    Code.PERMISSION_DENIED: errors.PermissionDenied,
    Code.RESOURCE_EXHAUSTED: errors.Overloaded,
    Code.FAILED_PRECONDITION: errors.ServerError,
    Code.ABORTED: errors.Unavailable,
    Code.OUT_OF_RANGE: errors.InvalidRequest,
    Code.UNIMPLEMENTED: errors.ServerError,
    Code.INTERNAL: errors.ServerError,
    Code.UNAVAILABLE: errors.Unavailable,
    Code.DATA_LOSS: errors.ServerError,
    Code.UNAUTHENTICATED: errors.PermissionDenied,
}


def test_the_drawn_tree_is_the_tree():
    drawn = set(re.findall(r"[├└]── (\w+)", errors.__doc__))
    assert drawn == {cls.__name__ for cls in errors.RewardClientError.__subclasses__()}
    assert set(EXPECTED) == set(Code) - {Code.OK}


@pytest.mark.parametrize("code", EXPECTED, ids=lambda code: code.name)
async def test_each_status_of_a_call_becomes_its_error(server, failure, code):
    server.servicer.failures = [failure(code, "because")]
    async with AsyncRewardClient(server.target, retry=ONCE) as client:
        with pytest.raises(errors.RewardClientError, match="because") as raised:
            await client.score(GROUPS)
    assert type(raised.value) is EXPECTED[code]
    assert raised.value.code is code and raised.value.endpoint == server.target


@pytest.mark.parametrize("code", EXPECTED, ids=lambda code: code.name)
async def test_each_status_of_a_streamed_group_becomes_its_error(server, failure, code):
    server.servicer.failures = [failure(code, "because")]
    async with AsyncRewardClient(server.target, retry=ONCE) as client:
        outcomes = [outcome async for _, outcome in client.score_stream(GROUPS)]
    assert [type(outcome) for outcome in outcomes] == [EXPECTED[code]]


async def test_an_invalid_request_names_its_fields(server, failure):
    field = error_details_pb2.BadRequest.FieldViolation(field="groups[0].prompt", description="is empty")
    server.servicer.failures = [
        failure(Code.INVALID_ARGUMENT, "malformed", error_details_pb2.BadRequest(field_violations=[field]))
    ]
    async with AsyncRewardClient(server.target) as client:
        with pytest.raises(errors.InvalidRequest) as raised:
            await client.score(GROUPS)
    assert raised.value.violations == [("groups[0].prompt", "is empty")]
    assert len(server.servicer.requests) == 1


def test_details_that_cannot_be_read_do_not_hide_the_status(failure):
    status = failure(Code.RESOURCE_EXHAUSTED, "full", error_details_pb2.RetryInfo())
    status.details[0].value = b"\xff\xff"
    error = from_status(status, "there")
    assert type(error) is errors.Overloaded and error.retry_after_s is None


def test_an_rpc_error_that_knows_nothing_is_a_server_error():
    assert type(from_rpc_error(grpc.RpcError("odd"), "there")) is errors.ServerError


@pytest.mark.parametrize("cls", errors.RewardClientError.__subclasses__(), ids=lambda cls: cls.__name__)
def test_errors_survive_the_way_between_processes(cls):
    error = cls("because")
    error.code, error.endpoint, error.attempts = Code.UNAVAILABLE, "there", 3
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is cls and vars(copied) == vars(error)
    assert str(copied) == str(error) == "UNAVAILABLE: because [there] (after 3 attempts)"


async def test_a_message_too_large_is_refused_before_it_is_sent(server):
    async with AsyncRewardClient(server.target, max_message_bytes=1000) as client:
        with pytest.raises(errors.InvalidRequest, match="max_message_bytes"):
            await client.score([Group("p" * 2000, ["a"])])
        outcomes = {g.id: o async for g, o in client.score_stream([Group("p" * 2000, ["a"], "big"), Group("p", ["a"])])}
    assert isinstance(outcomes["big"], errors.InvalidRequest) and outcomes[""].scores


@pytest.mark.parametrize(
    ("group", "kind"),
    [
        (lambda: Group("p", "one string"), TypeError),
        (lambda: Group(5, ["a"]), TypeError),
        (lambda: Group([1, 2, 3], ["a"]), TypeError),
        (lambda: Group("p", [5]), TypeError),
        (lambda: Group([{"role": "user", "content": "x", "name": "y"}], ["a"]), ValueError),
        (lambda: Group([{"role": "user", "content": None}], ["a"]), TypeError),
        (lambda: "not a group", TypeError),
    ],
)
async def test_mistakes_of_the_caller_are_told_before_anything_is_sent(server, group, kind):
    async with AsyncRewardClient(server.target) as client:
        with pytest.raises(kind):
            await client.score([group()])
        with pytest.raises(kind):
            _ = [each async for each in client.score_stream([group()])]
    assert server.servicer.requests == []


async def test_wrong_arguments_are_refused(server):
    for endpoints in ([], ["a:1", "a:1"], "http://a:1", ""):
        with pytest.raises(ValueError):
            AsyncRewardClient(endpoints)
    for timeout in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError):
            AsyncRewardClient(server.target, timeout=timeout)
    async with AsyncRewardClient(server.target) as client:
        with pytest.raises(ValueError, match="truncate_prompt_left"):
            await client.score(GROUPS, overflow="truncate")
        with pytest.raises(errors.InvalidRequest):
            await client.score([])
