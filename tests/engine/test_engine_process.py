"""The messages between the front and an engine's process, with a child that has no model: it answers, badly or well."""

import asyncio
import contextlib
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from rewardserve.engine.base import EngineListener, EngineRequest
from rewardserve.engine.child_process import ChildProcess
from rewardserve.engine.environment import engine_environment
from rewardserve.engine.launch import Program
from rewardserve.engine.native.options import NativeOptions
from rewardserve.engine.process import EngineProcess
from rewardserve.errors import EngineDied, LoadFailed, Unavailable
from rewardserve.types import EncodedGroup

CHILD = """
import sys, time
import msgspec, zmq
from rewardserve.engine.base import BatchReport, EngineGroup, EngineInfo, EngineItem, EngineResult
from rewardserve.engine.messages import Batch, Cancel, CannotLoad, Done, Loading, Ping, Pong
from rewardserve.engine.messages import Ready, Score, Stop, ToChild

folder, mode = sys.argv[1], {mode!r}
context, encode = zmq.Context(), msgspec.msgpack.Encoder().encode
outbox = context.socket(zmq.PUSH)
outbox.set_hwm(0)
outbox.connect(f"ipc://{{folder}}/out")
if mode == "hangs":
    time.sleep(600)
if mode == "loads long":
    for _ in range(10):
        time.sleep(0.3)
        outbox.send(encode(Loading()))
if mode == "refuses":
    outbox.send(encode(CannotLoad("nothing is there", False)))
    outbox.close(linger=1000)
    context.term()
    sys.exit(0)
info = EngineInfo("v", "A", "packed", "", "float32", "cpu", 1, 100, 1000, 0.0, 0)
outbox.send(encode(Ready(info)))
if mode == "late":
    time.sleep(0.5)
inbox = context.socket(zmq.PULL)
inbox.set_hwm(0)
inbox.connect(f"ipc://{{folder}}/in")
decoder = msgspec.msgpack.Decoder(ToChild)
waiting = []
while True:
    match decoder.decode(inbox.recv()):
        case Stop():
            outbox.close(linger=1000)
            sys.exit(0)
        case Ping() if mode != "computes nothing":
            outbox.send(encode(Pong()))
            continue
        case Cancel(request_id):
            outbox.send(encode(Done(request_id, None, False)))
            continue
        case Score(request):
            waiting.append(request)
    if mode == "nonsense":
        outbox.send(b"nonsense")
    if mode == "computes nothing" or (mode == "bursts" and len(waiting) < 50):
        continue
    for request in waiting:
        first = int.from_bytes(request.groups[0].responses[0][:4], "little")
        group = EngineGroup((EngineItem(float(first)),), 0)
        outbox.send(encode(Batch(BatchReport(1, 1, 0, 0, 0.1, 0, 0))))
        outbox.send(encode(Done(request.request_id, EngineResult((group,), 0.0, 0.0), False)))
    waiting.clear()
"""

# The engine's own, over a loop that takes its time to begin with other weights, and to read them.
UPDATES = """
import sys, threading, time
from concurrent.futures import Future
from rewardserve.engine import child
from rewardserve.engine.base import EngineInfo

child.LOADING_INTERVAL_S = 0.2
INFO = EngineInfo("v", "A", "packed", "", "float32", "cpu", 1, 100, 1000, 0.0, 0)


class Loop:
    def __init__(self, **listeners):
        self._is_busy = False

    def start(self):
        return INFO

    def ping(self, answer):
        if not self._is_busy:
            answer()

    def update_weights(self, source):
        done, self._is_busy = Future(), True
        threading.Thread(target=self._update, args=(done,)).start()
        return done

    def _update(self, done):
        if {mode!r} == "updates long":
            done.set_running_or_notify_cancel()
        time.sleep(2.5)
        done.set_result(INFO)


child.Child(sys.argv[1], lambda: Loop).run()
"""


def request(number: int) -> EngineRequest:
    return EngineRequest(str(number), (EncodedGroup(bytes(40), (number.to_bytes(4, "little") + bytes(4),)),))


@pytest.fixture
def make_engine(tmp_path: Path):
    def make(
        mode: str, stall_timeout_s: float = 600.0, beside_others: bool = False, resubmit: bool = True
    ) -> EngineProcess:
        script = tmp_path / "child.py"
        script.write_text((UPDATES if "updates" in mode else CHILD).format(mode=mode))
        launcher = Program(engine_environment("native", beside_others, os.environ), (sys.executable, str(script)))
        return EngineProcess(NativeOptions("nowhere"), "toy", launcher, stall_timeout_s, resubmit=resubmit)

    return make


