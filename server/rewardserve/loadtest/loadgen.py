"""Offers a load and measures what becomes of every request.

Open loop: requests arrive when the schedule says, whatever became of those before. Closed loop: so many callers, each
sends its next request when the last one was answered. A latency counts from the moment the schedule had set, not from
the moment the request left, so that neither a slow server nor a slow generator can hide the queue before it.

One request with its reply costs the generator 0.2 to 0.35 ms of one core, two thirds of it in grpc.aio and nearly all
the rest in the client; `Run.lags_s` says how late it was, and `fell_behind` whether that matters.
"""

import asyncio
import contextlib
import gc
import itertools
import math
import random
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rewardserve.client import AsyncRewardClient, Group, RetryPolicy, RewardClientError, ScoreResult
from rewardserve.client.types import Overflow
from rewardserve.loadtest.workloads import Workload, cold

OK = "OK"
NOT_SENT = "NOT_SENT"  # too many were in flight already
INTERRUPTED = "INTERRUPTED"  # in flight when the run was stopped
WARM_UP_CALLERS = 8
TICK_S = 0.25  # between two reports of progress


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Poisson arrivals."""

    requests_per_s: float
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    num_callers: int


Load = OpenLoop | ClosedLoop


@dataclass(frozen=True, slots=True)
class Bounds:
    """A run ends with whichever comes first; what is in flight then is waited for."""

    duration_s: float
    max_requests: int = 1_000_000
    max_in_flight: int = 10_000  # arrivals beyond are counted as NOT_SENT


@dataclass(frozen=True, slots=True)
class Reply:
    """What a caller got for one request. Without `status` OK nothing but `message` is read."""

    status: str  # OK, a gRPC status, or the name of the client's error that has none
    message: str = ""
    num_pairs: int = 0
    num_tokens: int = 0  # each prompt counted once
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompts'


Send = Callable[[Sequence[Group]], Awaitable[Reply]]


@dataclass(frozen=True, slots=True)
class Failure:
    count: int
    example: str  # the message of the first


@dataclass(frozen=True, slots=True)
class Progress:
    elapsed_s: float
    num_answered: int
    num_failed: int
    num_in_flight: int


@dataclass(frozen=True, slots=True)
class Run:
    """One load, measured. Times are in seconds; what failed is in `failures` and nowhere else."""

    load: Load
    duration_s: float  # how long requests were sent
    latencies_s: Sequence[float]  # of the requests answered, from their scheduled moment, ascending
    lags_s: Sequence[float]  # from the scheduled moment to the generator's sending it, ascending
    failures: Mapping[str, Failure]  # by status
    requests_per_s: float  # answered; one under way at the end of the run counts by its share
    pairs_per_s: float
    tokens_per_s: float
    num_pairs: int
    num_prompt_tokens: int
    num_cached_tokens: int
    interrupted: bool

    @property
    def num_answered(self) -> int:
        return len(self.latencies_s)

    @property
    def num_failed(self) -> int:
        return sum(failure.count for failure in self.failures.values())


class Requests:
    """The requests of a workload, without end: as they are (warm), or under a beginning never sent before (cold)."""

    def __init__(
        self,
        workload: Workload,
        groups_per_request: int = 1,
        cold_fraction: float = 0.0,
        seed: int = 0,
        first_salt: int | None = None,  # None: another one for every generator, for the server remembers the last one's
    ) -> None:
        groups = workload.groups
        self._shares = [groups[i : i + groups_per_request] for i in range(0, len(groups), groups_per_request)]
        self._upcoming = itertools.cycle(self._shares)
        self._cold_fraction = cold_fraction
        self._rng = random.Random(seed)
        self._salts = itertools.count(random.SystemRandom().getrandbits(22) if first_salt is None else first_salt)

    def __len__(self) -> int:
        """How many there are before the first comes again."""
        return len(self._shares)

    def __next__(self) -> Sequence[Group]:
        groups = next(self._upcoming)
        if self._cold_fraction and self._rng.random() < self._cold_fraction:
            salt = next(self._salts)
            return [cold(group, salt) for group in groups]
        return groups


class ClientSender:
    """Sends through the client a user has. It does not try again: a refusal is a result."""

    def __init__(self, endpoints: str | Sequence[str], model: str, overflow: Overflow, timeout_s: float) -> None:
        self._client = AsyncRewardClient(endpoints, timeout=timeout_s, retry=RetryPolicy(max_attempts=1))
        self._model, self._overflow = model, overflow
        self._version = ""

    async def __call__(self, groups: Sequence[Group]) -> Reply:
        try:
            result = await self._client.score(groups, model=self._model, overflow=self._overflow)
        except RewardClientError as error:
            return Reply(error.code.name if error.code is not None else type(error).__name__, str(error))
        self._version = self._version or result.model_version
        if result.model_version != self._version:
            return Reply("VERSION_CHANGED", f"from {self._version} to {result.model_version} during the measurement")
        return _reply(result)

    async def close(self) -> None:
        await self._client.close()


def _reply(result: ScoreResult) -> Reply:
    """A request of which any item failed has failed: it did less work than the others."""
    num_pairs = num_tokens = num_prompt_tokens = num_cached_tokens = 0
    for group in result.groups:
        for item in group.items:
            if not item.ok:
                return Reply(item.status.code.name, item.status.message)
            num_tokens += item.num_response_tokens
        if group.items:
            num_pairs += len(group.items)
            num_prompt_tokens += group.items[0].num_prompt_tokens
            num_cached_tokens += group.items[0].num_cached_tokens
    return Reply(OK, "", num_pairs, num_tokens + num_prompt_tokens, num_prompt_tokens, num_cached_tokens)


def arrivals(load: OpenLoop) -> Iterator[float]:
    """Seconds from the start of the run, without end: the same for the same seed."""
    rng = random.Random(load.seed)
    due_s = 0.0
    while True:
        due_s += rng.expovariate(load.requests_per_s)
        yield due_s


def fell_behind(run: Run) -> bool:
    """Whether the generator's own lateness is a part of the latencies that cannot be overlooked."""
    if not run.lags_s or not run.latencies_s:
        return False
    return percentile(run.lags_s, 0.99) > max(0.002, 0.1 * percentile(run.latencies_s, 0.99))


