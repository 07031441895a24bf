"""One model being served: its engine, its state, and the numbers that are told of it."""

import asyncio
import contextlib
import enum
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

from rewardserve.engine.base import BatchReport, Engine, EngineInfo, EngineListener, EngineRequest
from rewardserve.errors import BACK_SOON_S, Draining, LoadFailed, SwapRefused, Unavailable
from rewardserve.metrics import ModelMetrics
from rewardserve.service.admission import Admission, Limits
from rewardserve.service.finish import Finishing
from rewardserve.service.shadow import Shadow
from rewardserve.text.encoder import EncodedRequest, Encoder, is_quickly_encoded
from rewardserve.text.tokenizer import Tokenizer
from rewardserve.types import EncodedGroup, ScoreRequest

log = logging.getLogger(__name__)


class ModelState(enum.Enum):
    LOADING = "loading"
    SERVING = "serving"
    RESTARTING = "restarting"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Previous:
    """What a swap replaced."""

    source: str
    dtype: str
    version: str  # as loaded from there: another may lie there by now
    kept: "LiveModel | None"  # still loaded


class LiveModel:
    """One model being served. Lives on the event loop."""

    def __init__(self, name: str, source: str, engine: Engine, metrics: ModelMetrics, limits: Limits) -> None:
        self.name = name
        self.source = source
        self.engine = engine
        self.metrics = metrics
        self.admission = Admission(limits, metrics)
        self.state = ModelState.LOADING
        self.message = ""
        self.num_restarts = 0
        self.info: EngineInfo | None = None
        self.encoder: Encoder | None = None
        self.dtype = "auto"  # as asked for
        self.configured = Finishing()
        self.finishing = Finishing()  # what of it is for the version that is served
        self.shadow: Shadow | None = None  # of a swap under way
        self.previous: Previous | None = None
        self._num_users = 0
        self._open = asyncio.Event()
        self._open.set()
        self.no_number = ""  # of its warm-up

    @property
    def version(self) -> str:
        """What its scores say they are of; empty before it is loaded."""
        return "" if self.info is None else self.finishing.version_of(self.info.version)

    @property
    def num_users(self) -> int:
        """Requests that this version is scoring."""
        return self._num_users

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        self._num_users += 1
        try:
            yield
        finally:
            self._num_users -= 1

    async def opened(self) -> None:
        """Returns at once, or when other weights are in place."""
        if not self._open.is_set():
            await self._open.wait()

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Requests that are not being scored yet wait until the block is left."""
        if not self._open.is_set():
            raise SwapRefused(f"model '{self.name}' is taking over other weights already")
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def use_weights(self, info: EngineInfo, source: str) -> None:
        """Raises LoadFailed for a calibration beside them that is none."""
        self.finishing = self.configured.check(self.name, info, source)
        self.info, self.source = info, source
        self._describe(info)

    def fail(self, reason: str) -> None:
        """Nobody is to be scored by it any more, until it is loaded anew."""
        self.state, self.message = ModelState.FAILED, reason
        self.metrics.up.set(0)

    def take_over(self, old: "LiveModel") -> None:
        """From here on this version's numbers go where the old one's went, and count towards the same limits."""
        assert self.info is not None
        self.metrics, old.metrics = old.metrics, self.metrics
        self.admission, old.admission = old.admission, self.admission
        self._describe(self.info)
        self.metrics.up.set(self.state is ModelState.SERVING)
        self.metrics.nothing_queued()

    async def start(self, executor: Executor, on_change: Callable[["LiveModel"], None]) -> None:
        """Raises LoadFailed, or Unavailable if the engine died while loading."""

        def set_state(state: ModelState, message: str = "") -> None:
            if self.state not in (ModelState.DRAINING, ModelState.FAILED):
                self.state, self.message = state, message
            self.metrics.up.set(self.state is ModelState.SERVING)
            on_change(self)

        def on_up(info: EngineInfo) -> None:
            if self.state is ModelState.RESTARTING:
                count_restart()
                if self.info is not None and info.version != self.info.version:
                    log.warning(
                        "%s came back as another version: its checkpoint, %s, was changed; %s serves where %s did",
                        *(self.name, self.source, info.version, self.info.version),
                    )
            try:
                self._use(info, self._tokenizer_for(info))
            except LoadFailed as error:  # the checkpoint's files were changed while it was down
                set_state(ModelState.FAILED, str(error))
            else:
                set_state(ModelState.SERVING, self.message)

        def on_down(reason: str) -> None:
            self.metrics.nothing_queued()
            set_state(ModelState.RESTARTING, reason)

        def count_restart() -> None:
            self.num_restarts += 1
            self.metrics.restarts.inc()

        listener = EngineListener(
            on_batch=self._on_batch,
            on_part_down=lambda reason: count_restart(),
            on_down=on_down,
            on_up=on_up,
            on_failed=lambda reason: set_state(ModelState.FAILED, reason),
        )
        info = await self.engine.start(listener)
        tokenizer = None
        if info.text is not None:
            tokenizer = await asyncio.get_running_loop().run_in_executor(executor, Tokenizer, info.text)
        self._use(info, tokenizer)
        self.no_number = await self.warm_up()
        set_state(ModelState.SERVING)

    def _tokenizer_for(self, info: EngineInfo) -> Tokenizer | None:
        """The one at hand if the text is the same as before, as it is after nearly every restart."""
        if self.info is not None and self.encoder is not None and info.text == self.info.text:
            return self.encoder.tokenizer
        return None if info.text is None else Tokenizer(info.text)

    async def warm_up(self) -> str:
        """The first request should not pay for what the first forward sets up. Raises LoadFailed if none can succeed.

        Returns why its score is no number, or "": that says nothing by itself, since it may be these ids', and each
        item says it for itself; but see check_numbers.
        """
        assert self.info is not None
        looked_for = b"".join(i.to_bytes(4, "little") for i in self.info.pattern)
        group = EncodedGroup(prompt=bytes(4 * 8), responses=(looked_for + bytes(4 * 8),))
        result = await self.engine.score(EngineRequest("warm-up", (group,)))
        failure = result.groups[0].items[0].failure
        if failure is not None and not failure.is_of_the_score:
            raise LoadFailed(f"it was loaded, but cannot score: {failure.message}")
        return "" if failure is None else failure.message

    def check_numbers(self, no_number: str) -> None:
        """Raises LoadFailed if a version, whose warm-up said this, has none where this one has: a run has diverged."""
        if no_number and not self.no_number:
            raise LoadFailed(
                f"it has no score for an input for which the version that serves has one ({no_number}); its weights "
                "may have become NaN in training"
            )

    def _use(self, info: EngineInfo, tokenizer: Tokenizer | None) -> None:
        # After a restart scores stay as they were, whatever lies beside the checkpoint by now.
        if self.info is None or info.version != self.info.version:
            self.finishing = self.configured.check(self.name, info, self.source)
        self.info = info
        self.encoder = Encoder(
            tokenizer,
            info.vocab_size,
            info.max_length,
            info.text_missing_reason,
            info.bos_token_id,
            info.appended,
            info.steps,
            info.judge,
        )
        self._describe(info)

    def _describe(self, info: EngineInfo) -> None:
        self.admission.max_length = info.max_length
        self.metrics.set_info(self.version, info.architecture, info.path, info.dtype)

    def _on_batch(self, report: BatchReport) -> None:
        self.admission.observe_rate(report.num_tokens, report.compute_s)
        self.metrics.batch_tokens.observe(report.num_tokens)
        self.metrics.batch_pairs.observe(report.num_pairs)
        self.metrics.cache_hits.inc(report.num_cached_tokens)
        self.metrics.cache_misses.inc(report.num_prompt_tokens)
        self.metrics.queued_requests.set(report.queued_requests)
        self.metrics.queued_tokens.set(report.queued_tokens)

    def check_serving(self) -> None:
        """Raises Unavailable if it cannot score now."""
        if self.state is ModelState.DRAINING:
            raise Draining(f"model '{self.name}' is being unloaded")
        if self.state is not ModelState.SERVING:
            soon = BACK_SOON_S if self.state in (ModelState.LOADING, ModelState.RESTARTING) else None
            raise Unavailable(f"model '{self.name}' is {self.state.value}: {self.message}".removesuffix(": "), soon)

    async def encode(self, request: ScoreRequest, executor: Executor) -> EncodedRequest:
        """Text goes to `executor`, off the event loop; few token ids need less work than handing them over."""
        assert self.encoder is not None
        if is_quickly_encoded(request):
            return self.encoder.encode(request)
        abandoned = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, self.encoder.encode, request, abandoned)
        finally:
            abandoned.set()  # cancelled, by a caller who left or by the deadline: the thread does not hear of it
