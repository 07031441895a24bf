"""vLLM's processes die, or hang, under load: every call ends with its score or a promised status, and it heals."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import grpc
import psutil
import pytest
from rewardserve.engine.vllm_engine import ModelGone
from rewardserve.engine.vllm_models import Classifier
from rewardserve.v1 import models_pb2

Code = grpc.StatusCode
NUM_REQUESTS = 24


@pytest.fixture(scope="module")
def server(start, checkpoint):
    return start("--model", f"tiny={checkpoint}", "--engine", "vllm", "--max-batch-tokens", "256").ready()


@pytest.fixture(scope="module")
def load(kit):
    return [
        kit.ids_request(kit.random_ids(i, 128), [kit.random_ids(1000 + 4 * i + j, 32) for j in range(4)])
        for i in range(NUM_REQUESTS)
    ]


def send(server, request, timeout=600):
    try:
        return server.scoring.Score(request, timeout=timeout)
    except grpc.RpcError as error:
        return error


@contextlib.contextmanager
def under_way(server, kit, requests):
    """Sends all at once, each in a thread; enters when all are answered or under way."""
    with ThreadPoolExecutor(len(requests)) as pool:
        futures = [pool.submit(send, server, request) for request in requests]
        kit.until(lambda: server.metric("in_flight_requests") + sum(f.done() for f in futures) >= len(requests))
        yield futures


def core_of(engine):
    """vLLM's process that plans the forwards."""
    (core,) = [p for p in engine.children() if "EngineCore" in p.name() or "EngineCore" in " ".join(p.cmdline())]
    return core


def are_gone(processes):
    def gone(process):
        try:
            return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return all(map(gone, processes))


def healed(server, kit, load, wanted, restarts):
    kit.until(lambda: server.model().state == models_pb2.MODEL_STATE_SERVING)
    assert server.metric("engine_restarts_total") == restarts
    for request, true in zip(load[:3], wanted, strict=False):
        assert kit.scores_of(send(server, request)) == pytest.approx(true, rel=1e-4, abs=1e-4)
    assert server.process.poll() is None
    assert server.metric("in_flight_requests") == 0


@pytest.mark.parametrize("victim", ["the engine's process", "vLLM's core"])
def test_a_kill_under_load_loses_nothing(server, kit, load, victim):
    wanted = [kit.scores_of(send(server, request)) for request in load]
    restarts = server.metric("engine_restarts_total")
    old = server.engine()
    family = [old, *old.children(recursive=True)]
    core = core_of(old)
    core.suspend()  # so that all is under way when it dies
    with under_way(server, kit, load) as futures:
        (old if victim == "the engine's process" else core).kill()
        ends = [future.result(kit.ANTI_HANG_S) for future in futures]
    for end, true in zip(ends, wanted, strict=True):
        if isinstance(end, grpc.RpcError):
            assert end.code() is Code.UNAVAILABLE and "model 'tiny'" in end.details()
        else:
            assert kit.scores_of(end) == pytest.approx(true, rel=1e-4, abs=1e-4)
    assert sum(not isinstance(end, grpc.RpcError) for end in ends) == NUM_REQUESTS, "not handed to the new engine"
    healed(server, kit, load, wanted, restarts + 1)
    assert server.engine().pid != old.pid
    kit.until(lambda: are_gone(family))


def test_a_deadline_that_passes_in_vllm_is_answered_and_its_work_dropped(server, kit, load):
    engine = server.engine()
    core = core_of(engine)
    pairs = server.metric("batch_pairs_sum")
    core.suspend()
    with ThreadPoolExecutor(8) as pool:
        ends = list(pool.map(lambda request: send(server, request, timeout=1.0), load[:8]))
    assert {end.code() for end in ends} == {Code.DEADLINE_EXCEEDED}
    kit.until(lambda: server.metric("in_flight_requests") == 0)
    core.resume()
    assert None not in kit.scores_of(send(server, load[9]))
    kit.until(lambda: server.metric("batch_pairs_sum") >= pairs + 4)
    assert server.metric("batch_pairs_sum") <= pairs + 4 + 8, "what nobody waits for was computed all the same"
    assert server.engine().pid == engine.pid