def percentile(ascending: Sequence[float], share: float) -> float:
    """The nearest rank: a value that was seen, at or above `share` of all."""
    return ascending[max(0, math.ceil(share * len(ascending)) - 1)]


def ignore(progress: Progress) -> None:
    """Nobody watches."""


async def warm_up(
    requests: Requests,
    send: Send,
    within_s: float,
    stop: asyncio.Event | None = None,
    on_progress: Callable[[Progress], None] = ignore,
) -> Run:
    """Every request once, as far as the time goes: connections are open, and warm prompts known to the server."""
    load = ClosedLoop(min(WARM_UP_CALLERS, len(requests)))
    return await measure(requests, send, load, Bounds(within_s, max_requests=len(requests)), stop, on_progress)


async def measure(
    requests: Requests,
    send: Send,
    load: Load,
    bounds: Bounds,
    stop: asyncio.Event | None = None,
    on_progress: Callable[[Progress], None] = ignore,
) -> Run:
    """Ends early once `stop` is set; what was in flight is then counted as INTERRUPTED."""
    stopped = asyncio.create_task((stop or asyncio.Event()).wait())
    with _no_old_garbage():
        recorder = _Recorder(requests, send)
        work = asyncio.create_task(_offer(recorder, load, bounds))
        try:
            while not work.done() and not stopped.done():
                await asyncio.wait({work, stopped}, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
                on_progress(recorder.progress())
        finally:
            interrupted = not work.done()
            for task in (work, stopped):
                task.cancel()
            await asyncio.wait({work, stopped})
    if not work.cancelled():
        work.result()  # a mistake of ours is raised, not counted
    return recorder.run(load, bounds, interrupted)


async def _offer(recorder: "_Recorder", load: Load, bounds: Bounds) -> None:
    match load:
        case OpenLoop():
            await _offer_open(recorder, load, bounds)
        case ClosedLoop():
            await _offer_closed(recorder, load, bounds)


async def _offer_open(recorder: "_Recorder", load: OpenLoop, bounds: Bounds) -> None:
    async with asyncio.TaskGroup() as in_flight:
        for due_s in itertools.islice(arrivals(load), bounds.max_requests):
            if due_s >= bounds.duration_s:
                break
            scheduled_s = recorder.started_s + due_s
            await asyncio.sleep(max(0.0, scheduled_s - time.monotonic()))  # late or not, the replies get their turn
            if recorder.num_in_flight >= bounds.max_in_flight:
                recorder.fail(NOT_SENT, f"{bounds.max_in_flight} requests were in flight already")
            else:
                recorder.num_sent += 1
                in_flight.create_task(recorder.one(scheduled_s))


async def _offer_closed(recorder: "_Recorder", load: ClosedLoop, bounds: Bounds) -> None:
    end_s = recorder.started_s + bounds.duration_s
    left = itertools.count(bounds.max_requests, -1)

    async def call() -> None:
        while (now_s := time.monotonic()) < end_s and next(left) > 0:
            recorder.num_sent += 1
            await recorder.one(now_s)

    async with asyncio.TaskGroup() as callers:
        for _ in range(load.num_callers):
            callers.create_task(call())


@contextlib.contextmanager
def _no_old_garbage() -> Iterator[None]:
    """What is there already is not searched for garbage while latencies are taken; that takes milliseconds."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass(slots=True)
class _Recorder:
    """Sends requests and keeps their times. Columns, not objects: a million rows must not make the generator slow."""

    requests: Requests
    send: Send
    started_s: float = field(default_factory=time.monotonic)
    num_sent: int = 0
    num_in_flight: int = 0
    scheduled_s: "array[float]" = field(default_factory=lambda: array("d"))  # of those answered, as the next three
    sent_s: "array[float]" = field(default_factory=lambda: array("d"))
    done_s: "array[float]" = field(default_factory=lambda: array("d"))
    num_pairs: "array[int]" = field(default_factory=lambda: array("q"))
    num_tokens: "array[int]" = field(default_factory=lambda: array("q"))
    lags_s: "array[float]" = field(default_factory=lambda: array("d"))  # of all that were sent
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    failures: dict[str, Failure] = field(default_factory=dict)

    async def one(self, scheduled_s: float) -> None:
        groups = next(self.requests)
        sent_s = time.monotonic()
        self.lags_s.append(sent_s - scheduled_s)
        self.num_in_flight += 1
        try:
            reply = await self.send(groups)
        finally:
            self.num_in_flight -= 1
        if reply.status == OK:
            self._answered(scheduled_s, sent_s, time.monotonic(), reply)
        else:
            self.fail(reply.status, reply.message)

    def fail(self, status: str, message: str) -> None:
        before = self.failures.get(status, Failure(0, message))
        self.failures[status] = Failure(before.count + 1, before.example)

    def _answered(self, scheduled_s: float, sent_s: float, done_s: float, reply: Reply) -> None:
        self.scheduled_s.append(scheduled_s)
        self.sent_s.append(sent_s)
        self.done_s.append(done_s)
        self.num_pairs.append(reply.num_pairs)
        self.num_tokens.append(reply.num_tokens)
        self.num_prompt_tokens += reply.num_prompt_tokens
        self.num_cached_tokens += reply.num_cached_tokens

    def progress(self) -> Progress:
        num_failed = sum(failure.count for failure in self.failures.values())
        return Progress(time.monotonic() - self.started_s, len(self.done_s), num_failed, self.num_in_flight)

    def run(self, load: Load, bounds: Bounds, interrupted: bool) -> Run:
        elapsed_s = time.monotonic() - self.started_s
        num_failed = sum(failure.count for status, failure in self.failures.items() if status != NOT_SENT)
        if lost := self.num_sent - len(self.done_s) - num_failed:
            self.failures[INTERRUPTED] = Failure(lost, "in flight when the run was stopped")
        # What ended by the number of requests, or was stopped, lasted as long as it took.
        short = interrupted or self.num_sent >= bounds.max_requests
        duration_s = min(bounds.duration_s, elapsed_s) if short else bounds.duration_s
        shares = self._shares(self.started_s + duration_s)
        return Run(
            load=load,
            duration_s=duration_s,
            latencies_s=sorted(done - due for due, done in zip(self.scheduled_s, self.done_s, strict=True)),
            lags_s=sorted(self.lags_s),
            failures=dict(self.failures),
            requests_per_s=sum(shares) / duration_s,
            pairs_per_s=_dot(shares, self.num_pairs) / duration_s,
            tokens_per_s=_dot(shares, self.num_tokens) / duration_s,
            num_pairs=sum(self.num_pairs),
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            interrupted=interrupted,
        )

    def _shares(self, end_s: float) -> list[float]:
        """How much of each request fell into the run. Whole requests would count none where each outlasts the run."""
        times = zip(self.sent_s, self.done_s, strict=True)
        return [max(0.0, min(1.0, (end_s - sent) / max(done - sent, 1e-9))) for sent, done in times]


def _dot(shares: Sequence[float], numbers: Sequence[int]) -> float:
    return sum(share * number for share, number in zip(shares, numbers, strict=True))
