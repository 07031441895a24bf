"""`rewardserve bench`: how fast a server answers, against how much it is asked.

A sweep finds the capacity with a closed loop, then offers shares of it with an open loop (Poisson arrivals), and prints
the curve. Single loads are measured by --mode open --rate and --mode closed --concurrency.

Exit codes: 0; 1 if nothing could be measured; 2 for wrong usage; 130 after Ctrl-C, with what was measured until then.
"""

import asyncio
import contextlib
import difflib
import os
import selectors
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict as SettingsConfig
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from rewardserve.cli.rows import open_input, read_rows
from rewardserve.cli.running import DEFAULT_ENDPOINT, MAX_TIMEOUT_S, connect, counted, guarded
from rewardserve.cli.table import TABLE, make_console, one_line
from rewardserve.client import ModelInfo, RewardClientError, TokenIds
from rewardserve.loadtest import loadgen, picture, report, sweep, workloads
from rewardserve.loadtest.loadgen import Bounds, ClientSender, ClosedLoop, Load, OpenLoop, Progress, Requests, Run, Send
from rewardserve.loadtest.report import Figures, Report
from rewardserve.loadtest.workloads import Traffic, Workload
from rewardserve.options import ConfigError, Options, Repeated, load_options

MANY_GROUPS = 64
DESCRIBE_TIMEOUT_S = 10.0
WORKLOADS = ", ".join(workloads.names())


class BenchOptions(Options):
    """Measures a server: latency against load, by open and closed loop, with warm and cold prefixes."""

    model_config = SettingsConfig(cli_shortcuts={"endpoint": "target", "name": "model"})

    endpoint: Repeated = Field(default=[], description=f"server to measure [{DEFAULT_ENDPOINT}]")
    name: str = Field(
        default="", description="model to ask for, by the name it is served by; needed if there are several"
    )
    workload: str = Field(
        default="short_items", description=f"{WORKLOADS}; or a JSONL file with rows as for `score`; - for stdin"
    )
    data: str = Field(default="", description="folder of candidates.jsonl.gz and harmless_pairs.jsonl.gz: real text")
    groups: int = Field(
        default=0, ge=0, description=f"different groups to send, over and over; 0: {MANY_GROUPS}, or all of a file"
    )
    scale: int = Field(default=1, ge=1, description="divides the lengths and the size of grpo_64")
    groups_per_request: int = Field(default=1, ge=1, description="groups in one request")
    warm: bool = Field(default=False, description="send the same prompts again: the prefix cache has them all")
    cold_fraction: float = Field(
        default=1.0, ge=0, le=1, description="share of the requests whose prompts no cache has seen"
    )
    mode: Literal["sweep", "open", "closed"] = Field(
        default="sweep",
        description="open: arrivals at --rate; closed: --concurrency callers; sweep: first closed, "
        "to find the capacity, then open at --shares of it",
    )
    rate: Repeated = Field(default=[], description="open: requests per second; repeat for a curve")
    concurrency: Repeated = Field(
        default=[],
        description="callers that wait for their answers; repeat for a curve [16; for a sweep "
        f"{', '.join(map(str, sweep.CALLERS))}, as long as more bring more]",
    )
    shares: Repeated = Field(
        default=[],
        description="sweep: shares of the capacity, in percent "
        f"[{', '.join(f'{share * 100:g}' for share in sweep.SHARES)}]",
    )
    duration: float = Field(default=10.0, gt=0, allow_inf_nan=False, description="seconds of each load")
    max_requests: int = Field(default=1_000_000, ge=1, description="most requests of each load")
    warm_up: float = Field(
        default=5.0, gt=0, allow_inf_nan=False, description="seconds at most to send everything once before measuring"
    )
    overflow: Literal["error", "truncate-prompt-left", "truncate-response-right"] = Field(
        default="error", description="what to do with prompt + response longer than the model takes"
    )
    timeout: float = Field(
        default=60.0, gt=0, le=MAX_TIMEOUT_S, description="seconds a request may take; it is not tried again"
    )
    seed: int = Field(default=0, description="of the workload, the arrivals, and which requests are cold")
    out: str = Field(default="", description="write a row for each load: JSON, or to add to it, FILE.csv")
    picture: str = Field(
        default="", description="draw latency against load: FILE.png, .svg or .pdf; needs the extra `bench`"
    )

    def check(self) -> None:
        """Raises ConfigError for what cannot be done; all of it before anything is measured."""
        self.require(not self.rate or self.mode == "open", "--rate goes with --mode open")
        self.require(bool(self.rate) or self.mode != "open", "--mode open needs --rate: how many requests per second?")
        self.require(not self.concurrency or self.mode != "open", "--concurrency goes with --mode closed or sweep")
        self.require(not self.shares or self.mode == "sweep", "--shares goes with --mode sweep")
        both = self.warm and "cold_fraction" in self.model_fields_set
        self.require(not both, "--warm is --cold-fraction 0: give one of them")
        self.require(self.scale == 1 or self.workload == "grpo_64", "--scale goes with --workload grpo_64")
        made = self.workload in workloads.names()
        self.require(not self.data or made, "--data goes with workloads that have a name, not with a file")
        self.loads, self.percents  # noqa: B018 (raise for what is no number)
        self._check_files()

    def _check_files(self) -> None:
        for path in filter(None, (self.out, self.picture)):
            folder = Path(path).absolute().parent
            self.require(folder.is_dir() and os.access(folder, os.W_OK), f"{path}: {folder} is no folder to write to")
        if Path(self.out).suffix == ".csv":
            self.require(report.can_append(Path(self.out)), f"--out {self.out} has other columns; choose another file")
        if self.picture:
            known = Path(self.picture).suffix in picture.FORMATS
            self.require(known, f"--picture {self.picture}: its name ends in one of {', '.join(picture.FORMATS)}")
            there = find_spec("matplotlib") is not None
            self.require(there, "--picture needs matplotlib: pip install 'rewardserve[bench]'; or leave --picture out")

    @property
    def cold_share(self) -> float:
        return 0.0 if self.warm else self.cold_fraction

    @property
    def callers(self) -> list[int]:
        return [int(number) for number in _numbers("concurrency", self.concurrency, whole=True)]

    @property
    def loads(self) -> list[Load]:
        """Those of --mode open and closed."""
        if self.mode == "open":
            return [OpenLoop(rate, self.seed) for rate in _numbers("rate", self.rate)]
        return [ClosedLoop(number) for number in self.callers or [16]]

    @property
    def percents(self) -> list[float]:
        return [percent / 100 for percent in _numbers("shares", self.shares)] or list(sweep.SHARES)


