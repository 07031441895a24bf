"""The engine process dies under load: every call ends, with its true score or UNAVAILABLE, and the server heals."""

import contextlib
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc
import psutil
import pytest
from rewardserve.client import Group, RewardClient, TokenIds
from rewardserve.v1 import models_pb2

Code = grpc.StatusCode
MODEL = "rewardserve.v1.Scoring/tiny"
NUM_REQUESTS = 60


SMALL = ("--max-batch-tokens", "256", "--prefix-cache-mb", "16")  # so that a load takes many forwards


@pytest.fixture(scope="module")
def server(start, bf16_checkpoint):
    return start("--model", f"tiny={bf16_checkpoint}", *SMALL).ready()


STALL_TIMEOUT_S = 8  # less than a busy machine takes to import torch: the child says that it is loading from the first


@pytest.fixture(scope="module")
def impatient(start, bf16_checkpoint):
    return start("--model", f"tiny={bf16_checkpoint}", *SMALL, "--stall-timeout-s", str(STALL_TIMEOUT_S)).ready()


@pytest.fixture(scope="module")
def load(kit):
    return [
        kit.ids_request(kit.random_ids(i, 128), [kit.random_ids(1000 + 4 * i + j, 32) for j in range(4)])
        for i in range(NUM_REQUESTS)
    ]


def send(server, request, timeout=60):
    try:
        return server.scoring.Score(request, timeout=timeout)
    except grpc.RpcError as error:
        return error


@contextlib.contextmanager
def under_way(server, kit, requests, at_least=1):
    """Sends all at once, each in a thread; enters when some are answered or under way."""
    with ThreadPoolExecutor(len(requests)) as pool:
        futures = [pool.submit(send, server, request) for request in requests]
        kit.until(lambda: server.metric("in_flight_requests") >= at_least)
        yield futures


def check_ends(kit, ends, wanted):
    """Every end is the true scores or UNAVAILABLE; returns how many of each."""
    counts: Counter[str] = Counter()
    for end, true in zip(ends, wanted, strict=True):
        if isinstance(end, grpc.RpcError):
            assert end.code() is Code.UNAVAILABLE, (end.code(), end.details())
            assert "engine of model 'tiny'" in end.details() or "model 'tiny' is restarting" in end.details()
            counts["UNAVAILABLE"] += 1
        else:
            assert kit.scores_of(end) == true
            counts["OK"] += 1
    return counts


def test_a_kill_under_load_loses_nothing(server, kit, load):
    wanted = [kit.scores_of(send(server, request)) for request in load]
    assert wanted == [kit.scores_of(send(server, request)) for request in load], "not reproducible to begin with"
    before = server.metrics()
    watches = [kit.Watch(server, service) for service in ("", MODEL)]
    old = server.engine()
    old.suspend()  # or it may be through with them as fast as they come
    with under_way(server, kit, load, at_least=20) as futures:
        old.resume()
        old.kill()
        kit.until(lambda: not server.is_serving())
        while_down = send(server, load[0], timeout=20)
        ends = [future.result(60) for future in futures]
    assert isinstance(while_down, grpc.RpcError) and while_down.code() is Code.UNAVAILABLE
    assert "restarting" in while_down.details() and "SIGKILL" in while_down.details()
    counts = check_ends(kit, ends, wanted)
    assert counts["OK"] >= 20, "what was in flight was not handed to the new engine"
    kit.until(lambda: server.is_serving() and server.is_serving(MODEL))
    for watch in watches:
        kit.until(lambda watch=watch: watch.statuses == [kit.SERVING, kit.NOT_SERVING, kit.SERVING])
        watch.end()
    assert server.engine().pid != old.pid
    assert [kit.scores_of(send(server, request)) for request in load[:5]] == wanted[:5]
    assert server.metric("engine_restarts_total") == 1

    def grown(name, **labels):
        return server.metric(name, **labels) - before.get((f"rewardserve_{name}", tuple(sorted(labels.items()))), 0)

    assert grown("requests_total", status="OK") == counts["OK"] + 5
    assert grown("requests_total", status="UNAVAILABLE") == counts["UNAVAILABLE"] + 1
    assert grown("pairs_total") == 4 * (counts["OK"] + 5)
    assert server.metric("in_flight_requests") == server.metric("in_flight_tokens") == 0
    model = server.model()
    assert (model.num_restarts, model.state) == (1, models_pb2.MODEL_STATE_SERVING)
    assert "SIGKILL" in model.message
    assert server.process.poll() is None


