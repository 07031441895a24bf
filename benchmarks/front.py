"""What one front process costs: gRPC, protobuf, admission, encoding and metrics, with no model behind them.

    python benchmarks/front.py [--rounds 5] [--seconds 0.8] [--open-seconds 5]

Four kinds of process: a load generator (this one), a front over the fake engine, a front over an engine process whose
runner answers without a model, and a bare grpc.aio + uvloop echo of the same bytes: the machine's own limit. All run
on the cores given to this program (`taskset -c 2,3 ...`), one is measured at a time, rounds are interleaved, medians
are taken. What other programs took of these cores meanwhile is noted: rates suffer from it, CPU times less. Samples
disturbed by more than a tenth are taken again, as long as patience lasts. The generator sends messages built and
serialized beforehand through multicallables without serializers, so that it costs as little as a client can. Requests
carry a deadline, as the client's do.

A group is a prompt of 100 ids with 16 responses of 300 ids each, 19.7 kB; a single pair is the same prompt with one of
the responses. Writes benchmarks/results/front_cpu.json.
"""

import argparse
import asyncio
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import psutil
import uvloop
from rewardserve.app import App
from rewardserve.config import ServeConfig
from rewardserve.engine.base import Engine
from rewardserve.engine.fake import FakeEngine, fake_info
from rewardserve.engine.launch import Program
from rewardserve.engine.native.options import NativeOptions
from rewardserve.engine.process import EngineProcess
from rewardserve.v1 import scoring_pb2
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
PROMPT_TOKENS, RESPONSE_TOKENS, GROUP_SIZE = 100, 300, 16
VOCAB_SIZE = 50_000
IN_FLIGHT = 64
NUM_CHANNELS = 2
DEADLINE_S = 60.0
DISTURBED_PERCENT = 10.0
PACKAGES = ("grpcio", "protobuf", "uvloop", "pyzmq", "msgspec", "prometheus-client")
INFO = fake_info(version="bench", max_length=8192, vocab_size=VOCAB_SIZE)


