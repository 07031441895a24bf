"""RewardClient: from threads, from inside a running loop, interrupted, forgotten, closed."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from rewardserve.client import DeadlineExceeded, Group, RewardClient, RewardClientError, VersionMismatch

GROUPS = [Group(f"prompt {n}", ["a", "b"], id=str(n)) for n in range(50)]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "ipv4:127.0.0.1"])
def test_a_proxy_is_not_asked_for_a_server_on_this_machine(server, monkeypatch, host):
    """A container's probe would fail for ever where it was told of a proxy."""
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with RewardClient(server.target.replace("127.0.0.1", host)) as client:
        client.wait_ready(10)
        assert len(client.score(GROUPS[:1]).groups[0].items) == 2


def test_every_method_answers(server, expected):
    with RewardClient(server.target) as client:
        client.wait_ready(10)
        assert [group.scores for group in client.score(iter(GROUPS)).groups] == [expected(group) for group in GROUPS]
        assert len(client.rank("p", ["a", "b"], top_k=1).ranked) == 1
        assert (
            client.compare("p", "a", "b").margin
            == client.compare("p", "a", "b").a.score - client.compare("p", "a", "b").b.score
        )
        assert len(client.list_models()) == 2 and client.get_model("toy").name == "toy"
        assert client.load_model("new", "folder").name == "new"
        assert client.unload_model("new") is None


def test_a_stream_is_complete_and_bounded(server, expected):
    server.servicer.delay_s = 0.001
    with RewardClient(server.target) as client:
        results = {group.id: outcome for group, outcome in client.score_stream(iter(GROUPS), window=5)}
    assert {id: outcome.scores for id, outcome in results.items()} == {g.id: expected(g) for g in GROUPS}
    assert server.servicer.max_in_flight <= 5 and server.servicer.num_streams == 1


def test_the_callers_iterable_runs_in_the_callers_thread(server):
    threads = set()

    def source():
        for group in GROUPS:
            threads.add(threading.current_thread())
            yield group

    with RewardClient(server.target) as client:
        client.score(source())
        assert len(list(client.score_stream(source(), window=3))) == len(GROUPS)
    assert threads == {threading.current_thread()}


def test_what_a_stream_got_before_another_version_is_yielded_before_the_error(server):
    def change_reply(reply):
        if reply.groups[0].id == "2":
            reply.model.version = "v2"

    def source():
        yield from GROUPS[:3]
        while len(server.servicer.answered) < 3:
            time.sleep(0.001)
        client._loop.run(asyncio.sleep(0.02))  # for the answers to arrive: all of them are taken at once
        yield GROUPS[3]

    server.servicer.change_reply = change_reply
    came = []
    with RewardClient(server.target) as client, pytest.raises(VersionMismatch):
        came.extend(group.id for group, _ in client.score_stream(source()))
    assert came == ["0", "1"]


def test_a_stream_may_be_left_early(server):
    server.servicer.delay_s = 0.01
    with RewardClient(server.target) as client:
        results = client.score_stream(iter(GROUPS), window=4)
        next(results)
        results.close()
        assert client.score(GROUPS[:1]).groups[0].scores


async def test_it_works_inside_a_running_event_loop(server, expected):
    with RewardClient(server.target) as client:
        assert client.score(GROUPS[:1]).groups[0].scores == expected(GROUPS[0])
        assert len(list(client.score_stream(GROUPS))) == len(GROUPS)
    await asyncio.sleep(0)


def test_threads_may_share_it(server, expected):
    with RewardClient(server.target) as client, ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda group: client.score([group]).groups[0].scores, GROUPS))
    assert results == [expected(group) for group in GROUPS]


def test_a_deadline_holds(server):
    server.servicer.hang = True
    with RewardClient(server.target, timeout=0.3) as client, pytest.raises(DeadlineExceeded):
        client.score(GROUPS)


def wait_until(condition, limit_s: float = 10.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.fixture
def interruptible():
    """As in a shell's foreground: what is started in its background ignores the signal, and so would the test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_cancels_the_call_at_the_server(server, interruptible):
    server.servicer.hang = True

    def interrupt() -> None:
        wait_until(lambda: server.servicer.requests)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # wakes it, as Ctrl-C does

    with RewardClient(server.target) as client:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            client.score(GROUPS)
        wait_until(lambda: server.servicer.num_cancelled == 1)
        server.servicer.hang = False
        assert client.score(GROUPS[:1])


def test_closing_ends_the_calls_of_other_threads(server):
    server.servicer.hang = True
    client = RewardClient(server.target)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.score, GROUPS)
        wait_until(lambda: server.servicer.requests)
        client.close()
        with pytest.raises(RewardClientError, match="closed"):
            call.result(10)
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.score(GROUPS)
    with pytest.raises(RuntimeError, match="closed"):
        list(client.score_stream(GROUPS))


def client_threads() -> int:
    return sum(thread.name == "rewardserve-client" for thread in threading.enumerate())


def test_a_forgotten_client_takes_its_thread_with_it(server):
    before = client_threads()
    client = RewardClient(server.target)
    client.score(GROUPS[:1])
    assert client_threads() == before + 1
    del client
    gc.collect()
    wait_until(lambda: client_threads() == before)


@pytest.mark.parametrize(
    "ending",
    ["", "results = client.score_stream(groups); next(results)", "threading.Thread(target=hang, daemon=True).start()"],
    ids=["idle", "in a stream", "in a call"],
)
def test_a_client_left_open_does_not_keep_the_interpreter(server, ending):
    server.servicer.delay_s = 0.01
    code = f"""
import threading
from rewardserve.client import Group, RewardClient
groups = [Group(str(n), ["a"]) for n in range(100)]
client = RewardClient({server.target!r})
client.score(groups)
def hang():
    try:
        client.score(groups * 10)
    except Exception:
        pass
{ending}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    "at_fork", ["", "client._loop._lock.acquire()"], ids=["idle", "a thread is handing over a call"]
)
def test_taken_through_a_fork_it_says_so(server, at_fork: str):
    """At once: a lock that another thread held when the process was forked is held for ever in the child."""
    code = f"""
import os
from rewardserve.client import Group, RewardClient
client = RewardClient({server.target!r})
{at_fork}
child = os.fork()
if child == 0:
    try:
        client.score([Group("p", ["a"])])
    except RuntimeError as error:
        client.close()
        os._exit(42)
    os._exit(1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "42", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(("first", "answer"), [("", "forked while a client was in use"), ("client.close()", "scored")])
def test_one_made_after_a_fork_works_or_says_why_it_cannot(server, first: str, answer: str):
    """gRPC would wait for threads that are not there, for ever and whatever the timeout, or crash."""
    code = f"""
import os
from rewardserve.client import Group, RewardClient
client = RewardClient({server.target!r})
client.score([Group("p", ["a"])])
{first}
if os.fork() == 0:
    try:
        RewardClient({server.target!r}, timeout=20).score([Group("p", ["a"])])
        print("scored", flush=True)
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
client.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert answer in done.stdout, done.stderr
