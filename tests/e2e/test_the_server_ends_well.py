"""SIGTERM drains; whatever ends the front, no caller hangs and no engine is left behind."""

import signal
from concurrent.futures import ThreadPoolExecutor

import grpc
import psutil
import pytest

Code = grpc.StatusCode
NUM_REQUESTS = 48


def send(server, request, timeout=60):
    try:
        return server.scoring.Score(request, timeout=timeout)
    except grpc.RpcError as error:
        return error


def gone(processes, kit, within_s=20):
    def are_gone():
        return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)

    try:
        kit.until(are_gone, within_s)
    except (AssertionError, psutil.NoSuchProcess):
        return are_gone()
    return True


def start_unending_work(pool, server, kit):
    """Requests that are all admitted, and none of them ended before the engine is resumed."""
    server.engine().suspend()
    requests = [kit.ids_request(kit.random_ids(i, 300), [kit.random_ids(500 + i, 50)] * 8) for i in range(NUM_REQUESTS)]
    futures = [pool.submit(send, server, request) for request in requests]
    kit.until(lambda: server.metric("in_flight_requests") == NUM_REQUESTS)
    return futures


def test_sigterm_answers_all_that_was_admitted_and_refuses_what_comes_after(start, bf16_checkpoint, kit):
    server = start("--model", f"tiny={bf16_checkpoint}", "--grace-s", "60").ready()
    engine = server.engine()
    watch = kit.Watch(server, "")
    kit.until(lambda: watch.statuses)
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        futures = start_unending_work(pool, server, kit)
        server.terminate()
        server.wait_for_log("draining: ")
        late = send(server, kit.ids_request([1], [[2]]), timeout=20)
        assert not server.is_serving() and not server.is_serving("rewardserve.v1.Scoring/tiny")
        engine.resume()
        ends = [future.result(90) for future in futures]
    assert isinstance(late, grpc.RpcError) and late.code() is Code.UNAVAILABLE
    assert "shutting down" in late.details()
    failed = [end for end in ends if isinstance(end, grpc.RpcError)]
    assert not failed, failed[0]
    assert all(None not in kit.scores_of(end) for end in ends)
    kit.until(lambda: watch.statuses == [kit.SERVING, kit.NOT_SERVING])
    watch.end()
    assert server.wait() == 0
    assert gone([engine], kit)


def test_sigterm_while_one_model_still_loads_answers_what_another_has_admitted(start, bf16_checkpoint, kit):
    server = start(*(f"--model={name}={bf16_checkpoint}" for name in ("one", "two")), "--grace-s", "60").listen()
    kit.until(lambda: len(server.engines()) == 2)
    one, two = sorted(server.engines(), key=lambda engine: engine.create_time())
    two.suspend()  # it would be loading for ever
    one.suspend()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(send, server, kit.ids_request([1], [[2]], model="one"))
        kit.until(lambda: 'in_flight_requests{model="one"} 1.0' in server.scrape())
        server.terminate()
        server.wait_for_log("draining: ")
        one.resume()
        end = future.result(90)
    assert not isinstance(end, grpc.RpcError), end
    assert server.wait() == 0
    assert gone([one, two], kit)


def test_a_grace_too_short_ends_in_bounds_and_every_caller_hears_of_it(start, bf16_checkpoint, kit):
    server = start("--model", f"tiny={bf16_checkpoint}", "--grace-s", "0.05").ready()
    engine = server.engine()
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        futures = start_unending_work(pool, server, kit)
        server.terminate()
        code = server.wait(30)
        ends = [future.result(10) for future in futures]
    failed = [end for end in ends if isinstance(end, grpc.RpcError)]
    assert len(failed) == NUM_REQUESTS
    assert {error.code() for error in failed} == {Code.UNAVAILABLE}, "callers should know that a retry is safe"
    assert code == 0
    assert gone([engine], kit)


def test_a_second_signal_ends_it_at_once(start, bf16_checkpoint, kit):
    server = start("--model", f"tiny={bf16_checkpoint}", "--grace-s", "60").ready()
    engine = server.engine()
    engine.suspend()  # nothing will ever be finished
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(send, server, kit.ids_request([1], [[2]]))
        kit.until(lambda: server.metric("in_flight_requests") == 1)
        server.terminate()
        server.wait_for_log("draining: ")
        server.terminate()
        assert server.wait(10) == 130
        assert isinstance(future.result(20), grpc.RpcError)
    engine.resume()
    assert gone([engine], kit)