def _numbers(option: str, values: Sequence[str], whole: bool = False) -> list[float]:
    """Raises ConfigError for what is no positive number."""
    words = [word.strip() for value in values for word in value.split(",")]
    try:
        numbers = [float(int(word)) if whole else float(word) for word in words]
    except ValueError:
        numbers = [0.0]
    if not all(0 < number < float("inf") for number in numbers):
        raise ConfigError(f"--{option}: {', '.join(words)}: these are {'whole ' * whole}numbers above 0")
    return numbers


def run(arguments: Sequence[str]) -> int:
    return guarded("bench", lambda: _bench(load_options(BenchOptions, "bench", arguments)))


def _bench(options: BenchOptions) -> int:
    options.check()
    with asyncio.Runner(loop_factory=_punctual_loop) as runner:
        return runner.run(_measure(options))


def _punctual_loop() -> asyncio.AbstractEventLoop:
    """select() wakes 0.1 ms late at the median; epoll, told whole milliseconds, 0.6 ms, a part of each latency."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


async def _measure(options: BenchOptions) -> int:
    async with connect(options.endpoint, options.timeout) as client:
        model = await client.get_model(options.name, timeout=min(options.timeout, DESCRIBE_TIMEOUT_S))
    workload = _workload(options, model)
    requests = Requests(workload, options.groups_per_request, options.cold_share, options.seed)
    sender = ClientSender(options.endpoint or DEFAULT_ENDPOINT, model.name, _overflow(options), options.timeout)
    with _ctrl_c() as stop:
        bench = Bench(options, requests, sender, stop)
        try:
            await bench.warm_up()
            await bench.measure()
        finally:
            await sender.close()
    result = _report(options, model, workload, len(requests), bench)
    _show(result, workload, bench.examples)
    _write(options, result)
    return 130 if stop.is_set() else 0 if any(run.num_answered for run in result.runs) else 1


def _overflow(options: BenchOptions) -> Literal["error", "truncate_prompt_left", "truncate_response_right"]:
    return options.overflow.replace("-", "_")  # type: ignore[return-value]


@contextlib.contextmanager
def _ctrl_c() -> Iterator[asyncio.Event]:
    """Set by the first Ctrl-C; the second one ends the program."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def first() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    try:
        loop.add_signal_handler(signal.SIGINT, first)
    except (ValueError, RuntimeError, NotImplementedError):  # not the main thread, or not a Unix
        yield stop
        return
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)