def test_a_caller_who_leaves_has_its_work_dropped(server, kit, load):
    engine = server.engine()
    core = core_of(engine)
    pairs = server.metric("batch_pairs_sum")
    core.suspend()
    calls = [server.scoring.Score.future(request, timeout=600) for request in load]
    kit.until(lambda: server.metric("in_flight_requests") == NUM_REQUESTS)
    for call in calls[1:]:
        call.cancel()
    kit.until(lambda: server.metric("in_flight_requests") == 1)
    core.resume()
    assert None not in kit.scores_of(calls[0].result(kit.ANTI_HANG_S))
    assert None not in kit.scores_of(send(server, load[0]))
    kit.until(lambda: server.metric("batch_pairs_sum") >= pairs + 8)
    assert server.metric("batch_pairs_sum") < pairs + 4 * NUM_REQUESTS, (
        "what nobody waits for was computed all the same"
    )
    assert server.engine().pid == engine.pid


def test_a_core_that_hangs_with_work_is_killed_and_its_work_done_again(start, kit, checkpoint, load):
    server = start("--model", f"tiny={checkpoint}", "--engine", "vllm", "--stall-timeout-s", "25").ready()
    wanted = kit.scores_of(send(server, load[0]))
    old = server.engine()
    family = [old, *old.children(recursive=True)]
    core_of(old).suspend()
    assert kit.scores_of(send(server, load[0])) == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert server.metric("engine_restarts_total") == 1
    assert any("silent" in line for line in server.log)
    kit.until(lambda: are_gone(family))
    last = server.engine()
    family = [last, *last.children(recursive=True)]
    server.process.kill()  # whatever ends the front, nothing of vLLM stays
    kit.until(lambda: are_gone(family))


def test_sigterm_answers_what_was_admitted_and_leaves_no_process(start, kit, checkpoint, load):
    server = start("--model", f"tiny={checkpoint}", "--engine", "vllm", "--max-batch-tokens", "256").ready()
    engine = server.engine()
    family = [engine, *engine.children(recursive=True)]
    core = core_of(engine)
    core.suspend()
    with under_way(server, kit, load) as futures:
        server.terminate()
        server.wait_for_log("draining: ")
        core.resume()
        ends = [future.result(kit.ANTI_HANG_S) for future in futures]
    assert not [end for end in ends if isinstance(end, grpc.RpcError)]
    assert server.wait() == 0
    kit.until(lambda: are_gone(family))


def test_nothing_of_vllm_outlives_a_front_and_an_engine_that_are_killed_at_once(start, kit, checkpoint):
    """Nobody is left to end it: it has to notice by itself."""
    server = start("--model", f"tiny={checkpoint}", "--engine", "vllm").ready()
    engine = server.engine()
    family = engine.children(recursive=True)
    assert len(family) >= 2
    server.process.kill()
    engine.kill()
    kit.until(lambda: are_gone(family))


def test_a_core_that_hangs_is_noticed_though_no_caller_waits_long_for_it(start, checkpoint, kit, load):
    server = start("--model", f"tiny={checkpoint}", "--engine", "vllm", "--stall-timeout-s", "8").ready()
    wanted = kit.scores_of(send(server, load[0]))
    core_of(server.engine()).suspend()
    ends = []

    def is_noticed() -> bool:
        ends.append(send(server, load[0], timeout=1))
        return server.metric("engine_restarts_total") == 1

    kit.until(is_noticed)
    *ends, _ = ends  # the last one may have come when the new engine was there already
    assert all(end.code() in (Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE) for end in ends)
    kit.until(lambda: server.model().state == models_pb2.MODEL_STATE_SERVING)
    assert kit.scores_of(send(server, load[0])) == pytest.approx(wanted, rel=1e-4, abs=1e-4)


async def test_a_request_is_not_blamed_for_the_death_of_what_hands_out_answers():
    """vLLM tells each that is in flight of a failure, as if it were its own; a new engine is to have them."""
    from vllm.v1.engine.exceptions import EngineGenerateError

    class Front:
        errored = True

        async def encode(self, *_, **__):
            raise EngineGenerateError from RuntimeError("of the output handler")
            yield

    with pytest.raises(ModelGone, match="of the output handler"):
        await Classifier(Front(), None, 1, 1).score("1", [5], 0)
