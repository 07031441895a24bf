"""The journey of a request through vLLM: what is fair goes in first, what was dropped is aborted, scores come back.

vLLM takes whole sequences and plans its own batches; it knows neither groups, nor deadlines, nor clients. So requests
wait here, in the native engine's queue, and vLLM holds no more than a few batches at a time. Loads neither vLLM nor
torch: the model is given (vllm_models.py, or a pretended one in tests).
"""

import asyncio
import itertools
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from rewardserve.engine.base import (
    BatchReport,
    EngineGroup,
    EngineInfo,
    EngineItem,
    EngineRequest,
    EngineResult,
    Outcome,
)
from rewardserve.engine.native.fair_queue import FairQueue
from rewardserve.errors import LoadFailed
from rewardserve.types import EncodedGroup, ItemCode, ItemFailure

log = logging.getLogger(__name__)

# As much lies in vLLM for it to plan from. Prompts it finds cached cost it nothing but are counted here, hence so many.
BATCHES_AHEAD = 8
WATCH_INTERVAL_S = 1.0


class ModelGone(RuntimeError):
    """vLLM's own processes have died; only a new engine process can go on."""


class ItemFailed(Exception):
    """One sequence cannot be scored."""

    def __init__(self, failure: ItemFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(frozen=True, slots=True)
class Scored:
    score: float
    num_cached_tokens: int
    attributes: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One forward, as vLLM tells of it."""

    num_tokens: int
    compute_s: float
    queued_s: dict[str, float]  # of the items that it ended: seconds between their coming and their first forward


class Model(Protocol):
    info: EngineInfo
    max_batch_tokens: int
    max_batch_sequences: int

    async def score(self, item_id: str, token_ids: list[int], priority: int) -> Scored:
        """Raises ItemFailed or ModelGone. Cancelling it aborts the item, wherever it is."""

    async def ping(self) -> None:
        """Ends when what computes has come by."""

    @property
    def is_gone(self) -> bool: ...


@dataclass(slots=True, eq=False)
class _Job:
    request: EngineRequest
    received_at: float
    started_at: float = math.inf
    groups: list["_Group"] = field(default_factory=list)
    num_waiting: int = 0  # groups of which something is still in the queue
    num_unfinished: int = 0  # groups
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    expiry: asyncio.TimerHandle | None = None


@dataclass(slots=True, eq=False)
class _Group:
    job: _Job
    encoded: EncodedGroup
    items: list[EngineItem | None]
    num_unfinished: int
    num_sent: int = 0
    num_cached: int | None = None  # the least that any of its sequences found: what was cached before it came

    @classmethod
    def of(cls, job: _Job, encoded: EncodedGroup) -> "_Group":
        return cls(job, encoded, [None] * len(encoded.responses), len(encoded.responses))

    @property
    def prompt_length(self) -> int:
        return len(self.encoded.prompt) // 4

    def cost(self, index: int) -> int:
        """Tokens new with this response; the prompt comes with the first."""
        return len(self.encoded.responses[index]) // 4 + (0 if index else self.prompt_length)

    @property
    def cost_left(self) -> int:
        return sum(self.cost(index) for index in range(self.num_sent, len(self.items)))


class VllmLoop:
    """What child.py runs, as the native EngineLoop: `submit` and `cancel` may be called from any thread.

    The callbacks are called on its own thread, an event loop that it shares with vLLM's front.
    """

    def __init__(
        self,
        load: Callable[[Callable[[Step], None]], Awaitable[Model]],
        on_outcome: Callable[[Outcome], None],
        on_batch: Callable[[BatchReport], None],
        on_info: Callable[[EngineInfo], None],
        on_poisoned: Callable[[str], None],
    ) -> None:
        """`load` is given what to call after each forward. `on_info` is never called: nothing changes after loading."""
        self._load = load
        self._on_outcome, self._on_batch, self._on_poisoned = on_outcome, on_batch, on_poisoned
        self._first: Future[EngineInfo] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._load_and_run()), name="vllm", daemon=True)
        self._jobs: dict[str, _Job] = {}
        self._item_numbers = itertools.count()
        self._num_items_out = self._num_tokens_out = 0  # in vLLM
        self._num_waiting_jobs = self._num_waiting_tokens = 0
        self._num_pairs = 0  # that were computed since the last report
        self._num_prompt_tokens = self._num_cached_tokens = 0  # of the groups that ended since then
        self._queued_s: dict[str, float] = {}  # by item

    def start(self) -> EngineInfo:
        """Blocks until the model is loaded. Raises what loading raises."""
        self._thread.start()
        return self._first.result()

    def submit(self, request: EngineRequest) -> None:
        self._events.call_soon_threadsafe(self._add, request)

    def cancel(self, request_id: str) -> None:
        self._events.call_soon_threadsafe(self._drop, request_id, False)

    def ping(self, answer: Callable[[], None]) -> None:
        """Calls it when vLLM's engine core comes by between two forwards: never, if one hangs."""
        asyncio.run_coroutine_threadsafe(self._ping(answer), self._events)

    async def _ping(self, answer: Callable[[], None]) -> None:
        await self._model.ping()
        answer()

    def update_weights(self, source: str) -> Future[EngineInfo]:
        """vLLM keeps its weights to itself."""
        refused: Future[EngineInfo] = Future()
        refused.set_exception(LoadFailed(f"{source}: only the native engine updates weights in place; use Swap"))
        return refused

    async def _load_and_run(self) -> None:
        self._events = asyncio.get_running_loop()
        self._events.set_exception_handler(self._on_unforeseen)
        try:
            self._model = await self._load(self._on_step)
            self._queue: FairQueue[_Group] = FairQueue(quantum=self._model.max_batch_tokens)
        except BaseException as error:
            self._first.set_exception(error)
            return
        self._first.set_result(self._model.info)
        while not self._model.is_gone:
            await asyncio.sleep(WATCH_INTERVAL_S)
        self._die("vLLM's engine core has died")

    def _on_unforeseen(self, events: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """A failure of ours does not pass unnoticed: the callers it leaves behind would wait forever."""
        error = context.get("exception")
        log.error("%s", context["message"], exc_info=error if isinstance(error, BaseException) else None)
        if "handle" in context:  # one of our callbacks; tasks of vLLM's own are its business
            self._die(f"{context['message']}: {error}")

    def _die(self, reason: str) -> None:
        log.critical("%s", reason)
        self._on_poisoned(reason)

    # -- what comes in ---------------------------------------------------------------------------------------------

    def _add(self, request: EngineRequest) -> None:
        job = _Job(request, time.monotonic())
        job.groups = [_Group.of(job, encoded) for encoded in request.groups]
        job.num_waiting = job.num_unfinished = len(job.groups)
        self._jobs[request.request_id] = job
        self._num_waiting_jobs += 1
        if request.deadline is not None:
            left_s = max(0.0, request.deadline - job.received_at)
            job.expiry = self._events.call_later(left_s, self._drop, request.request_id, True)
        for group in job.groups:
            self._num_waiting_tokens += group.cost_left
            self._queue.add(group, request.client, max(1, group.cost_left), request.priority)
        self._feed()

    def _drop(self, request_id: str, expired: bool) -> None:
        """Ids that are unknown have ended already."""
        job = self._jobs.get(request_id)
        if job is None:
            return
        for group in job.groups:
            if group in self._queue:
                self._num_waiting_tokens -= group.cost_left
                self._leave_queue(group)
        for task in job.tasks:
            task.cancel()
        self._end(job, None, expired)

    def _leave_queue(self, group: _Group) -> None:
        self._queue.remove(group)
        group.job.num_waiting -= 1
        if group.job.num_waiting == 0:
            self._num_waiting_jobs -= 1

    # -- into vLLM, and back ---------------------------------------------------------------------------------------

    def _feed(self) -> None:
        while (group := self._queue.peek()) is not None and self._has_room:
            index, cost = group.num_sent, group.cost(group.num_sent)
            group.num_sent += 1
            self._num_items_out += 1
            self._num_tokens_out += cost
            self._num_waiting_tokens -= cost
            self._queue.charge(group, cost)  # for good: how far vLLM is with what is aborted, it does not say
            if group.num_sent == len(group.items):
                self._leave_queue(group)
            task = self._events.create_task(self._run(group, index))
            group.job.tasks.add(task)
            task.add_done_callback(partial(self._make_room, group.job, cost))

    def _make_room(self, job: _Job, cost: int, task: asyncio.Task[None]) -> None:
        """However the task ended: one that is cancelled right away never begins."""
        job.tasks.discard(task)
        self._num_items_out -= 1
        self._num_tokens_out -= cost
        self._feed()

    @property
    def _has_room(self) -> bool:
        model = self._model
        return (
            self._num_tokens_out < BATCHES_AHEAD * model.max_batch_tokens
            and self._num_items_out < BATCHES_AHEAD * model.max_batch_sequences
        )

    async def _run(self, group: _Group, index: int) -> None:
        try:
            item = await self._score(group, index)
        except ModelGone as error:
            self._die(str(error))
            return
        except Exception as error:
            log.critical("one item failed unforeseen", exc_info=True)
            self._die(f"{type(error).__name__}: {error}")
            return
        try:
            group.items[index] = item
            group.num_unfinished -= 1
            if group.num_unfinished == 0:
                self._finish(group)
        except Exception as error:  # an answer that cannot be sent: its caller would wait forever
            log.critical("what became of a request cannot be told", exc_info=True)
            self._die(f"{type(error).__name__}: {error}")

    async def _score(self, group: _Group, index: int) -> EngineItem:
        ids = np.frombuffer(group.encoded.prompt + group.encoded.responses[index], "<i4")
        if failure := self._refusal(ids):
            return EngineItem(None, failure)
        steps = group.encoded.steps[index] if group.encoded.steps else ()
        scores: list[float] = []
        try:
            # A step's score is that of what ends with it; each finds the one before in vLLM's prefix cache.
            for length in [end + 1 for end in steps] or [len(ids)]:
                scored = await self._ask(group, ids[:length].tolist())
                scores.append(scored.score)
        except ItemFailed as error:
            return EngineItem(None, error.failure)
        self._num_pairs += 1
        if failure := _not_finite(scores):
            return EngineItem(None, failure)
        return EngineItem(min(scores), attributes=scored.attributes, steps=tuple(scores) if steps else ())

    async def _ask(self, group: _Group, token_ids: list[int]) -> Scored:
        """Raises ItemFailed or ModelGone."""
        item_id, sent_at = f"{next(self._item_numbers)}", time.monotonic()
        try:
            scored = await self._model.score(item_id, token_ids, group.job.request.priority)
        finally:
            queued_s = self._queued_s.pop(item_id, 0.0)
        group.job.started_at = min(group.job.started_at, sent_at + queued_s)
        cached = min(scored.num_cached_tokens, group.prompt_length)
        group.num_cached = cached if group.num_cached is None else min(cached, group.num_cached)
        return scored

    def _refusal(self, ids: np.ndarray) -> ItemFailure | None:
        """What would end vLLM's process rather than an item. The front refuses the same, and says more about it."""
        info = self._model.info
        if not len(ids):
            return ItemFailure(ItemCode.INVALID_ARGUMENT, "there is no token to score")
        if len(ids) > info.max_length:
            message = f"{len(ids)} tokens are more than the model's max_length of {info.max_length}"
            return ItemFailure(ItemCode.OUT_OF_RANGE, message)
        wrong = ids[(ids < 0) | (ids >= info.vocab_size)]
        if len(wrong):
            message = f"id {int(wrong[0])} is outside the vocabulary of {info.vocab_size}"
            return ItemFailure(ItemCode.INVALID_ARGUMENT, message)
        return None

    # -- what became of it -----------------------------------------------------------------------------------------

    def _finish(self, group: _Group) -> None:
        job = group.job
        if group.num_cached is not None:
            self._num_cached_tokens += group.num_cached
            self._num_prompt_tokens += group.prompt_length - group.num_cached
        job.num_unfinished -= 1
        if job.num_unfinished == 0:
            self._end(job, _result(job), expired=False)

    def _end(self, job: _Job, result: EngineResult | None, expired: bool) -> None:
        if self._jobs.pop(job.request.request_id, None) is None:
            return  # dropped while its last item was on the way back
        if job.expiry is not None:
            job.expiry.cancel()
        self._on_outcome(Outcome(job.request.request_id, result, expired))

    def _on_step(self, step: Step) -> None:
        """Told before the items it ended are woken: the report is made after them."""
        if not self._first.done():  # the trial of loading
            return
        self._queued_s.update(step.queued_s)
        self._events.call_soon(self._report, step)

    def _report(self, step: Step) -> None:
        report = BatchReport(
            num_tokens=step.num_tokens,
            num_pairs=self._num_pairs,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            compute_s=step.compute_s,
            queued_requests=self._num_waiting_jobs,
            queued_tokens=self._num_waiting_tokens,
        )
        self._num_pairs = self._num_prompt_tokens = self._num_cached_tokens = 0
        for item_id in step.queued_s:  # of those that were aborted meanwhile
            self._queued_s.pop(item_id, None)
        self._on_batch(report)


def _not_finite(scores: Sequence[float]) -> ItemFailure | None:
    for score in scores:
        if not math.isfinite(score):
            message = f"the model's score is {score}, not a number"
            return ItemFailure(ItemCode.INTERNAL, message, is_of_the_score=True)
    return None


def _result(job: _Job) -> EngineResult:
    now = time.monotonic()
    started = min(job.started_at, now)  # nothing was computed if every item was refused
    groups = tuple(
        EngineGroup(tuple(item for item in group.items if item is not None), group.num_cached or 0)
        for group in job.groups
    )
    return EngineResult(groups, queue_s=max(0.0, started - job.received_at), compute_s=now - started)
