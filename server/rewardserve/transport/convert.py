"""protobuf <-> types.py; the only file that knows both."""

import itertools
import os
import time
from collections.abc import Sequence

from google.rpc import status_pb2

from rewardserve.errors import InvalidRequest
from rewardserve.service.ensemble import Ensemble
from rewardserve.service.live_model import LiveModel, ModelState
from rewardserve.service.rank import Comparison, Ranking
from rewardserve.service.registry import Registry
from rewardserve.service.swap import CanaryPair, SwapPlan, SwapReport
from rewardserve.types import (
    Conversation,
    ItemScore,
    Message,
    Overflow,
    PlainText,
    Prompt,
    PromptGroup,
    Rendered,
    Response,
    ScoreRequest,
    ScoreResult,
    StepIds,
    StepReduction,
    Steps,
    Timings,
    TokenIds,
)
from rewardserve.v1 import models_pb2, scoring_pb2

MAX_PRIORITY = 100
_PROCESS = os.urandom(6).hex()  # with a number: the id of a request that came without one
_numbers = itertools.count()
STATES = {
    ModelState.LOADING: models_pb2.MODEL_STATE_LOADING,
    ModelState.SERVING: models_pb2.MODEL_STATE_SERVING,
    ModelState.RESTARTING: models_pb2.MODEL_STATE_RESTARTING,
    ModelState.DRAINING: models_pb2.MODEL_STATE_DRAINING,
    ModelState.FAILED: models_pb2.MODEL_STATE_FAILED,
}
PATHS = {
    "packed": models_pb2.EXECUTION_PATH_PACKED,
    "padded": models_pb2.EXECUTION_PATH_PADDED,
    "vllm": models_pb2.EXECUTION_PATH_VLLM,
}


def score_request(message: scoring_pb2.ScoreRequest, deadline: float | None, client: str) -> ScoreRequest:
    """Raises InvalidRequest, naming the field. `deadline` is on CLOCK_MONOTONIC, in seconds."""
    groups = tuple(
        PromptGroup(
            group.id,
            _prompt(group.prompt, f"groups[{i}].prompt"),
            _responses(group.responses, f"groups[{i}].responses"),
        )
        for i, group in enumerate(message.groups)
    )
    return _request(message, groups, deadline, client)


def rank_request(message: scoring_pb2.RankRequest, deadline: float | None, client: str) -> ScoreRequest:
    group = PromptGroup("", _prompt(message.prompt, "prompt"), _responses(message.responses, "responses"))
    return _request(message, (group,), deadline, client)


def compare_request(message: scoring_pb2.CompareRequest, deadline: float | None, client: str) -> ScoreRequest:
    responses = (_response(message.response_a, "response_a"), _response(message.response_b, "response_b"))
    group = PromptGroup("", _prompt(message.prompt, "prompt"), responses)
    return _request(message, (group,), deadline, client)


def _request(
    message: scoring_pb2.ScoreRequest | scoring_pb2.RankRequest | scoring_pb2.CompareRequest,
    groups: tuple[PromptGroup, ...],
    deadline: float | None,
    client: str,
) -> ScoreRequest:
    options = message.options
    try:
        overflow = Overflow(options.overflow)
    except ValueError:
        known = ", ".join(f"{o.value} ({o.name})" for o in Overflow)
        raise InvalidRequest("options.overflow", f"{options.overflow} is unknown; known are {known}") from None
    if abs(options.priority) > MAX_PRIORITY:
        raise InvalidRequest("options.priority", f"{options.priority} is not within -{MAX_PRIORITY}..{MAX_PRIORITY}")
    if options.granularity not in (scoring_pb2.GRANULARITY_OUTCOME, scoring_pb2.GRANULARITY_STEP):
        raise InvalidRequest(
            "options.granularity", f"{options.granularity} is unknown; known are 0 (OUTCOME), 1 (STEP)"
        )
    try:
        reduction = StepReduction(options.step_reduction)
    except ValueError:
        known = ", ".join(f"{o.value} ({o.name})" for o in StepReduction)
        raise InvalidRequest(
            "options.step_reduction", f"{options.step_reduction} is unknown; known are {known}"
        ) from None
    return ScoreRequest(
        by_step=options.granularity == scoring_pb2.GRANULARITY_STEP,
        step_reduction=reduction,
        step_separator=options.step_separator,
        cache_response=options.cache_response,
        request_id=message.request_id,  # the door has given one to a request without
        model=message.model,
        groups=groups,
        overflow=overflow,
        priority=options.priority,
        deadline=deadline,
        client=client,
        received_at=time.monotonic(),
    )


