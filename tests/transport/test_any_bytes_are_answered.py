"""Fuzzing and reflection, from outside: a server on a thread of its own, a plain client."""

import asyncio
import threading

import grpc
import pytest
from google.protobuf.internal import encoder
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rewardserve.v1 import scoring_pb2

OURS = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE}


@pytest.fixture(scope="module")
def address(serve, kit):
    """Of a server in a loop on another thread."""
    loop, ready, done = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    found = []

    async def run() -> None:
        async with serve(kit.text_spec()) as served:
            found.append(served.target)
            ready.set()
            await done.wait()
        await asyncio.sleep(0.05)

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()), daemon=True)
    thread.start()
    assert ready.wait(30)
    yield found[0]
    loop.call_soon_threadsafe(done.set)
    thread.join(30)
    loop.close()


@pytest.fixture(scope="module")
def channel(address):
    with grpc.insecure_channel(address) as channel:
        yield channel


def call(channel, method: str, data: bytes) -> grpc.StatusCode:
    try:
        channel.unary_unary(f"/rewardserve.v1.{method}")(data, timeout=20)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def field(number: int, wire_type: int, payload: bytes) -> bytes:
    return encoder.TagBytes(number, wire_type) + payload


def delimited(payload: bytes) -> bytes:
    return encoder._VarintBytes(len(payload)) + payload


numbers = st.one_of(st.integers(1, 8), st.sampled_from([15, 16, 19000, 2**29 - 1]))
varints = st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1)).map(encoder._VarintBytes)
leaves = st.one_of(
    st.binary(max_size=12),
    st.text(max_size=8).map(str.encode),
    st.lists(st.integers(-2, 300), max_size=5).map(
        lambda ids: b"".join(i.to_bytes(4, "little", signed=True) for i in ids)
    ),
)
scalars = st.one_of(
    st.builds(field, numbers, st.just(0), varints),
    st.builds(field, numbers, st.just(1), st.binary(min_size=8, max_size=8)),
    st.builds(field, numbers, st.just(5), st.binary(min_size=4, max_size=4)),
)
protobufish = st.recursive(
    leaves,
    lambda inner: st.lists(
        st.one_of(scalars, st.builds(field, numbers, st.just(2), inner.map(delimited))), max_size=5
    ).map(b"".join),
    max_leaves=20,
)
texts = st.one_of(st.text(max_size=40), st.sampled_from(["", "\0", "<|im_end|>", "é" * 70, "\U0001f44d\U0001f3fd"]))
ids = st.lists(st.integers(-1, 259), max_size=70).map(
    lambda values: b"".join(i.to_bytes(4, "little", signed=True) for i in values)
)
message = st.builds(scoring_pb2.ChatMessage, role=st.sampled_from(["user", "assistant", "nobody", ""]), content=texts)
prompts = st.one_of(
    st.builds(scoring_pb2.Prompt, text=texts),
    st.builds(scoring_pb2.Prompt, rendered=texts),
    st.builds(scoring_pb2.Prompt, token_ids=ids),
    st.builds(
        scoring_pb2.Prompt,
        conversation=st.builds(scoring_pb2.Conversation, messages=st.lists(message, max_size=3)),
    ),
)
responses = st.one_of(st.builds(scoring_pb2.Response, text=texts), st.builds(scoring_pb2.Response, token_ids=ids))
options = st.builds(scoring_pb2.ScoreOptions, overflow=st.integers(0, 3), priority=st.integers(-101, 101))
groups = st.builds(scoring_pb2.Group, id=texts, prompt=prompts, responses=st.lists(responses, max_size=4))
requests = st.builds(
    scoring_pb2.ScoreRequest,
    request_id=texts,
    model=st.sampled_from(["", "m", "other"]),
    groups=st.lists(groups, max_size=3),
    options=options,
)
quick = settings(max_examples=150, suppress_health_check=list(HealthCheck))


@quick
@given(data=st.one_of(st.binary(max_size=60), protobufish))
@pytest.mark.parametrize("method", ["Scoring/Score", "Scoring/Rank", "Scoring/Compare", "Models/Get"])
def test_random_bytes_are_never_our_error(channel, method, data):
    assert call(channel, method, data) not in OURS


@settings(quick, max_examples=300)
@given(request=requests)
def test_a_request_of_any_content_is_scored_or_refused(channel, request):
    """Where it is scored, each response has its item, with a score or a reason."""
    try:
        data = channel.unary_unary("/rewardserve.v1.Scoring/Score")(request.SerializeToString(), timeout=20)
    except grpc.RpcError as error:
        assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), error
        return
    reply = scoring_pb2.ScoreResponse.FromString(data)
    assert [group.id for group in reply.groups] == [group.id for group in request.groups]
    for group, sent in zip(reply.groups, request.groups, strict=True):
        assert len(group.items) == len(sent.responses)
        for item in group.items:
            assert item.HasField("status") and item.HasField("score") == (item.status.code == 0)
            assert item.status.code in (0, 3, 11)


def test_reflection_lists_the_services_and_knows_their_files(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="rewardserve.v1.Scoring"),
    ]
    listed, described = stub.ServerReflectionInfo(iter(asked), timeout=20)
    assert {"rewardserve.v1.Scoring", "rewardserve.v1.Models", "grpc.health.v1.Health"} <= {
        service.name for service in listed.list_services_response.service
    }
    assert described.file_descriptor_response.file_descriptor_proto
