"""The client's types <-> protobuf. The only file that knows both.

Replies are checked against what was sent: a reply that does not fit is a ServerError, for scores that have slipped by
one position are worse than none.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

import grpc
from google.rpc import status_pb2

from rewardserve.client import types
from rewardserve.client.errors import InvalidRequest, ServerError, VersionMismatch
from rewardserve.client.token_ids import TokenIds
from rewardserve.client.translate import CODES
from rewardserve.v1 import models_pb2, scoring_pb2

_KINDS = {number: word.removeprefix("SCORE_KIND_").lower() for word, number in scoring_pb2.ScoreKind.items()}
_NO_MODEL = scoring_pb2.ModelVersion()
_OK = types.Status(grpc.StatusCode.OK)
_STAGES = attrgetter(*(f.name for f in fields(types.Timings)))
_OVERFLOWS = {
    "error": scoring_pb2.OVERFLOW_ERROR,
    "truncate_prompt_left": scoring_pb2.OVERFLOW_TRUNCATE_PROMPT_LEFT,
    "truncate_response_right": scoring_pb2.OVERFLOW_TRUNCATE_RESPONSE_RIGHT,
}


_REDUCTIONS = {
    "min": scoring_pb2.STEP_REDUCTION_MIN,
    "mean": scoring_pb2.STEP_REDUCTION_MEAN,
    "product": scoring_pb2.STEP_REDUCTION_PRODUCT,
    "last": scoring_pb2.STEP_REDUCTION_LAST,
}


@dataclass(frozen=True, slots=True)
class Part:
    """What one endpoint answered to its share of the groups; `indices` are their positions in the caller's list."""

    endpoint: str
    indices: tuple[int, ...]
    reply: scoring_pb2.ScoreResponse


# To the wire


def options(
    overflow: types.Overflow, priority: int, steps: types.StepOptions | None = None, cache_response: bool = False
) -> scoring_pb2.ScoreOptions:
    if overflow not in _OVERFLOWS:
        raise ValueError(f"overflow is one of {sorted(_OVERFLOWS)}, not {overflow!r}")
    wanted = scoring_pb2.ScoreOptions(overflow=_OVERFLOWS[overflow], priority=priority, cache_response=cache_response)
    if steps is not None:
        if steps.reduction not in _REDUCTIONS:
            raise ValueError(f"reduction is one of {sorted(_REDUCTIONS)}, not {steps.reduction!r}")
        wanted.granularity = scoring_pb2.GRANULARITY_STEP
        wanted.step_reduction, wanted.step_separator = _REDUCTIONS[steps.reduction], steps.separator
    return wanted


def group(value: types.Group) -> scoring_pb2.Group:
    if not isinstance(value, types.Group):
        raise TypeError(f"expected a Group, not {type(value).__name__}")
    responses = [response(item) for item in value.responses]
    return scoring_pb2.Group(id=value.id, prompt=prompt(value.prompt), responses=responses)


def prompt(value: types.Prompt) -> scoring_pb2.Prompt:
    if isinstance(value, str):
        return scoring_pb2.Prompt(text=value)
    if isinstance(value, TokenIds):
        return scoring_pb2.Prompt(token_ids=value.data)
    if isinstance(value, types.Rendered):
        return scoring_pb2.Prompt(rendered=value.text)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return scoring_pb2.Prompt(conversation=scoring_pb2.Conversation(messages=[_chat(turn) for turn in value]))
    raise TypeError(f"a prompt is a str, messages, TokenIds or Rendered, not {type(value).__name__}")


def _chat(turn: types.ChatMessage | Mapping[str, str]) -> scoring_pb2.ChatMessage:
    if isinstance(turn, types.ChatMessage):
        return scoring_pb2.ChatMessage(role=turn.role, content=turn.content)
    if not isinstance(turn, Mapping):
        raise TypeError(f"a message is a mapping or a ChatMessage, not {type(turn).__name__}; wrap ids in TokenIds")
    if set(turn) != {"role", "content"}:  # dropping a key in silence would score another conversation
        raise ValueError(f"a message has the keys 'role' and 'content', not {sorted(turn)}")
    if not all(isinstance(text, str) for text in turn.values()):
        raise TypeError("the role and the content of a message are text")
    return scoring_pb2.ChatMessage(role=turn["role"], content=turn["content"])