# -- what is sent ------------------------------------------------------------------------------------------------------


def _workload(options: BenchOptions, model: ModelInfo) -> Workload:
    """Raises ConfigError if there is none, or none that this model takes."""
    if model.state == "loading":
        raise RewardClientError(f"'{model.name}' is still loading; `rewardserve models` says when it is serving")
    made = _made_workload(options, model) if options.workload in workloads.names() else _file_workload(options)
    if not model.has_tokenizer and any(not isinstance(group.prompt, TokenIds) for group in made.groups):
        ids = ", ".join(name for name in workloads.names() if not workloads.needs_data(name))
        raise ConfigError(f"'{model.name}' has no tokenizer and takes token ids only; choose --workload {ids}")
    return made


def _made_workload(options: BenchOptions, model: ModelInfo) -> Workload:
    data = Path(options.data) if options.data else None
    traffic = Traffic(options.groups or MANY_GROUPS, options.seed, data, model.vocab_size, options.scale)
    try:
        return workloads.make(options.workload, traffic)
    except (workloads.NoData, ValueError) as error:
        raise ConfigError(f"--workload {options.workload}: {error}") from None


def _file_workload(options: BenchOptions) -> Workload:
    if options.workload != "-" and not os.path.exists(options.workload):
        close = difflib.get_close_matches(options.workload, workloads.names(), n=1)
        near = f"did you mean '{close[0]}'?" if close else f"there are {WORKLOADS}"
        raise ConfigError(f"--workload {options.workload}: no such workload, and no such file; {near}")
    with open_input(options.workload) as lines:
        groups = tuple(read_rows(lines))
    if not groups:
        raise ConfigError(f"--workload {options.workload}: there is no row in it")
    taken = groups[: options.groups or None]
    said = f"the {counted(len(groups), 'row')}" if len(taken) == len(groups) else f"{len(taken)} of {len(groups)} rows"
    return Workload(options.workload, f"{said} of a file", taken)


# -- the measurement ---------------------------------------------------------------------------------------------------


class Bench:
    """One server under one load after the other, with a bar of how it goes."""

    def __init__(self, options: BenchOptions, requests: Requests, send: Send, stop: asyncio.Event) -> None:
        self._options, self._requests, self._send, self._stop = options, requests, send, stop
        self._bounds = Bounds(options.duration, options.max_requests)
        self.runs: list[Figures] = []
        self.capacity: float | None = None  # requests per second
        self.examples: dict[str, str] = {}  # by status, the first message of it

    async def warm_up(self) -> None:
        """Raises RewardClientError where not one request was answered: then there is nothing to measure."""
        within_s = self._options.warm_up
        with _Bar("warm-up", within_s) as bar:
            seen = await loadgen.warm_up(self._requests, self._send, within_s, self._stop, bar.show)
        if not seen.num_answered and not self._stop.is_set():
            failure = next(iter(seen.failures.values()))
            advice = "; see --overflow, or choose another --workload" if "OUT_OF_RANGE" in seen.failures else ""
            raise RewardClientError(f"none of {seen.num_failed} requests was answered: {failure.example}{advice}")

    async def measure(self) -> None:
        if self._stop.is_set():  # in the warm-up
            return
        if self._options.mode == "sweep":
            await self._sweep()
            return
        for load in self._options.loads:
            if not self._stop.is_set():
                await self._one(load)

    async def _sweep(self) -> None:
        found = await sweep.find_capacity(self._one, self._options.callers or sweep.CALLERS)
        self.capacity = sweep.capacity(found) or None
        if self.capacity and not self._stop.is_set():
            await sweep.offer_shares(self._one, self.capacity, self._options.percents, self._options.seed)

    async def _one(self, load: Load, share: float | None = None) -> Run:
        with _Bar(_name_of(load, share), self._bounds.duration_s) as bar:
            run = await loadgen.measure(self._requests, self._send, load, self._bounds, self._stop, bar.show)
        self.runs.append(report.figures(run, share))
        for status, failure in run.failures.items():
            self.examples.setdefault(status, one_line(failure.example))
        return run


