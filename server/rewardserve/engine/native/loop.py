"""The loop: schedule, run, resolve. Two threads, so that the next forward is planned, and on a GPU launched, while one
runs.

Every request added comes back as exactly one Outcome, whatever happens: a forward that fails is split and tried again
until the one item that cannot be computed is found; that one fails, the others are scored.
"""

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from rewardserve.engine.base import BatchReport, EngineInfo, EngineRequest
from rewardserve.engine.native.block_pool import BlockPool
from rewardserve.engine.native.load import Loaded
from rewardserve.engine.native.prefix_cache import PrefixCache
from rewardserve.engine.native.runner import Launched, Runner
from rewardserve.engine.native.scheduler import Outcome, Scheduler
from rewardserve.engine.native.sequence import BatchPlan
from rewardserve.errors import LoadFailed, Unavailable, is_out_of_memory
from rewardserve.models.packing import NotPackable
from rewardserve.models.reads import Reader
from rewardserve.types import ItemCode, ItemFailure

log = logging.getLogger(__name__)

POISONED = ("CUDA error", "device-side assert", "CUBLAS_STATUS", "an illegal memory access")
CHECK_INTERVAL_S = 10.0
POLL_S = 0.0003  # between looks at a forward under way, when there is nothing to launch


class DevicePoisoned(RuntimeError):
    """The device's context is beyond repair; only a new process can go on."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    plan: BatchPlan
    inputs: object  # or the exception that making them ended in; it is handled in its turn
    epoch: int  # of the scheduler when planned; a later epoch means it was rolled back


@dataclass(frozen=True, slots=True)
class _Refresh:
    """Other weights, in their turn among the forwards."""

    source: str
    done: Future[EngineInfo]


class _Wake:
    """Nothing to compute, but somebody asks."""


@dataclass(frozen=True, slots=True)
class _UnderWay:
    plan: BatchPlan
    launched: Launched
    epoch: int
    started: float  # perf_counter()


class EngineLoop:
    """Owns the scheduler and the runner. `submit` and `cancel` may be called from any thread.

    The thread that loads the model also runs it. Every thread that ever computed keeps OpenMP workers of its own, and
    with more workers than cores libgomp puts them to sleep between any two operations: a fifth of the speed was lost.

    `on_outcome` and `on_batch` are called on the loop's threads, `on_poisoned` when the process must end.
    """

    def __init__(
        self,
        load: Callable[[], Loaded],
        max_batch_sequences: int,
        on_outcome: Callable[[Outcome], None],
        on_batch: Callable[[BatchReport], None],
        on_info: Callable[[EngineInfo], None],
        on_poisoned: Callable[[str], None],
    ) -> None:
        self._load = load
        self._max_batch_sequences = max_batch_sequences
        self._on_outcome, self._on_batch, self._on_info = on_outcome, on_batch, on_info
        self._on_poisoned = on_poisoned
        self._first: Future[EngineInfo] = Future()
        self._lock = threading.Condition()
        self._epoch = 0
        self._stopping = False
        self._checked_at = 0.0
        # Of each model: requests and tokens waiting, and when they were counted.
        self._depths: dict[int, tuple[int, int, float]] = {}
        self._ahead: queue.Queue[_Prepared | _Refresh | _Wake | None] = queue.Queue(maxsize=1)
        self._pings: deque[Callable[[], None]] = deque()
        self._finished_at = 0.0  # perf_counter() when the scores of the last forward were read
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (("runner", self._load_and_run), ("planner", self._guard(self._plan_forever)))
        ]

    def start(self) -> EngineInfo:
        """Blocks until the model is loaded. Raises what loading raises; nothing is running then."""
        runner, planner = self._threads
        runner.start()
        info = self._first.result()
        planner.start()
        return info

    def _load_and_run(self) -> None:
        try:
            self._loaded = self._load()
            self._runner: Runner = self._loaded.runner
            self._scheduler = self._new_scheduler()
        except BaseException as error:
            self._first.set_exception(error)
            return
        self._first.set_result(self._loaded.info)
        if not self._guard(self._run_forever)():
            self._refuse_what_comes()

    def stop(self) -> None:
        """Ends both threads after the forward under way; what is left is not answered."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        for thread in self._threads:
            thread.join()

    def submit(self, request: EngineRequest) -> None:
        with self._lock:
            self._scheduler.add(request)
            self._lock.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._lock:
            self._scheduler.cancel(request_id)
            self._deliver()

    def ping(self, answer: Callable[[], None]) -> None:
        """Calls it when the runner comes by between two forwards: never, if one hangs."""
        self._pings.append(answer)
        with contextlib.suppress(queue.Full):  # then it comes by in any case
            self._ahead.put_nowait(_Wake())

    def _answer_pings(self) -> None:
        while self._pings:
            self._pings.popleft()()

    def update_weights(self, source: str) -> Future[EngineInfo]:
        """What is loaded then, or LoadFailed, and nothing has changed. It is running once its turn has come.

        No request may be in flight: it must not be scored by old weights and new ones. What was cached is forgotten.
        """
        done: Future[EngineInfo] = Future()
        self._ahead.put(_Refresh(source, done))
        return done

    def _update_weights(self, refresh: _Refresh) -> None:
        with self._lock:
            if self._scheduler.requests():
                refresh.done.set_exception(LoadFailed("requests are in flight; weights are changed between them"))
                return
            self._rollback()  # forwards for callers who have left
        refresh.done.set_running_or_notify_cancel()
        try:
            loaded = self._loaded.refreshed(refresh.source)
        except LoadFailed as error:
            refresh.done.set_exception(error)
            return
        except Exception as error:
            reason = f"weights were changed in part: {type(error).__name__}: {error}".splitlines()[0]
            refresh.done.set_exception(LoadFailed(reason))
            raise DevicePoisoned(reason) from error
        with self._lock:
            self._loaded = loaded
            self._scheduler.forget_prompts()
        refresh.done.set_result(loaded.info)

    def _new_scheduler(self) -> Scheduler:
        runner = self._runner
        cache = PrefixCache(BlockPool(runner.num_blocks), runner.num_host_slots) if runner.num_blocks else None
        return Scheduler(
            cache,
            self._loaded.max_batch_tokens,
            self._max_batch_sequences,
            readers=[Reader(plan) for plan in self._loaded.reads],
            trunks=self._loaded.trunks,
        )

    def _guard(self, body: Callable[[], None]) -> Callable[[], bool]:
        """No thread ends unnoticed: the callers it leaves behind would wait forever. True if it ended as it should."""

        def guarded() -> bool:
            try:
                body()
            except BaseException as error:
                log.critical("the engine's %s thread died", threading.current_thread().name, exc_info=True)
                self._on_poisoned(f"{type(error).__name__}: {error}")
                return False
            return True

        return guarded

    def _refuse_what_comes(self) -> None:
        """In the place of a runner that died: the planner must not wait for ever to hand over what it has."""
        while (item := self._ahead.get()) is not None:
            if isinstance(item, _Refresh):
                item.done.set_exception(Unavailable("the engine died"))

    # -- planner ---------------------------------------------------------------------------------------------------

    def _plan_forever(self) -> None:
        while (prepared := self._next_prepared()) is not None:
            self._ahead.put(prepared)
        self._ahead.put(None)

    def _next_prepared(self) -> _Prepared | None:
        """Waits for something to compute; None when stopping."""
        with self._lock:
            while not self._stopping:
                plan = self._scheduler.schedule()
                self._deliver()
                if plan is not None:
                    epoch = self._epoch
                    break
                self._check_when_idle()
                self._lock.wait(timeout=None if self._scheduler.idle else 0.05)
            else:
                return None
        try:
            return _Prepared(plan, self._runner.prepare(plan), epoch)
        except Exception as error:
            return _Prepared(plan, error, epoch)

    def _check_when_idle(self) -> None:
        """Looks through every block, which takes milliseconds: not after each request of a quiet hour."""
        now = time.monotonic()
        if self._scheduler.idle and now - self._checked_at > CHECK_INTERVAL_S:
            self._scheduler.check()
            self._checked_at = now

    # -- runner ----------------------------------------------------------------------------------------------------

    def _run_forever(self) -> None:
        """At most two forwards are with the device: one is launched before the scores of the one before are read."""
        under_way: _UnderWay | None = None
        while True:
            self._answer_pings()
            prepared = None
            while prepared is None and not (under_way is not None and under_way.launched.ready()):
                try:
                    prepared = self._ahead.get(timeout=None if under_way is None else POLL_S)
                except queue.Empty:
                    continue
                if prepared is None:
                    return
                if isinstance(prepared, _Wake):
                    prepared = None
                    if under_way is None:
                        self._answer_pings()
                if isinstance(prepared, _Refresh):
                    if under_way is not None:
                        self._finish(under_way)
                        under_way = None
                    self._update_weights(prepared)
                    prepared = None
            launched = None if prepared is None else self._launch(prepared)
            if under_way is not None:
                self._finish(under_way)
            under_way = None
            if isinstance(launched, Exception):
                assert prepared is not None
                self._handle(prepared.plan, prepared.epoch, launched)
            else:
                under_way = launched
            launched = None  # an error holds what its forward had computed: the next needs the room

    def _launch(self, prepared: _Prepared) -> _UnderWay | Exception | None:
        """What is under way then, or why it is not; None if what was planned is not to be computed any more."""
        with self._lock:
            if prepared.epoch != self._epoch:
                return None
            self._scheduler.begin(prepared.plan)
        started = time.perf_counter()
        if isinstance(prepared.inputs, Exception):
            return prepared.inputs
        try:
            return _UnderWay(prepared.plan, self._runner.launch(prepared.inputs), prepared.epoch, started)
        except Exception as error:
            return error

    def _finish(self, under_way: _UnderWay) -> None:
        """Reads the scores, which may wait for them."""
        try:
            features = under_way.launched.features()
        except Exception as error:
            self._handle(under_way.plan, under_way.epoch, error)
            return
        now = time.perf_counter()
        compute_s = now - max(under_way.started, self._finished_at)
        self._finished_at = now
        if under_way.epoch == self._epoch:
            self._complete(under_way.plan, features, compute_s)

    def _handle(self, plan: BatchPlan, epoch: int, error: Exception) -> None:
        if epoch != self._epoch:
            return  # the forward before it failed, and both will be planned anew
        if isinstance(error, NotPackable):
            self._fall_back(str(error))
        else:
            self._recover(plan, error)

    def _complete(self, plan: BatchPlan, features: list[list[float]], compute_s: float) -> None:
        with self._lock:
            self._scheduler.complete(plan, features)
            depth = self._measured_depth(plan.variant)
            report = BatchReport(
                num_tokens=plan.num_tokens,
                num_pairs=plan.num_scored,
                num_prompt_tokens=plan.num_prompt_tokens,
                num_cached_tokens=plan.num_cached_tokens,
                compute_s=compute_s,
                queued_requests=depth[0],
                queued_tokens=depth[1],
                variant=plan.variant,
            )
            self._deliver()
            self._lock.notify_all()
        self._on_batch(report)

    def _measured_depth(self, variant: int) -> tuple[int, int]:
        """Goes through a model's whole queue: after every forward while it is short, else a few times a second."""
        now, scheduler = time.monotonic(), self._scheduler
        requests, tokens, counted_at = self._depths.get(variant, (0, 0, 0.0))
        if scheduler.num_waiting_groups(variant) < 100 or now - counted_at > 0.1:
            requests, tokens = scheduler.num_waiting_requests(variant), scheduler.num_waiting_tokens(variant)
            self._depths[variant] = (requests, tokens, now)
        return requests, tokens

    def _recover(self, plan: BatchPlan, error: Exception) -> None:
        """Splits what failed; fails it if it is down to one item."""
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        out_of_memory = is_out_of_memory(error)
        if not out_of_memory and any(text in str(error) for text in POISONED):
            raise DevicePoisoned(message) from error
        with self._lock:
            self._rollback()
            if self._scheduler.split(plan, out_of_memory):
                log.warning("a forward of %d tokens failed, trying smaller ones: %s", plan.num_tokens, message)
                return
            log.error("one item cannot be computed: %s", message, exc_info=None if out_of_memory else error)
            code = ItemCode.RESOURCE_EXHAUSTED if out_of_memory else ItemCode.INTERNAL
            self._scheduler.fail(plan, ItemFailure(code, f"the forward failed: {message}"))
            self._deliver()

    def _fall_back(self, reason: str) -> None:
        """A forward found out that packing is wrong for this model: from here on it is served padded."""
        with self._lock:
            self._rollback()
            self._deliver()  # what ended meanwhile is in no scheduler's hands after this
            requests = self._scheduler.requests()
            self._loaded = self._loaded.fall_back(reason)
            self._runner = self._loaded.runner
            self._scheduler = self._new_scheduler()
            for request in requests:
                self._scheduler.add(request)
        self._on_info(self._loaded.info)

    def _rollback(self) -> None:
        self._epoch += 1
        self._scheduler.rollback()
        self._lock.notify_all()

    def _deliver(self) -> None:
        for outcome in self._scheduler.take_outcomes():
            self._on_outcome(outcome)
