"""The journey of one Score request."""

import asyncio
import itertools
import time
from collections.abc import Mapping, Set
from concurrent.futures import Executor
from dataclasses import replace

from rewardserve.engine.base import EngineRequest, EngineResult
from rewardserve.metrics import ModelMetrics
from rewardserve.service.deadlines import Deadlines
from rewardserve.service.drift import Drift
from rewardserve.service.ensemble import Ensemble, combine
from rewardserve.service.finish import Finish, check_steps, not_finite
from rewardserve.service.live_model import LiveModel, ModelState
from rewardserve.service.monitor import observe_traffic
from rewardserve.service.registry import Registry
from rewardserve.text.encoder import EncodedItem, EncodedRequest
from rewardserve.types import GroupScore, ItemCode, ItemFailure, ItemScore, ScoreRequest, ScoreResult, Timings

_numbers = itertools.count()


class ScoringService:
    """What every door to the server calls: admit, encode, score, assemble, observe."""

    def __init__(self, registry: Registry, executor: Executor, drifts: Mapping[str, Drift] | None = None) -> None:
        """`drifts`: of models and ensembles that have a reference, by name."""
        self._registry = registry
        self._executor = executor
        self._drifts = drifts or {}
        self._deadlines = Deadlines()

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Scores every response, or raises a RewardServeError; failures of single responses are among the items."""
        ensemble = self._registry.ensemble(request.model)
        if ensemble is not None:
            return await self._score_together(ensemble, request)
        model = self._registry.serving(request.model)
        metrics = model.metrics
        with model.admission.admit(request), self._deadlines.until(request.deadline):
            await model.opened()
            if model.state is ModelState.FAILED:  # over the weights that it was taking over meanwhile
                model.check_serving()
            with model.used():
                result = await self._score(model, request)
        self._observe(metrics, result)
        if model.shadow is not None:
            model.shadow.offer(request, result)
        return result

    async def score_with(self, model: LiveModel, request: ScoreRequest) -> ScoreResult:
        """By a model that is not served yet: nothing is admitted, counted or reported."""
        with model.used():
            return await self._score(model, request)

    async def _score_together(self, ensemble: Ensemble, request: ScoreRequest) -> ScoreResult:
        self._registry.check_members(ensemble)
        parts = [asyncio.create_task(self.score(replace(request, model=name))) for name in ensemble.members]
        try:
            results = await asyncio.gather(*parts)
        finally:  # what one member fails in, the others need not finish
            for part in parts:
                part.cancel()
        result = combine(ensemble, request, results)
        self._observe(ensemble.metrics, result, ensemble.alike(result.members))
        return result

    def _observe(self, metrics: ModelMetrics, result: ScoreResult, alike: Set[str] = frozenset()) -> None:
        observe(metrics, result)
        observe_traffic(metrics, result)
        if result.model in self._drifts:
            scores = [item.score for group in result.groups for item in group.items if item.score is not None]
            self._drifts[result.model].observe(result.version, scores, alike)

    async def _score(self, model: LiveModel, request: ScoreRequest) -> ScoreResult:
        admitted = time.monotonic()
        assert model.info is not None
        info = model.info
        check_steps(request, info)
        encoded = await model.encode(request, self._executor)
        tokenized = time.monotonic()
        scored = await _run(model, request, encoded)
        timings = Timings(
            admission_s=admitted - request.received_at,
            tokenization_s=tokenized - admitted,
            queue_s=scored.queue_s,
            compute_s=scored.compute_s,
            total_s=time.monotonic() - request.received_at,
        )
        finish = Finish(info, model.finishing, request.step_reduction)
        return _assemble(request, encoded, scored, model.name, finish, timings)


async def _run(model: LiveModel, request: ScoreRequest, encoded: EncodedRequest) -> EngineResult:
    if not encoded.groups:  # every response has failed already
        return EngineResult((), queue_s=0.0, compute_s=0.0)
    request_id = f"{next(_numbers)}:{request.request_id}"  # unique here, whatever the caller chose
    return await model.engine.score(
        EngineRequest(request_id, encoded.groups, request.priority, request.deadline, request.client)
    )


def _assemble(
    request: ScoreRequest, encoded: EncodedRequest, scored: EngineResult, model: str, finish: Finish, timings: Timings
) -> ScoreResult:
    groups = tuple(
        GroupScore(group.id, tuple([_item(item, scored, finish) for item in items]))
        for group, items in zip(request.groups, encoded.items, strict=True)
    )
    return ScoreResult(
        request.request_id, model, finish.version, groups, timings, finish.info.attributes, curve=finish.curve
    )


def _item(item: EncodedItem, scored: EngineResult, finish: Finish) -> ItemScore:
    if item.failure is not None:
        return ItemScore(None, item.failure, item.num_prompt_tokens, item.num_response_tokens, 0, item.truncated)
    group = scored.groups[item.group]
    result = group.items[item.index]
    counts = (item.num_prompt_tokens, item.num_response_tokens, group.num_cached_tokens, item.truncated)
    if result.score is None:
        failure = result.failure
        if item.truncated and failure is not None and failure.code is ItemCode.INVALID_ARGUMENT:
            # It may have been there: what the model reads, the last step's tag for one, was cut off.
            failure = ItemFailure(ItemCode.OUT_OF_RANGE, f"truncated to max_length: {failure.message}")
        return ItemScore(None, failure, *counts)
    raw, score = finish(result, item.num_response_tokens)
    if failure := not_finite(score):
        return ItemScore(None, failure, *counts)
    return ItemScore(score, None, *counts, raw, finish.kind, result.steps, result.attributes, finish.std(result))


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
    items = [item for group in result.groups for item in group.items]
    scores = [item.score for item in items if item.score is not None]
    if len(scores) < len(items):
        for failure in (item.failure for item in items if item.failure is not None):
            metrics.count_item_failure(failure.code.name)
    metrics.pairs.inc(len(scores))
    metrics.tokens.inc(sum([i.num_prompt_tokens + i.num_response_tokens for i in items if i.score is not None]))
    metrics.score.observe_all(scores)
    metrics.score_sum.inc(sum(scores))