def test_an_engine_whose_front_is_killed_goes_away_by_itself(start, bf16_checkpoint, kit):
    server = start("--model", f"tiny={bf16_checkpoint}").ready()
    processes = [server.engine(), server.nursery()]
    server.process.kill()
    assert gone(processes, kit)
    kit.until(lambda: not server._reader.is_alive())
    assert server.log[-1].endswith("ready"), "nor has it a last word that is no line of the log"


def test_an_engine_that_is_loading_when_its_front_is_killed_goes_away_too(start, bf16_checkpoint, kit):
    server = start("--model", f"tiny={bf16_checkpoint}").listen()
    kit.until(server.engines)
    engine = server.engine()
    server.process.kill()
    assert gone([engine], kit)


@pytest.mark.parametrize(("number", "importing"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_while_loading_ends_cleanly(start, bf16_checkpoint, kit, number, importing):
    server = start("--model", f"tiny={bf16_checkpoint}").listen()
    kit.until(server.nursery if importing else server.engines)
    assert not server.is_serving()
    processes = [server.nursery(), *server.engines()]
    server.process.send_signal(number)
    assert server.wait(20) == 0
    assert gone(processes, kit)
    assert not any("Traceback" in line for line in server.log), "\n".join(server.log)


@pytest.fixture
def start_with_hangups(start):
    """A server to which SIGHUP is what it is to its parent: `nohup` ignores it, a shell does not."""

    def start_one(handler, *arguments):
        before = signal.signal(signal.SIGHUP, handler)
        try:
            return start(*(arguments or ("--allow-model-control",))).ready()
        finally:
            signal.signal(signal.SIGHUP, before)

    return start_one


def test_a_terminal_that_is_closed_drains_the_server(start_with_hangups):
    """The terminal and the shell in it may send a signal each."""
    server = start_with_hangups(signal.SIG_DFL)
    for _ in range(2):
        server.process.send_signal(signal.SIGHUP)
    assert server.wait(20) == 0
    assert any("draining: " in line for line in server.log)


def test_a_session_that_ends_sends_sigterm_behind_sighup_and_the_server_drains_all_the_same(
    start_with_hangups, bf16_checkpoint, kit
):
    server = start_with_hangups(signal.SIG_DFL, "--model", f"tiny={bf16_checkpoint}")
    engine = server.engine()
    engine.suspend()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(send, server, kit.ids_request([1], [[2]]))
        kit.until(lambda: server.metric("in_flight_requests") == 1)
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log("draining: ")
        server.terminate()
        engine.resume()
        assert None not in kit.scores_of(future.result(60))
    assert server.wait(20) == 0


def test_under_nohup_a_terminal_that_is_closed_is_nothing_to_the_server(start_with_hangups):
    server = start_with_hangups(signal.SIG_IGN)
    server.process.send_signal(signal.SIGHUP)
    server.scrape()
    assert not any("draining: " in line for line in server.log)
    server.terminate()
    assert server.wait(20) == 0


def test_a_checkpoint_that_is_not_there_ends_the_server_with_one_clear_line(start, tmp_path):
    server = start("--model", f"tiny={tmp_path}/nowhere")
    assert server.wait(30) == 1
    assert f"{tmp_path}/nowhere: no such folder" in server.log[-1]
    assert not any("Traceback" in line for line in server.log)


def test_a_model_name_that_cannot_be_is_refused_without_a_traceback(start, bf16_checkpoint):
    server = start("--model", f"a name={bf16_checkpoint}")
    assert server.wait(30) in (1, 2)
    assert "'a name" in server.log[-1]
    assert not any("Traceback" in line for line in server.log), "\n".join(server.log)


def test_a_taken_port_is_said_so(start, bf16_checkpoint):
    first = start("--allow-model-control").listen()
    second = start("--allow-model-control", "--port", str(first.port))
    assert second.wait(30) == 1
    assert "--port" in second.log[-1] and str(first.port) in second.log[-1]
    third = start("--allow-model-control", "--metrics-port", str(first.metrics_port))
    assert third.wait(30) == 1
    assert "--metrics-port" in third.log[-1]
    assert not any("Traceback" in line for line in second.log + third.log)