class _Bar:
    """Seconds of one load, where stderr is a terminal."""

    def __init__(self, name: str, duration_s: float) -> None:
        self._name, self._duration_s = name, duration_s
        layout = "{percentage:3.0f}%|{bar}| {desc}"
        self._bar = tqdm(total=duration_s, file=sys.stderr, disable=None, leave=False, bar_format=layout, desc=name)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()

    def show(self, progress: Progress) -> None:
        if not self._bar.disable:
            failed = f", {progress.num_failed} failed" if progress.num_failed else ""
            counts = f"{progress.num_answered} answered{failed}, {progress.num_in_flight} in flight"
            self._bar.n = min(progress.elapsed_s, self._duration_s)
            self._bar.set_description_str(f"{self._name}: {counts}")


def _name_of(load: Load, share: float | None) -> str:
    if isinstance(load, ClosedLoop):
        return f"closed, {counted(load.num_callers, 'caller')}"
    return f"open, {load.requests_per_s:.3g} requests/s" + (f" ({share:.0%} of capacity)" if share else "")


# -- what is shown and written -----------------------------------------------------------------------------------------


def _report(options: BenchOptions, model: ModelInfo, workload: Workload, num_requests: int, bench: Bench) -> Report:
    about = report.circumstances(
        model,
        workload=Path(workload.name).name,
        num_groups=len(workload.groups),
        pairs_per_request=workload.num_pairs / num_requests,  # the last may have fewer groups than were asked for
        groups_per_request=options.groups_per_request,
        cold_fraction=options.cold_share,
        seed=options.seed,
    )
    return Report(about, tuple(bench.runs), bench.capacity)


def _show(result: Report, workload: Workload, examples: Mapping[str, str]) -> None:
    console = make_console()
    print_line = partial(console.print, soft_wrap=True)
    about = result.circumstances
    prefixes = report.prefixes(about.cold_fraction)
    print_line(Text(f"{about.model} {about.model_version} at {about.endpoint}: {workload.description}; {prefixes}"))
    if result.runs:
        console.print(_table(result.runs))
        print_line()
    if picture.curve(result):
        print_line(picture.terminal_picture(result, min(console.width, 100), console.encoding))
    print_line()
    for line in (*report.verdict(result), *report.remarks(result, examples)):
        print_line(Text(line))


def _table(runs: Sequence[Figures]) -> Table:
    table = Table(**TABLE)
    table.add_column("load", no_wrap=True)
    for column in ("req/s", "pairs/s", "p50 ms", "p90", "p99", "p99/p50", "failed", "cached"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        latencies = (run.p50_ms, run.p90_ms, run.p99_ms)
        figures = (run.requests_per_s, run.pairs_per_s, *latencies, run.p99_over_p50)
        failed = Text(str(run.num_failed), "bold red" if run.num_failed else "")
        cached = "-" if run.cached_share is None else f"{run.cached_share:.0%}"
        table.add_row(report.load_of(run), *map(report.figure_of, figures), failed, cached)
    return table


def _write(options: BenchOptions, result: Report) -> None:
    written = []
    if options.out and result.runs:
        report.write_rows(result, Path(options.out))
        written.append(options.out)
    if options.picture and picture.curve(result):
        picture.draw(result, Path(options.picture))
        written.append(options.picture)
    if written:
        print(f"wrote {' and '.join(written)}", file=sys.stderr)
