"""However many calls come at once, each is answered by us: scored, or told when to come again."""

import asyncio
import resource
import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rewardserve.cli.serve import MAX_FILES, allow_many_files
from rewardserve.v1 import scoring_pb2_grpc


async def test_no_call_of_a_burst_is_broken_off_before_it_is_read(served):
    """Of those that a busy server has not read yet gRPC cancels some, from the thousandth on, if it may."""
    with grpc.insecure_channel(served.target) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        request = health_pb2.HealthCheckRequest()
        calls = [check.future(request, timeout=60) for _ in range(2000)]  # the server's event loop is ours: it waits
        await asyncio.to_thread(lambda: [call.exception() for call in calls])
        assert {call.code() for call in calls} == {grpc.StatusCode.OK}


async def test_calls_that_a_server_shutting_down_has_not_read_hear_that_a_retry_is_safe(served, kit):
    with grpc.insecure_channel(served.target) as channel:
        await asyncio.to_thread(grpc.channel_ready_future(channel).result)
        score = scoring_pb2_grpc.ScoringStub(channel).Score
        request = kit.ids_request([1], [[2]])
        calls = [score.future(request, timeout=60) for _ in range(200)]
        time.sleep(0.3)  # all of them are there, and none is read, for the server's event loop is this one
        await served.app.drain()
        await asyncio.to_thread(lambda: [call.exception() for call in calls])
        assert {call.code() for call in calls} <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}


def test_a_server_has_as_many_connections_as_the_system_lets_it_have():
    """Not the 1,024 that a service begins with, beyond which callers would wait in vain to be connected."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[0] - 1, limits[1]))
        assert allow_many_files() >= min(limits[1], MAX_FILES)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(limits[1], MAX_FILES)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