def response(value: types.Response) -> scoring_pb2.Response:
    if isinstance(value, str):
        return scoring_pb2.Response(text=value)
    if isinstance(value, TokenIds):
        return scoring_pb2.Response(token_ids=value.data)
    if isinstance(value, types.Steps):
        if value.token_ids is not None:
            return scoring_pb2.Response(token_ids=value.token_ids.data, step_ends=value.ends)
        return scoring_pb2.Response(steps=scoring_pb2.Steps(texts=value.texts))
    raise TypeError(f"a response is a str, TokenIds or Steps, not {type(value).__name__}")


def prompt_key(value: scoring_pb2.Prompt) -> bytes:
    """A digest of the prompt's content: equal in every process for equal prompts."""
    return hashlib.blake2b(value.SerializeToString(deterministic=True), digest_size=16).digest()


# From the wire


def score_result(request_id: str, sent: Sequence[scoring_pb2.Group], parts: Sequence[Part]) -> types.ScoreResult:
    """Puts the parts back into the order sent. Raises VersionMismatch, ServerError."""
    model = one_version([(part.endpoint, part.reply.model) for part in parts])
    groups = dict(pair for part in parts for pair in zip(part.indices, _groups(part, sent), strict=True))
    return types.ScoreResult(
        request_id=request_id,
        model_name=model.name,
        model_version=model.version,
        groups=tuple(groups[index] for index in range(len(sent))),
        timings=_slowest([_timings(part.reply.timings) for part in parts]),
    )


def one_version(models: Sequence[tuple[str, scoring_pb2.ModelVersion]]) -> scoring_pb2.ModelVersion:
    """The model that all of them name; `models` are (endpoint, model). Raises VersionMismatch.

    An endpoint may be there several times, and have changed its model meanwhile.
    """
    versions: dict[str, str] = {}
    for endpoint, model in models:
        version = f"{model.name} {model.version}"
        versions[endpoint if versions.get(endpoint, version) == version else f"{endpoint}, then"] = version
    if len(set(versions.values())) > 1:
        raise VersionMismatch(f"scores of different models are not mixed: {versions}", versions=versions)
    return models[0][1]


def renumber(error: InvalidRequest, indices: Sequence[int]) -> None:
    """`groups[i]` of a part becomes `groups[indices[i]]`, which is what the caller sent."""

    def of_all(text: str) -> str:
        names = {f"groups[{i}]": f"groups[{index}]" for i, index in enumerate(indices)}
        return re.sub(r"\bgroups\[\d+\]", lambda found: names.get(found[0], found[0]), text)

    error.message = of_all(error.message)
    error.violations = [(of_all(field), description) for field, description in error.violations]


def _groups(part: Part, sent: Sequence[scoring_pb2.Group]) -> list[types.GroupScore]:
    received = part.reply.groups
    if len(received) != len(part.indices):
        raise _misfit(part.endpoint, f"{len(part.indices)} groups were sent and {len(received)} came back")
    pairs = zip(part.indices, received, strict=True)
    return [_group_score(sent[index], scored, part.reply.model, part.endpoint) for index, scored in pairs]


def _group_score(
    sent: scoring_pb2.Group, scored: scoring_pb2.GroupScore, model: scoring_pb2.ModelVersion, endpoint: str
) -> types.GroupScore:
    if len(scored.items) != len(sent.responses):
        raise _misfit(endpoint, f"{len(sent.responses)} responses were sent and {len(scored.items)} came back")
    items = tuple(item_score(item, model) for item in scored.items)
    return types.GroupScore(sent.id, items, model.version)


def item_score(item: scoring_pb2.ItemScore, model: scoring_pb2.ModelVersion = _NO_MODEL) -> types.ItemScore:
    """`model` is the one that scored it."""
    score = item.score if item.HasField("score") else math.nan
    status = _item_status(item.status, score)
    return types.ItemScore(
        status=status,
        score_or_none=score if status.code is grpc.StatusCode.OK else None,
        kind=_KINDS.get(item.kind) or str(item.kind),  # a number newer than this client stands for itself
        num_prompt_tokens=item.num_prompt_tokens,
        num_response_tokens=item.num_response_tokens,
        num_cached_tokens=item.num_cached_tokens,
        truncated=item.truncated,
        raw_or_none=item.raw_score if status.code is grpc.StatusCode.OK else None,
        steps=tuple(item.step_scores),
        attributes=dict(zip(model.attributes, item.attributes, strict=False)),
        std=item.std if item.HasField("std") else None,
        members=dict(zip((member.name for member in model.members), item.ensemble.scores, strict=False)),
    )