def main() -> None:
    role, *rest = sys.argv[1:] or [""]
    if role == "--child":
        _be_child(rest)
    elif role == "--serve":
        uvloop.run(SERVERS[rest[0]]())
    else:
        uvloop.run(_measure(_options()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="times everything is measured")
    parser.add_argument("--seconds", type=float, default=0.8, help="of one measurement")
    parser.add_argument("--open-seconds", type=float, default=5.0, help="of the open loop; 0: none")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds for samples that others disturbed")
    parser.add_argument("--only", default="", help="measure only what has this in its name, and write nothing")
    return parser.parse_args()


# -- the servers -------------------------------------------------------------------------------------------------------


async def _serve_app(make_engine: Callable[[str, str, str], Engine]) -> None:
    app = App(ServeConfig(model=["bench=/nowhere"], port=0, metrics_port=0), make_engine)
    await app.start()
    await _announce(app.port, app.metrics_port)
    await app.stop()


async def _serve_fake() -> None:
    await _serve_app(lambda name, source, dtype: FakeEngine(INFO))


async def _serve_child() -> None:
    launcher = Program({}, (sys.executable, __file__, "--child"))
    await _serve_app(lambda name, source, dtype: EngineProcess(NativeOptions(source), name, launcher))


async def _serve_echo() -> None:
    """`/echo/N` replies with the first N bytes of the request."""

    class Echo(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            kind, _, size = handler_call_details.method.rpartition("/")
            length = int(size)

            async def unary(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
                return request[:length]

            async def stream(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
                async for request in requests:
                    yield request[:length]

            if kind == "/stream":
                return grpc.stream_stream_rpc_method_handler(stream)
            return grpc.unary_unary_rpc_method_handler(unary)

    server = grpc.aio.server(handlers=[Echo()])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await _announce(port, 0)
    await server.stop(None)


async def _announce(port: int, metrics_port: int) -> None:
    """Tells the generator, and waits until it closes the pipe."""
    print(port, metrics_port, flush=True)
    await asyncio.to_thread(sys.stdin.read)


SERVERS = {"fake": _serve_fake, "child": _serve_child, "echo": _serve_echo}


def _be_child(arguments: list[str]) -> None:
    """An engine's process in all but the model: messages, scheduler, prefix cache and both threads are real."""
    from rewardserve.engine import child
    from rewardserve.engine.native.load import Loaded
    from rewardserve.engine.native.runner import Done
    from rewardserve.engine.native.sequence import BatchPlan

    class NullRunner:
        num_blocks, num_host_slots = 16_384, 0

        def prepare(self, plan: BatchPlan) -> object:
            return plan

        def launch(self, prepared: object) -> Done:
            assert isinstance(prepared, BatchPlan)
            return Done([[0.5]] * prepared.num_reads)

    child.run(arguments, lambda options: Loaded(NullRunner(), INFO, 8192, None))  # type: ignore[arg-type]


@dataclass
class Server:
    """One server process, with channels to it."""

    process: subprocess.Popen[str]
    port: int
    metrics_port: int
    channels: list[grpc.aio.Channel] = field(default_factory=list)

    def cpu_s(self) -> tuple[float, float]:
        """CPU seconds so far: of the server, and of its children."""
        front = psutil.Process(self.process.pid)
        return _cpu_s(front), sum(map(_cpu_s, front.children()))


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


@contextlib.contextmanager
def _running(name: str) -> Iterator[Server]:
    command = [sys.executable, __file__, "--serve", name]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        ports = process.stdout.readline().split()
        if len(ports) != 2:
            raise SystemExit(f"the {name} server did not start; {' '.join(command)} says why")
        yield Server(process, int(ports[0]), int(ports[1]))
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(20)


# -- the load ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """One request as bytes, and the size of the reply it gets from the server."""

    request: bytes
    num_pairs: int
    reply_size: int = 0


@dataclass
class Sample:
    """One measurement: calls and pairs per second, milliseconds of the calls, CPU microseconds per call.

    `others_percent` of the cores' time went to programs that are not ours.
    """

    calls_per_s: float
    pairs_per_s: float
    p50_ms: float
    p99_ms: float
    server_us: float
    engine_us: float
    generator_us: float
    others_percent: float


def _message(num_responses: int) -> bytes:
    random_ids = np.random.default_rng(num_responses)

    def ids(count: int) -> bytes:
        return random_ids.integers(0, VOCAB_SIZE, count).astype("<i4").tobytes()

    group = scoring_pb2.Group(
        prompt=scoring_pb2.Prompt(token_ids=ids(PROMPT_TOKENS)),
        responses=[scoring_pb2.Response(token_ids=ids(RESPONSE_TOKENS)) for _ in range(num_responses)],
    )
    return scoring_pb2.ScoreRequest(groups=[group]).SerializeToString()


class Load:
    """Sends one kind of work to one server for a while."""

    def __init__(self, server: Server, work: Work, seconds: float, bare: bool) -> None:
        self._server, self._work, self._seconds = server, work, seconds
        self._path = f"{{}}/{work.reply_size}" if bare else "/rewardserve.v1.Scoring/{}"
        self._bare = bare
        self._latencies: list[float] = []

    async def unary(self, in_flight: int = IN_FLIGHT) -> Sample:
        """Closed loop: `in_flight` callers, each with one call under way."""
        path = self._path.format("/unary" if self._bare else "Score")
        calls = [channel.unary_unary(path) for channel in self._server.channels]
        stop_at = time.perf_counter() + self._seconds

        async def caller(number: int) -> None:
            call, request, append = calls[number % len(calls)], self._work.request, self._latencies.append
            while (sent := time.perf_counter()) < stop_at:
                reply = await call(request, timeout=DEADLINE_S)
                append(time.perf_counter() - sent)
            self._check(reply)

        return await self._timed(asyncio.gather(*map(caller, range(in_flight))))

    async def stream(self, in_flight: int = IN_FLIGHT) -> Sample:
        """One stream per channel, together with `in_flight` requests under way."""
        path = self._path.format("/stream" if self._bare else "ScoreStream")
        share = in_flight // len(self._server.channels)

        async def one(channel: grpc.aio.Channel) -> None:
            call = channel.stream_stream(path)(timeout=DEADLINE_S)
            sent_at: list[float] = []
            for _ in range(share):
                sent_at.append(time.perf_counter())
                await call.write(self._work.request)
            stop_at = time.perf_counter() + self._seconds
            answered = 0
            while answered < len(sent_at):
                reply = await call.read()
                now = time.perf_counter()
                self._latencies.append(now - sent_at[answered])
                answered += 1
                if now < stop_at:
                    sent_at.append(now)
                    await call.write(self._work.request)
            self._check(reply)
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF

        return await self._timed(asyncio.gather(*map(one, self._server.channels)))

    async def open(self, calls_per_s: float) -> Sample:
        """Open loop: Poisson arrivals, timed from when each was due. Metrics are scraped ten times meanwhile."""
        calls = [channel.unary_unary(self._path.format("Score")) for channel in self._server.channels]
        arrivals = random.Random(0)
        began = time.perf_counter()

        async def caller(due: float, number: int) -> None:
            self._check(await calls[number % len(calls)](self._work.request, timeout=DEADLINE_S))
            self._latencies.append(time.perf_counter() - due)

        async def all_calls() -> None:
            tasks, due = [], began
            while (due := due + arrivals.expovariate(calls_per_s)) < began + self._seconds:
                if (pause := due - time.perf_counter()) > 0:
                    await asyncio.sleep(pause)
                tasks.append(asyncio.create_task(caller(due, len(tasks))))
            await asyncio.gather(*tasks)

        async def scrapes() -> None:
            for _ in range(10):
                await asyncio.sleep(self._seconds / 10)
                await asyncio.to_thread(_scrape, self._server.metrics_port)

        return await self._timed(asyncio.gather(all_calls(), scrapes()))

    def _check(self, reply: bytes) -> None:
        """The reply has all its scores; they are not looked at, for that would cost the generator."""
        if len(reply) < self._work.reply_size - 20:  # timings of zero take no bytes
            raise SystemExit(f"a reply of {len(reply)} bytes where {self._work.reply_size} were expected")

    async def _timed(self, work: Awaitable[object]) -> Sample:
        front, engine = self._server.cpu_s()
        busy, mine, began = _busy_s(), time.process_time(), time.perf_counter()
        await work
        seconds, mine, busy = time.perf_counter() - began, time.process_time() - mine, _busy_s() - busy
        front_after, engine_after = self._server.cpu_s()
        ours = front_after - front + engine_after - engine + mine
        count = len(self._latencies)
        ordered = sorted(self._latencies)
        return Sample(
            calls_per_s=count / seconds,
            pairs_per_s=self._work.num_pairs * count / seconds,
            p50_ms=1e3 * ordered[count // 2],
            p99_ms=1e3 * ordered[int(0.99 * (count - 1))],
            server_us=1e6 * (front_after - front) / count,
            engine_us=1e6 * (engine_after - engine) / count,
            generator_us=1e6 * mine / count,
            others_percent=100 * max(0.0, busy - ours) / seconds / len(os.sched_getaffinity(0)),
        )


def _busy_s() -> float:
    """Seconds that the cores given to us have worked so far, for anybody."""
    times = psutil.cpu_times(percpu=True)
    return sum(sum(times[core]) - times[core].idle - times[core].iowait for core in os.sched_getaffinity(0))


def _scrape(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as reply:
        return reply.read()


# -- the measurement ---------------------------------------------------------------------------------------------------


async def _measure(options: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(_running(name)) for name in SERVERS}
        for server in servers.values():
            # One connection per channel: channels to the same address share one otherwise.
            channel_options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
            server.channels = [
                grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", channel_options) for _ in range(NUM_CHANNELS)
            ]
        group = await _sized(servers["fake"], GROUP_SIZE)
        single = await _sized(servers["fake"], 1)
        samples: dict[str, list[Sample]] = {}
        plan = [
            (f"{server} {name}", server, kind)
            for server in servers
            for name, kind in _kinds(group, single)
            if options.only in f"{server} {name}."
        ]
        patience = options.patience
        for _ in tqdm(range(options.rounds), desc="rounds"):
            for name, server, (work, run) in plan:
                sample = await run(Load(servers[server], work, options.seconds, bare=server == "echo"))
                while sample.others_percent > DISTURBED_PERCENT and patience > 0:
                    patience -= options.seconds
                    sample = await run(Load(servers[server], work, options.seconds, bare=server == "echo"))
                samples.setdefault(name, []).append(sample)
        medians = {name: _median(found) for name, found in samples.items()}
        if options.open_seconds and "fake group" in medians:
            for percent in (50, 80):
                rate = percent / 100 * medians["fake group"].calls_per_s
                load = Load(servers["fake"], group, options.open_seconds, bare=False)
                medians[f"fake group open loop {percent} %"] = await load.open(rate)
        for server in servers.values():
            await asyncio.gather(*(channel.close() for channel in server.channels))
    _print(medians)
    if not options.only:
        _write(medians, samples, options, group, single)


def _kinds(group: Work, single: Work) -> list[tuple[str, tuple[Work, Callable[[Load], Awaitable[Sample]]]]]:
    return [
        ("group", (group, Load.unary)),
        ("single", (single, Load.unary)),
        ("group stream", (group, Load.stream)),
        ("single idle", (single, lambda load: load.unary(in_flight=1))),
    ]


async def _sized(server: Server, num_responses: int) -> Work:
    request = _message(num_responses)
    reply = await server.channels[0].unary_unary("/rewardserve.v1.Scoring/Score")(request)
    scored = scoring_pb2.ScoreResponse.FromString(reply)
    if [len(g.items) for g in scored.groups] != [num_responses] or not scored.groups[0].items[-1].HasField("score"):
        raise SystemExit(f"not scored: {scored}")
    return Work(request, num_responses, len(reply))


def _median(samples: list[Sample]) -> Sample:
    return Sample(*(statistics.median(values) for values in zip(*(vars(s).values() for s in samples), strict=True)))


def _print(medians: dict[str, Sample]) -> None:
    head = f"{'':26}{'calls/s':>9}{'pairs/s':>9}{'p50 ms':>9}{'p99 ms':>9}"
    print(f"\n{head}   CPU us/call: front  engine  generator  others %")
    for name, sample in medians.items():
        print(
            f"{name:26}{sample.calls_per_s:9.0f}{sample.pairs_per_s:9.0f}{sample.p50_ms:9.2f}{sample.p99_ms:9.2f}"
            f"{sample.server_us:21.0f}{sample.engine_us:8.0f}{sample.generator_us:11.0f}"
            f"{sample.others_percent:10.0f}"
        )


def _write(
    medians: dict[str, Sample], samples: dict[str, list[Sample]], options: argparse.Namespace, *work: Work
) -> None:
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "git": git.stdout.strip(),
        "machine": {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "rounds": options.rounds,
        "in_flight": IN_FLIGHT,
        "requests": [{"bytes": len(w.request), "reply_bytes": w.reply_size, "pairs": w.num_pairs} for w in work],
        "measured": {
            name: {
                **{key: round(value, 3) for key, value in vars(sample).items()},
                "calls_per_s_of_rounds": [round(s.calls_per_s, 1) for s in samples.get(name, [])],
            }
            for name, sample in medians.items()
        },
    }
    path = ROOT / "benchmarks" / "results" / "front_cpu.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT)}")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