async def scored(engine: EngineProcess, numbers: range) -> list[float]:
    async with asyncio.timeout(60):
        results = await asyncio.gather(*(engine.score(request(number)) for number in numbers))
    return [result.groups[0].items[0].score for result in results]


async def test_why_it_cannot_load_is_heard_though_it_has_ended_by_then(make_engine, monkeypatch) -> None:
    hear = ChildProcess.next_message

    async def hear_late(child: ChildProcess) -> bytes:
        await child.process.wait()
        await asyncio.sleep(0.05)  # as on busy cores: its last word is still under way
        return await hear(child)

    monkeypatch.setattr(ChildProcess, "next_message", hear_late)
    with pytest.raises(LoadFailed, match="nothing is there"):
        await make_engine("refuses").start(EngineListener())


async def test_bursts_of_answers_each_find_their_caller_and_every_report_is_heard(make_engine) -> None:
    engine, reports = make_engine("bursts"), []
    await engine.start(EngineListener(on_batch=reports.append))
    try:
        assert await scored(engine, range(1000)) == list(range(1000))
        assert len(reports) == 1000
    finally:
        await engine.stop()


async def test_what_is_sent_before_the_child_listens_waits_for_it_in_order(make_engine) -> None:
    engine = make_engine("late")
    await engine.start(EngineListener())
    try:
        assert await scored(engine, range(20)) == list(range(20))
    finally:
        await engine.stop()


async def test_a_child_that_cannot_be_understood_is_ended(make_engine, caplog) -> None:
    engine, down = make_engine("nonsense"), asyncio.Event()
    await engine.start(EngineListener(on_down=lambda reason: down.set()))
    call = asyncio.ensure_future(engine.score(request(1)))
    try:
        async with asyncio.timeout(60):
            await down.wait()
    finally:
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await engine.stop()
    assert "cannot be handled" in caplog.text


async def test_a_child_that_hangs_while_it_loads_is_given_up(make_engine) -> None:
    engine = make_engine("hangs", stall_timeout_s=1.0)
    with pytest.raises(EngineDied, match="silent for 1 s while loading"):
        async with asyncio.timeout(60):
            await engine.start(EngineListener())


async def test_a_child_that_is_loading_ends_with_its_engine(make_engine) -> None:
    engine = make_engine("hangs")
    start = asyncio.ensure_future(engine.start(EngineListener()))
    me = psutil.Process()
    async with asyncio.timeout(60):
        while not me.children():
            await asyncio.sleep(0.01)
        await engine.stop()
        assert not me.children()
        with pytest.raises(Unavailable, match="unloaded"):
            await start


async def test_a_child_that_takes_its_time_to_load_but_says_so_is_waited_for(make_engine) -> None:
    engine = make_engine("loads long", stall_timeout_s=1.0)
    await engine.start(EngineListener())
    try:
        assert await scored(engine, range(3)) == [0, 1, 2]
    finally:
        await engine.stop()


async def test_a_child_that_reads_other_weights_for_longer_than_a_stall_is_not_ended(make_engine) -> None:
    """But for one that never comes to it, a forward before hangs."""
    engine = make_engine("updates long", stall_timeout_s=1.0)
    await engine.start(EngineListener())
    stalled = make_engine("waits with updates", stall_timeout_s=1.0)
    await stalled.start(EngineListener())
    try:
        async with asyncio.timeout(60):
            assert (await engine.update_weights("elsewhere")).version == "v"
            with pytest.raises(EngineDied, match="while it took over other weights"):
                await stalled.update_weights("elsewhere")
    finally:
        await asyncio.gather(engine.stop(), stalled.stop())


@pytest.mark.parametrize("overlapping", [True, False])
async def test_a_child_that_takes_work_and_computes_none_is_ended_though_its_callers_have_deadlines(
    make_engine, caplog, overlapping
) -> None:
    """What they gave up is acknowledged all the while, and a caller who comes alone finds nothing in flight."""
    engine, down = make_engine("computes nothing", stall_timeout_s=1.0), asyncio.Event()
    await engine.start(EngineListener(on_down=lambda reason: down.set()))

    async def keep_asking(first: int) -> None:
        for number in range(first, 1000, 2):
            with contextlib.suppress(TimeoutError, Unavailable):
                async with asyncio.timeout(0.4):
                    await engine.score(request(number))

    callers = [asyncio.ensure_future(keep_asking(first)) for first in range(1 + overlapping)]
    try:
        async with asyncio.timeout(60):
            await down.wait()
        assert "was silent for 1 s" in caplog.text
    finally:
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        await engine.stop()