def _item_status(status: status_pb2.Status, score: float) -> types.Status:
    if status.code:
        return types.Status(CODES.get(status.code, grpc.StatusCode.UNKNOWN), status.message)
    if not math.isfinite(score):  # the server promises that it never happens
        return types.Status(grpc.StatusCode.INTERNAL, "the server sent an item without a finite score as OK")
    return _OK


def rank_result(reply: scoring_pb2.RankResponse, num_responses: int, endpoint: str) -> types.RankResult:
    """Raises ServerError where the ranks do not fit the responses sent."""
    ranked, failed = _ranked(reply.ranked, reply.model), _ranked(reply.failed, reply.model)
    indices = [each.index for each in (*ranked, *failed)]
    if len(set(indices)) != len(indices) or not all(0 <= index < num_responses for index in indices):
        raise _misfit(endpoint, f"ranks {indices} do not fit {num_responses} responses")
    if not all(each.item.ok for each in ranked) or any(each.item.ok for each in failed):
        raise _misfit(endpoint, "a response without a score was ranked, or one with a score was not")
    return types.RankResult(
        reply.request_id, reply.model.name, reply.model.version, ranked, failed, _timings(reply.timings)
    )


def _ranked(
    items: Sequence[scoring_pb2.RankedResponse], model: scoring_pb2.ModelVersion
) -> tuple[types.RankedResponse, ...]:
    return tuple(types.RankedResponse(each.index, item_score(each.item, model)) for each in items)


def compare_result(reply: scoring_pb2.CompareResponse) -> types.CompareResult:
    a, b = (item_score(item, reply.model) for item in (reply.a, reply.b))
    both = a.ok and b.ok  # the wire's margin is 0.0 where an item failed; nobody shall read that as a tie
    return types.CompareResult(
        request_id=reply.request_id,
        model_name=reply.model.name,
        model_version=reply.model.version,
        a=a,
        b=b,
        margin_or_none=reply.margin if both else None,
        probability_a_or_none=reply.probability_a if both else None,
        timings=_timings(reply.timings),
    )


def model_info(model: models_pb2.Model, endpoint: str) -> types.ModelInfo:
    translated: dict[str, Any] = {
        "endpoint": endpoint,
        "state": _word(models_pb2.ModelState, model.state, "MODEL_STATE_"),
        "path": _word(models_pb2.ExecutionPath, model.path, "EXECUTION_PATH_"),
    }
    translated |= {"attributes": tuple(model.attributes), "members": tuple(model.members)}
    copied = {f.name: getattr(model, f.name) for f in fields(types.ModelInfo) if f.name not in translated}
    return types.ModelInfo(**copied, **translated)


def canary_pair(pair: types.CanaryPair) -> models_pb2.CanaryPair:
    return models_pb2.CanaryPair(prompt=prompt(pair.prompt), better=response(pair.better), worse=response(pair.worse))


def swap_result(reply: models_pb2.SwapModelResponse, endpoint: str) -> types.SwapResult:
    return types.SwapResult(
        model=model_info(reply.model, endpoint),
        previous_version=reply.previous_version,
        num_canaries=reply.num_canaries,
        num_canaries_right=reply.num_canaries_right,
        num_shadow_requests=reply.num_shadow_requests,
        rank_correlation=reply.rank_correlation if reply.HasField("rank_correlation") else None,
    )


def _timings(timings: scoring_pb2.StageTimings) -> types.Timings:
    return types.Timings(*_STAGES(timings))


def _slowest(timings: Sequence[types.Timings]) -> types.Timings:
    return types.Timings(*map(max, zip(*map(_STAGES, timings), strict=True)))


def _word(enum: object, number: int, prefix: str) -> str:
    """An enum's value in lower case; a number newer than this client stands for itself."""
    known = {value: name for name, value in enum.items()}  # type: ignore[attr-defined]
    return known[number].removeprefix(prefix).lower() if number in known else str(number)


def _misfit(endpoint: str, what: str) -> ServerError:
    return ServerError(f"the reply does not fit the request: {what}", endpoint=endpoint)
