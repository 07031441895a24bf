"""Best-of-N and pairwise comparison on top of Score."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from rewardserve.errors import InvalidRequest, ItemFailed
from rewardserve.evaluation.calibration_file import log_odds, sigmoid
from rewardserve.service.score import ScoringService
from rewardserve.types import ItemScore, ScoreKind, ScoreRequest, ScoreResult, as_answered


@dataclass(frozen=True, slots=True)
class Ranking:
    ranked: tuple[int, ...]  # indices of scored responses, best first, at most top_k
    failed: tuple[int, ...]
    items: tuple[ItemScore, ...]
    result: ScoreResult


@dataclass(frozen=True, slots=True)
class Comparison:
    a: ItemScore
    b: ItemScore
    margin: float
    probability_a: float
    result: ScoreResult


async def rank(service: ScoringService, request: ScoreRequest, top_k: int) -> Ranking:
    """`request` has one group. `top_k` 0 means all. Equal scores keep the order sent."""
    if top_k < 0:
        raise InvalidRequest("top_k", f"{top_k} is negative; 0 means all")
    with _fields_of_one_group({"groups[0].": "", "groups": "responses"}):
        result = await service.score(request)
    items = result.groups[0].items
    scores = {index: as_answered(item.score) for index, item in enumerate(items) if item.score is not None}
    order = sorted(scores, key=lambda index: -scores[index])
    failed = tuple(index for index in range(len(items)) if index not in scores)
    return Ranking(tuple(order[: top_k or None]), failed, items, result)


async def compare(service: ScoringService, request: ScoreRequest) -> Comparison:
    """`request` has one group of two responses, a and b. Raises ItemFailed if one has no score."""
    renames = {
        "groups[0].responses[0]": "response_a",
        "groups[0].responses[1]": "response_b",
        "groups[0].": "",
        "groups": "response_a",
    }
    with _fields_of_one_group(renames):
        result = await service.score(request)
    a, b = result.groups[0].items
    for name, item in (("response_a", a), ("response_b", b)):
        if item.failure is not None:
            raise ItemFailed(item.failure.code.name, name, item.failure.message)
    assert a.score is not None and b.score is not None
    # Bradley and Terry (1952), whose margin is one of log-odds, or what was fitted to such margins.
    probability_a = (result.curve or sigmoid)(_strength(a.score, a.kind) - _strength(b.score, b.kind))
    return Comparison(a, b, a.score - b.score, probability_a, result)


def _strength(score: float, kind: ScoreKind) -> float:
    return log_odds(score) if kind is ScoreKind.PROBABILITY else score


@contextlib.contextmanager
def _fields_of_one_group(renames: dict[str, str]) -> Iterator[None]:
    """Errors name the fields of the caller's own message, not of the Score request made from it."""
    try:
        yield
    except InvalidRequest as error:
        for prefix, name in renames.items():
            if error.field.startswith(prefix):
                raise InvalidRequest(name + error.field.removeprefix(prefix), error.description) from None
        raise
