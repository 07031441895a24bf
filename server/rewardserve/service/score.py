"""The journey of one Score request."""

import asyncio
import itertools
import time
from collections.abc import Awaitable
from concurrent.futures import Executor
from typing import TypeVar

from rewardserve.engine.base import EngineRequest, EngineResult
from rewardserve.errors import DeadlineExceeded
from rewardserve.metrics import ModelMetrics
from rewardserve.service.registry import LiveModel, Registry
from rewardserve.text.encoder import EncodedItem, EncodedRequest
from rewardserve.types import GroupScore, ItemScore, ScoreRequest, ScoreResult, Timings

T = TypeVar("T")

_numbers = itertools.count()


class ScoringService:
    """What every door to the server calls: admit, encode, score, assemble, observe."""

    def __init__(self, registry: Registry, executor: Executor) -> None:
        self._registry = registry
        self._executor = executor

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Scores every response, or raises a RewardServeError; failures of single responses are among the items."""
        with self._registry.serving(request.model) as model, model.admission.admit(request):
            admitted = time.monotonic()
            encoded = await _before(request.deadline, model.encode(request, self._executor))
            tokenized = time.monotonic()
            assert model.info is not None
            version = model.info.version
            scored = await _before(request.deadline, _run(model, request, encoded))
            timings = Timings(
                admission_s=admitted - request.received_at,
                tokenization_s=tokenized - admitted,
                queue_s=scored.queue_s,
                compute_s=scored.compute_s,
                total_s=time.monotonic() - request.received_at,
            )
            result = _assemble(request, encoded, scored, model.name, version, timings)
            observe(model.metrics, result)
            return result


async def _before(deadline: float | None, work: Awaitable[T]) -> T:
    """Awaits `work`, which is cancelled when the deadline (CLOCK_MONOTONIC, seconds) passes."""
    if deadline is None:
        return await work
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await work
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed before the scores were there") from None


async def _run(model: LiveModel, request: ScoreRequest, encoded: EncodedRequest) -> EngineResult:
    if not encoded.groups:  # every response has failed already
        return EngineResult((), queue_s=0.0, compute_s=0.0)
    request_id = f"{next(_numbers)}:{request.request_id}"  # unique here, whatever the caller chose
    return await model.engine.score(
        EngineRequest(request_id, encoded.groups, request.priority, request.deadline, request.client)
    )


def _assemble(
    request: ScoreRequest, encoded: EncodedRequest, scored: EngineResult, model: str, version: str, timings: Timings
) -> ScoreResult:
    groups = tuple(
        GroupScore(group.id, tuple(_item(item, scored) for item in items))
        for group, items in zip(request.groups, encoded.items, strict=True)
    )
    return ScoreResult(request.request_id, model, version, groups, timings)


def _item(item: EncodedItem, scored: EngineResult) -> ItemScore:
    if item.failure is not None:
        return ItemScore(None, item.failure, item.num_prompt_tokens, item.num_response_tokens, 0, item.truncated)
    group = scored.groups[item.group]
    result = group.items[item.index]
    return ItemScore(
        result.score,
        result.failure,
        item.num_prompt_tokens,
        item.num_response_tokens,
        group.num_cached_tokens,
        item.truncated,
    )


def observe(metrics: ModelMetrics, result: ScoreResult) -> None:
    """Feeds the histograms from what the reply carries, so that the two always agree."""
    timings = result.timings
    for stage, seconds in (
        ("admission", timings.admission_s),
        ("tokenization", timings.tokenization_s),
        ("queue", timings.queue_s),
        ("compute", timings.compute_s),
        ("total", timings.total_s),
    ):
        metrics.stages[stage].observe(seconds)
    for item in (item for group in result.groups for item in group.items):
        if item.score is None:
            assert item.failure is not None
            metrics.count_item_failure(item.failure.code.name)
        else:
            metrics.pairs.inc()
            metrics.tokens.inc(item.num_prompt_tokens + item.num_response_tokens)
            metrics.score.observe(item.score)
            metrics.score_sum.inc(item.score)