def test_an_open_stream_survives_the_death_of_the_engine_and_who_comes_meanwhile_waits(server, kit, load):
    wanted = [kit.scores_of(send(server, request)) for request in load]
    for i, request in enumerate(load):
        request.request_id = str(i)

    def sent():
        yield from load
        kit.until(lambda: len(replies) == NUM_REQUESTS)

    replies = {}
    stream = server.scoring.ScoreStream(sent(), timeout=60)
    killed = False
    for reply in stream:
        assert reply.request_id not in replies
        replies[reply.request_id] = reply
        if not killed:
            server.engine().kill()
            killed = True
            kit.until(lambda: not server.is_serving())
            (group,) = load[0].groups
            responses = [TokenIds(response.token_ids) for response in group.responses]
            with RewardClient(server.target, timeout=60) as client:  # one that this server has never answered
                result = client.score([Group(TokenIds(group.prompt.token_ids), responses)])
            assert [item.score for item in result.groups[0].items] == wanted[0]
    assert set(replies) == {str(i) for i in range(NUM_REQUESTS)}
    for i, true in enumerate(wanted):
        reply = replies[str(i)]
        assert reply.error.code == Code.UNAVAILABLE.value[0] or kit.scores_of(reply) == true
    assert sum(bool(reply.groups) for reply in replies.values()) > 1


def test_a_caller_who_gives_up_during_a_restart_is_answered_by_its_deadline(server, kit, load):
    engine = server.engine()
    engine.suspend()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(send, server, request, 1.5) for request in load[:8]]
        kit.until(lambda: server.metric("in_flight_requests") == 8)
        engine.kill()
        ends = [future.result(30) for future in futures]
    assert {end.code() for end in ends} <= {Code.DEADLINE_EXCEEDED}
    kit.until(lambda: server.metric("in_flight_requests") == 0)
    kit.until(lambda: server.is_serving(MODEL))
    assert not isinstance(send(server, load[0]), grpc.RpcError)


def test_an_idle_engine_has_not_stalled_when_work_comes(impatient, kit):
    """Silence counts from when there is work: here the engine is halted for far less than the time it is given."""
    request = kit.ids_request([1], [[2]])
    send(impatient, request)
    time.sleep(STALL_TIMEOUT_S + 1)
    engine = impatient.engine()
    engine.suspend()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(send, impatient, request)
        time.sleep(0.8)
        with contextlib.suppress(psutil.NoSuchProcess):
            engine.resume()
        assert not isinstance(future.result(60), grpc.RpcError)
    assert impatient.engine().pid == engine.pid


def test_an_engine_that_stalls_with_work_is_killed_and_its_work_done_again(impatient, kit):
    request = kit.ids_request([1, 2, 3], [[4], [5]])
    wanted = kit.scores_of(send(impatient, request))
    restarts = impatient.metric("engine_restarts_total")
    impatient.engine().send_signal(signal.SIGSTOP)
    assert kit.scores_of(send(impatient, request)) == wanted
    assert impatient.metric("engine_restarts_total") == restarts + 1
    assert any("silent" in line for line in impatient.log)


def test_what_was_in_flight_at_two_deaths_is_given_up_naming_the_cause(impatient, kit, load):
    """The engine is stopped first, so that nothing can be answered between the two deaths."""
    server = impatient
    wanted = [kit.scores_of(send(server, request)) for request in load]
    restarts = server.metric("engine_restarts_total")
    first = server.engine()
    first.suspend()
    with under_way(server, kit, load, at_least=NUM_REQUESTS) as futures:
        first.kill()
        second = []
        kit.until(lambda: second.extend(e for e in server.engines() if e.pid != first.pid) or second)
        kit.until(lambda: server.model().state == models_pb2.MODEL_STATE_SERVING)
        second[0].kill()
        ends = [future.result(60) for future in futures]
    counts = check_ends(kit, ends, wanted)
    refused = [end.details() for end in ends if isinstance(end, grpc.RpcError)]
    assert refused, f"all were answered before the second death: {counts}"
    assert all("SIGKILL" in message and "twice" in message for message in refused)
    kit.until(lambda: server.is_serving(MODEL))
    assert kit.scores_of(send(server, load[0])) == wanted[0]
    assert server.metric("engine_restarts_total") == restarts + 2
