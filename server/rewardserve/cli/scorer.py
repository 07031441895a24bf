"""The way to a model for the verbs that score: a server's, or a checkpoint loaded in this process."""

import asyncio
import contextlib
import re
import sys
import time
from collections.abc import AsyncIterable, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import grpc
from pydantic import Field

from rewardserve import types
from rewardserve.cli.running import DEFAULT_ENDPOINT, MAX_TIMEOUT_S, connect
from rewardserve.client import (
    AsyncRewardClient,
    Group,
    GroupScore,
    InvalidRequest,
    ItemScore,
    Overloaded,
    Rendered,
    RewardClientError,
    Status,
    TokenIds,
    VersionMismatch,
)
from rewardserve.config import DEVICE, MAX_THREADS
from rewardserve.errors import InvalidRequest as ServiceInvalidRequest
from rewardserve.options import Options, Repeated

if TYPE_CHECKING:  # what the offline path alone needs; it loads torch
    from rewardserve.service.score import ScoringService

OFFLINE_ONLY = ("dtype", "device", "threads", "max_batch_tokens")
STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}

G = TypeVar("G", bound=Group)


class ScoringOptions(Options):
    """Those of the verbs that score."""

    endpoint: Repeated = Field(
        default=[], description=f"server to ask; repeat for several that serve the same model [{DEFAULT_ENDPOINT}]"
    )
    name: str = Field(
        default="", description="model to ask for, by the name it is served by; needed if there are several"
    )
    model: str = Field(
        default="",
        description="score offline: load this checkpoint (FOLDER or hub name) here, and a calibration beside it",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="offline: precision of the backbone; auto is the checkpoint's own"
    )
    device: str = Field(default="auto", pattern=DEVICE, description="offline: auto, cpu, cuda or cuda:N")
    threads: int = Field(default=0, ge=0, le=MAX_THREADS, description="offline: torch threads on a CPU; 0: all cores")
    max_batch_tokens: int = Field(
        default=0, ge=0, description="offline: token budget of one forward; 0: 4096 on a CPU, 8192 on a GPU"
    )
    overflow: Literal["error", "truncate-prompt-left", "truncate-response-right"] = Field(
        default="error", description="what to do with prompt + response longer than the model takes"
    )
    timeout: float = Field(
        default=600.0, gt=0, le=MAX_TIMEOUT_S, description="seconds a server may take for one row, retries included"
    )
    window: int = Field(default=64, ge=1, description="rows under way at the same time")

    def check(self) -> None:
        """Raises ConfigError for options that do not go together."""
        self.require(
            not (self.model and self.endpoint), "--endpoint asks a server, --model asks none: give one of them"
        )
        for option in OFFLINE_ONLY:
            given = option in self.model_fields_set
            self.require(
                bool(self.model) or not given,
                f"--{option.replace('_', '-')} is the server's to choose; it goes with --model",
            )


class Scorer(Protocol):
    """One model version, wherever it runs."""

    name: str
    version: str

    def score(self, groups: AsyncIterable[G]) -> AsyncIterator[tuple[G, tuple[ItemScore, ...]]]:
        """Each group exactly once, with an item for each response, as they finish. A group that no server would take is
        failed items; anything else that goes wrong is raised, for trying again may help."""


@contextlib.asynccontextmanager
async def open_scorer(options: ScoringOptions, calibrated: bool = True) -> AsyncIterator[Scorer]:
    """`calibrated`: offline, by what lies beside the checkpoint, as by a server, which does so whatever is asked.

    Raises RewardClientError or RewardServeError if there is no model to score with.
    """
    if options.model:
        async with _open_offline(options, calibrated) as scorer:
            yield scorer
    else:
        async with connect(options.endpoint, options.timeout) as client:
            info = await client.get_model(options.name)
            if info.state == "loading":
                raise RewardClientError(f"'{info.name}' is still loading; `rewardserve models` says when it is serving")
            yield _ClientScorer(client, info.name, info.version, options)


class _ClientScorer:
    def __init__(self, client: AsyncRewardClient, name: str, version: str, options: ScoringOptions) -> None:
        self._client, self._options = client, options
        self.name, self.version = name, version

    async def score(self, groups: AsyncIterable[G]) -> AsyncIterator[tuple[G, tuple[ItemScore, ...]]]:
        results = self._client.score_stream(
            groups,
            model=self.name,
            overflow=self._options.overflow.replace("-", "_"),
            window=self._options.window,
        )
        async with contextlib.aclosing(results):
            async for group, outcome in results:
                yield group, self._items(group, outcome)

    def _items(self, group: Group, outcome: GroupScore | RewardClientError) -> tuple[ItemScore, ...]:
        if isinstance(outcome, InvalidRequest):
            return _all_failed(group, outcome.message)
        if isinstance(outcome, Overloaded) and outcome.retry_after_s is None:  # too large, and will be so again
            return _all_failed(group, outcome.message)
        if isinstance(outcome, RewardClientError):
            raise outcome
        if outcome.model_version != self.version:
            raise VersionMismatch(
                f"'{self.name}' changed from version {self.version} to {outcome.model_version}; run it again"
            )
        return outcome.items