def new_request_id() -> str:
    return f"{_PROCESS}-{next(_numbers):x}"


def _prompt(message: scoring_pb2.Prompt, field: str) -> Prompt:
    match message.WhichOneof("kind"):
        case "token_ids":
            return TokenIds(message.token_ids)
        case "text":
            return PlainText(message.text)
        case "rendered":
            return Rendered(message.rendered)
        case "conversation":
            return Conversation(tuple(Message(m.role, m.content) for m in message.conversation.messages))
        case _:
            raise InvalidRequest(field, "is not set; give text, conversation, token_ids or rendered")


def _responses(messages: Sequence[scoring_pb2.Response], field: str) -> tuple[Response, ...]:
    return tuple(
        [
            TokenIds(ids)
            if (ids := message.token_ids) and not message.step_ends
            else _response(message, f"{field}[{i}]")
            for i, message in enumerate(messages)
        ]
    )


def _response(message: scoring_pb2.Response, field: str) -> Response:
    kind = message.WhichOneof("kind")
    if message.step_ends and kind != "token_ids":
        raise InvalidRequest(f"{field}.step_ends", "counts token_ids; give the steps of a text as `steps`")
    match kind:
        case "token_ids" if message.step_ends:
            return StepIds(message.token_ids, tuple(message.step_ends))
        case "token_ids":
            return TokenIds(message.token_ids)
        case "text":
            return message.text
        case "steps":
            return Steps(tuple(message.steps.texts))
        case _:
            raise InvalidRequest(field, "is not set; give text, token_ids or steps")


def score_response(result: ScoreResult) -> scoring_pb2.ScoreResponse:
    """Messages are filled where they lie: one put into another is copied by way of its bytes."""
    response = scoring_pb2.ScoreResponse(request_id=result.request_id)
    _fill_version(response.model, result)
    for group in result.groups:
        add = response.groups.add(id=group.id).items.add
        for item in group.items:
            _fill_item(add(), item)
    _fill_timings(response.timings, result.timings)
    return response


def rank_response(ranking: Ranking) -> scoring_pb2.RankResponse:
    response = scoring_pb2.RankResponse(request_id=ranking.result.request_id)
    _fill_version(response.model, ranking.result)
    for entries, indices in ((response.ranked, ranking.ranked), (response.failed, ranking.failed)):
        for index in indices:
            _fill_item(entries.add(index=index).item, ranking.items[index])
    _fill_timings(response.timings, ranking.result.timings)
    return response


def compare_response(comparison: Comparison) -> scoring_pb2.CompareResponse:
    response = scoring_pb2.CompareResponse(
        request_id=comparison.result.request_id,
        margin=comparison.margin,
        probability_a=comparison.probability_a,
    )
    _fill_version(response.model, comparison.result)
    _fill_item(response.a, comparison.a)
    _fill_item(response.b, comparison.b)
    _fill_timings(response.timings, comparison.result.timings)
    return response


def _fill_version(message: scoring_pb2.ModelVersion, result: ScoreResult) -> None:
    message.name = result.model
    message.version = result.version
    message.attributes.extend(result.attributes)
    for name, version in result.members:
        message.members.add(name=name, version=version)


def _fill_item(message: scoring_pb2.ItemScore, item: ItemScore) -> None:
    message.kind = item.kind.value
    message.num_prompt_tokens = item.num_prompt_tokens
    message.num_response_tokens = item.num_response_tokens
    message.num_cached_tokens = item.num_cached_tokens
    message.truncated = item.truncated
    if item.score is not None:
        message.score = item.score
        message.raw_score = item.score if item.raw is None else item.raw
        if item.steps:
            message.step_scores.extend(item.steps)
        if item.attributes:
            message.attributes.extend(item.attributes)
        if item.std is not None:
            message.std = item.std
        if item.members is not None:
            message.ensemble.mean, message.ensemble.min = item.members.mean, item.members.min
            message.ensemble.scores.extend(item.members.scores)
            message.ensemble.raw_scores.extend(item.members.raw_scores)
        message.status.SetInParent()
    else:
        assert item.failure is not None
        message.status.CopyFrom(status_pb2.Status(code=int(item.failure.code), message=item.failure.message))