async def test_a_child_with_nothing_to_do_for_longer_than_a_stall_is_not_ended(make_engine) -> None:
    engine = make_engine("answers", stall_timeout_s=2.0)
    await engine.start(EngineListener())
    try:
        pid = engine.pid
        await asyncio.sleep(5.0)
        assert await scored(engine, range(3)) == [0, 1, 2]
        assert engine.pid == pid
    finally:
        await engine.stop()


async def test_what_an_engine_dies_over_fails_at_once_where_another_can_take_it(make_engine) -> None:
    engine = make_engine("computes nothing", resubmit=False)
    await engine.start(EngineListener())
    call = asyncio.ensure_future(engine.score(request(1)))
    try:
        await asyncio.sleep(0)
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDied, match="SIGKILL with this request in flight"):
            async with asyncio.timeout(60):
                await call
    finally:
        await engine.stop()


async def restarted(engine: EngineProcess, listener: EngineListener, end: Callable[[int], None]) -> list[float]:
    """Scores of the one that comes after it."""
    down, up = asyncio.Event(), asyncio.Event()
    listener.on_down, listener.on_up = lambda reason: down.set(), lambda info: up.set()
    await engine.start(listener)
    try:
        end(engine.pid)
        async with asyncio.timeout(60):
            await down.wait()
            await up.wait()
        return await scored(engine, range(3))
    finally:
        await engine.stop()


async def test_one_that_is_ended_by_a_signal_without_a_name_is_restarted(make_engine, caplog) -> None:
    nameless = signal.SIGRTMIN + 6
    found = await restarted(make_engine("answers"), EngineListener(), lambda pid: os.kill(pid, nameless))
    assert found == [0, 1, 2]
    assert f"was killed by signal {nameless}" in caplog.text


async def test_one_that_dies_while_no_file_can_be_opened_is_restarted_when_some_can(make_engine) -> None:
    """A front of many callers may be at its limit just then; without one, nobody would try again."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def end(pid: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        asyncio.get_running_loop().call_later(0.5, resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        os.kill(pid, signal.SIGKILL)

    try:
        assert await restarted(make_engine("answers"), EngineListener(), end) == [0, 1, 2]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_a_folder_for_temporary_files_may_have_a_longer_name_than_a_socket(make_engine, tmp_path, monkeypatch):
    """A batch job's may; nothing is left there, nor where the sockets are instead."""
    (long := tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    engine = make_engine("answers")
    await engine.start(EngineListener())
    try:
        assert await engine.score(request(1))
        (folder,) = [word for word in psutil.Process(engine.pid).cmdline() if word.startswith("/tmp/rewardserve-")]
    finally:
        await engine.stop()
    assert not os.path.exists(folder) and not any(long.iterdir())


async def test_a_supervisor_that_fails_leaves_nobody_waiting(make_engine) -> None:
    """Whatever it may be that fails: here, what it tells of a death to."""
    engine, failed = make_engine("computes nothing"), []

    def forgets(reason: str) -> None:
        raise KeyError(reason)

    await engine.start(EngineListener(on_down=forgets, on_failed=failed.append))
    call = asyncio.ensure_future(engine.score(request(1)))
    try:
        await asyncio.sleep(0)
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDied):
            async with asyncio.timeout(60):
                await call
        assert len(failed) == 1
    finally:
        await engine.stop()


CACHELESS = "glibc.malloc.tcache_count=0"


@pytest.mark.parametrize(
    ("beside_others", "told", "spin", "malloc"),
    [
        (False, {}, None, CACHELESS),
        (True, {}, "1000", CACHELESS),
        (True, {"OMP_WAIT_POLICY": "active"}, None, CACHELESS),
        (False, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}, None, f"glibc.malloc.perturb=0:{CACHELESS}"),
        (False, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=9"}, None, "glibc.malloc.tcache_count=9"),
    ],
)
async def test_engines_spare_cores_and_memory_unless_the_user_says_otherwise(
    make_engine,
    monkeypatch: pytest.MonkeyPatch,
    beside_others: bool,
    told: dict[str, str],
    spin: str | None,
    malloc: str,
) -> None:
    """With others on the same cores their threads soon sleep; what they free they can use again."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    engine = make_engine("answers", beside_others=beside_others)
    await engine.start(EngineListener())
    try:
        text = Path(f"/proc/{engine.pid}/environ").read_text()
        found = dict(line.split("=", 1) for line in text.split("\0") if line)
        assert found.get("GOMP_SPINCOUNT") == spin
        # glibc ends each setting where it stands once it has read it.
        assert f"\0GLIBC_TUNABLES={malloc}\0" in text.replace("\0glibc", ":glibc")
    finally:
        await engine.stop()