def _all_failed(group: Group, message: str) -> tuple[ItemScore, ...]:
    status = Status(grpc.StatusCode.INVALID_ARGUMENT, message.removeprefix("groups[0]."))  # of a request of one group
    failed = ItemScore(status, None, "unspecified")
    return (failed,) * len(group.responses)


@contextlib.asynccontextmanager
async def _open_offline(options: ScoringOptions, calibrated: bool) -> AsyncIterator["_OfflineScorer"]:
    """The server's own path from text to score, with its engine in this process and no port. Raises LoadFailed."""
    from prometheus_client import CollectorRegistry

    from rewardserve.engine.native.engine import NativeEngine
    from rewardserve.engine.native.options import NativeOptions
    from rewardserve.metrics import Metrics
    from rewardserve.service.admission import Limits
    from rewardserve.service.finish import Finishing
    from rewardserve.service.registry import Registry
    from rewardserve.service.score import ScoringService

    def make_engine(name: str, source: str, dtype: str) -> NativeEngine:
        budget, threads = options.max_batch_tokens, options.threads
        return NativeEngine(NativeOptions(source, dtype, options.device, max_batch_tokens=budget, num_threads=threads))

    unlimited = Limits(sys.maxsize, sys.maxsize, sys.maxsize)  # the window is the limit here
    with ThreadPoolExecutor(2, thread_name_prefix="tokenizer") as executor:
        finishing = Finishing(looks_beside=calibrated)
        registry = Registry(make_engine, Metrics(CollectorRegistry()), unlimited, executor, finishing=finishing)
        name = options.name or re.sub(r"[^\w.-]", "-", Path(options.model).resolve().name)
        try:
            live = await registry.load(name, options.model, options.dtype)
            yield _OfflineScorer(ScoringService(registry, executor), name, live.version, options)
        finally:
            await registry.stop()


class _OfflineScorer:
    def __init__(self, service: "ScoringService", name: str, version: str, options: ScoringOptions) -> None:
        self._service, self._window = service, options.window
        self._overflow = types.Overflow[options.overflow.replace("-", "_").upper()]
        self.name, self.version = name, version

    async def score(self, groups: AsyncIterable[G]) -> AsyncIterator[tuple[G, tuple[ItemScore, ...]]]:
        source = aiter(groups)
        upcoming: asyncio.Task[G | None] | None = asyncio.ensure_future(anext(source, None))
        scoring: set[asyncio.Task[tuple[G, tuple[ItemScore, ...]]]] = set()
        try:
            while upcoming or scoring:
                waiting = scoring | ({upcoming} if upcoming and len(scoring) < self._window else set())
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if upcoming in done:
                    group = upcoming.result()
                    upcoming = None if group is None else asyncio.ensure_future(anext(source, None))
                    scoring |= {asyncio.create_task(self._score(group))} if group is not None else set()
                for task in done & scoring:
                    scoring.remove(task)
                    yield task.result()
        finally:
            left = [*scoring, *([upcoming] if upcoming else [])]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _score(self, group: G) -> tuple[G, tuple[ItemScore, ...]]:
        sent = types.PromptGroup(group.id, _prompt(group), tuple(_response(each) for each in group.responses))
        request = types.ScoreRequest("", self.name, (sent,), self._overflow, received_at=time.monotonic())
        try:
            result = await self._service.score(request)
        except ServiceInvalidRequest as error:
            return group, _all_failed(group, str(error))
        return group, tuple(_item(item, result.attributes) for item in result.groups[0].items)


def _prompt(group: Group) -> types.Prompt:
    match group.prompt:
        case str(text):
            return types.PlainText(text)
        case Rendered(text):
            return types.Rendered(text)
        case TokenIds(data=data):
            return types.TokenIds(data)
        case turns:
            return types.Conversation(tuple(types.Message(turn["role"], turn["content"]) for turn in turns))


def _response(response: str | TokenIds) -> types.Response:
    return response if isinstance(response, str) else types.TokenIds(response.data)


def _item(item: types.ItemScore, attributes: tuple[str, ...]) -> ItemScore:
    failure = item.failure
    status = Status(STATUS_CODES[failure.code], failure.message) if failure else Status(grpc.StatusCode.OK)
    return ItemScore(
        status,
        None if item.score is None else types.as_answered(item.score),
        item.kind.name.lower(),
        item.num_prompt_tokens,
        item.num_response_tokens,
        item.num_cached_tokens,
        item.truncated,
        item.raw,
        item.steps,
        dict(zip(attributes, item.attributes, strict=False)),
        item.std,
    )