def _fill_timings(message: scoring_pb2.StageTimings, timings: Timings) -> None:
    message.admission_s = timings.admission_s
    message.tokenization_s = timings.tokenization_s
    message.queue_s = timings.queue_s
    message.compute_s = timings.compute_s
    message.total_s = timings.total_s


def model(live: LiveModel) -> models_pb2.Model:
    message = models_pb2.Model(
        name=live.name,
        state=STATES[live.state],
        message=live.message,
        source=live.source,
        num_restarts=live.num_restarts,
    )
    info = live.info
    if info is not None:
        message.version, message.architecture = live.version, info.architecture
        message.path, message.path_reason = PATHS[info.path], info.path_reason
        message.dtype, message.device = info.dtype, info.device
        message.num_parameters, message.max_length = info.num_parameters, info.max_length
        message.vocab_size, message.canary_error = info.vocab_size, info.canary_error
        message.prefix_cache_tokens = info.prefix_cache_tokens
        message.attributes.extend(info.attributes)
        message.scores_steps = info.steps is not None
    tokenizer = live.encoder.tokenizer if live.encoder is not None else None
    if tokenizer is not None:
        message.has_tokenizer = True
        message.has_chat_template = tokenizer.template is not None
        message.prompt_tokenized_once = tokenizer.cuts_are_exact
    return message


def ensemble(served: Ensemble, registry: Registry) -> models_pb2.Model:
    """It is in the state of its members that is furthest from serving."""
    members = {model.name: model for model in registry.models if model.name in served.members}
    missing = [name for name in served.members if name not in members]
    away = [model for model in members.values() if model.state is not ModelState.SERVING]
    message = models_pb2.Model(name=served.name, members=served.members, aggregate=str(served.aggregate))
    if missing:
        message.state, message.message = models_pb2.MODEL_STATE_FAILED, f"not served: {', '.join(missing)}"
    elif away:
        message.state = STATES[away[0].state]
        message.message = f"member '{away[0].name}': {away[0].message}".removesuffix(": ")
    else:
        message.state = models_pb2.MODEL_STATE_SERVING
        versions = [(name, members[name].version) for name in served.members]
        message.version = served.version(versions)
        each = [model(members[name]) for name in served.members]
        message.max_length = min(member.max_length for member in each)  # what every member can score
        message.has_tokenizer = all(member.has_tokenizer for member in each)
        message.has_chat_template = all(member.has_chat_template for member in each)
    return message


def swap_plan(message: models_pb2.SwapModelRequest) -> SwapPlan:
    """Raises InvalidRequest, naming the field."""
    canaries = tuple(
        CanaryPair(
            _prompt(pair.prompt, f"canaries[{i}].prompt"),
            _response(pair.better, f"canaries[{i}].better"),
            _response(pair.worse, f"canaries[{i}].worse"),
        )
        for i, pair in enumerate(message.canaries)
    )
    return SwapPlan(
        name=message.name,
        source=message.source,
        dtype=checked_dtype(message.dtype),
        canaries=canaries,
        min_canary_accuracy=message.min_canary_accuracy if message.HasField("min_canary_accuracy") else 1.0,
        shadow_share=message.shadow_share,
        shadow_requests=message.shadow_requests or 100,
        shadow_timeout_s=message.shadow_timeout_s or 60.0,
        min_rank_correlation=message.min_rank_correlation if message.HasField("min_rank_correlation") else None,
        keep_previous=message.keep_previous,
    )


def checked_dtype(dtype: str) -> str:
    """Raises InvalidRequest."""
    if dtype not in ("", "auto", "float32", "bfloat16", "float16"):
        raise InvalidRequest("dtype", f"{dtype!r} is not one of auto, float32, bfloat16, float16")
    return dtype or "auto"


def swap_response(report: SwapReport, num_canaries: int) -> models_pb2.SwapModelResponse:
    return models_pb2.SwapModelResponse(
        model=model(report.model),
        previous_version=report.previous_version,
        num_canaries=num_canaries,
        num_canaries_right=report.num_canaries_right,
        num_shadow_requests=report.num_shadow_requests,
        rank_correlation=report.rank_correlation,
    )
