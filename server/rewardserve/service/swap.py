"""Another version under the same name: loaded beside the one that serves, tried, and put in its place in one step."""

import logging
import math
import re
from dataclasses import dataclass

from rewardserve.engine.base import ADAPTED
from rewardserve.errors import InvalidRequest, SwapRefused
from rewardserve.service.live_model import LiveModel, ModelState, Previous
from rewardserve.service.registry import Registry
from rewardserve.service.score import ScoringService
from rewardserve.service.shadow import Shadow, mean_rank_correlation
from rewardserve.types import Prompt, PromptGroup, Response, ScoreRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CanaryPair:
    """Two responses of which the new version must score the first higher."""

    prompt: Prompt
    better: Response
    worse: Response


@dataclass(frozen=True, slots=True)
class SwapPlan:
    name: str
    source: str
    dtype: str = "auto"
    canaries: tuple[CanaryPair, ...] = ()
    min_canary_accuracy: float = 1.0
    shadow_share: float = 0.0  # of live requests, scored by both before the swap
    shadow_requests: int = 100
    shadow_timeout_s: float = 60.0
    min_rank_correlation: float | None = None  # Spearman's, of the shadowed scores
    keep_previous: bool = False  # loaded, so that a rollback takes no time


@dataclass(frozen=True, slots=True)
class SwapReport:
    model: LiveModel
    previous_version: str
    num_canaries_right: int
    num_shadow_requests: int
    rank_correlation: float | None


async def swap(service: ScoringService, registry: Registry, plan: SwapPlan, grace_s: float) -> SwapReport:
    """Replies when the new version serves and the old one has finished what it had under way.

    Raises SwapRefused, and all stays as it was, if the new version does not pass; LoadFailed, ModelNotFound likewise.
    """
    _check(plan)
    with registry.swapping(plan.name):
        return await _swap(service, registry, plan, grace_s)


async def _swap(service: ScoringService, registry: Registry, plan: SwapPlan, grace_s: float) -> SwapReport:
    old = registry.serving(plan.name)
    new = await registry.load_beside(old, plan.source, plan.dtype)
    try:
        old.check_numbers(new.no_number)
        num_right = await _try_canaries(service, new, plan)
        shadow = await _shadowed(service, old, new, plan)
    except BaseException:
        await new.engine.stop()
        raise
    previous_version = old.version  # now: its weights may have been updated while the new one was loading
    log.info("swapping %s: version %s to %s", plan.name, previous_version, new.version)
    _say_if_without_text(old, new)
    await registry.flip(old, new, grace_s, plan.keep_previous)
    return SwapReport(
        new,
        previous_version,
        num_right,
        shadow.num_requests,
        mean_rank_correlation(shadow.groups),
    )


def _say_if_without_text(old: LiveModel, new: LiveModel) -> None:
    """Trainers save weights alone; who sends ids only need not mind."""
    assert old.info is not None and new.info is not None
    if old.info.text is not None and new.info.text is None:
        log.warning(
            "%s took texts, and its version from %s does not (%s): they will be refused. Copy the tokenizer's files "
            "there and swap again, or roll back",
            *(new.name, new.source, new.info.text_missing_reason),
        )


async def rollback(registry: Registry, name: str, grace_s: float) -> LiveModel:
    """The version before the last swap serves again: at once if it was kept, else when it is loaded."""
    with registry.swapping(name):
        return await _roll_back(registry, name, grace_s)


async def _roll_back(registry: Registry, name: str, grace_s: float) -> LiveModel:
    current = registry.serving(name)
    previous = current.previous
    if previous is None:
        raise SwapRefused(f"model '{name}' was not swapped; there is nothing to go back to")
    kept = previous.kept
    if kept is not None and kept.state is ModelState.FAILED:
        kept = None  # its engine died for good; it is loaded anew
    if kept is not None:
        kept.check_serving()
    back = kept or await _loaded_again(registry, current, previous)
    await registry.flip(current, back, grace_s, keep_previous=previous.kept is not None)
    return back


async def _loaded_again(registry: Registry, current: LiveModel, previous: Previous) -> LiveModel:
    """Raises SwapRefused if another version lies there by now: trainers write one checkpoint over another."""
    back = await registry.load_beside(current, previous.source, previous.dtype)
    assert back.info is not None
    found, wanted = back.info.version, previous.version
    if found.removesuffix(ADAPTED) != wanted.removesuffix(ADAPTED):  # which only says how its adapter is applied
        await back.engine.stop()
        raise SwapRefused(
            f"{previous.source} is not what it was: version {found}, not {wanted}; swap to a folder that holds it, "
            "and have the next swap keep the previous version loaded"
        )
    return back


def _check(plan: SwapPlan) -> None:
    if not plan.source:
        raise InvalidRequest("source", "must name a local folder or a hub model")
    for field, value in (("min_canary_accuracy", plan.min_canary_accuracy), ("shadow_share", plan.shadow_share)):
        if not 0 <= value <= 1:
            raise InvalidRequest(field, f"{value:g} is not between 0 and 1")
    if plan.shadow_requests < 0:
        raise InvalidRequest("shadow_requests", f"{plan.shadow_requests} is negative; 0: the default")
    if not 0 <= plan.shadow_timeout_s < math.inf:
        raise InvalidRequest(
            "shadow_timeout_s", f"{plan.shadow_timeout_s} is no number of seconds; 0 means the default"
        )
    if plan.min_rank_correlation is not None and not -1 <= plan.min_rank_correlation <= 1:
        raise InvalidRequest("min_rank_correlation", f"{plan.min_rank_correlation:g} is not between -1 and 1")
    if plan.min_rank_correlation is not None and not plan.shadow_share:
        raise InvalidRequest("min_rank_correlation", "is of shadowed requests; give shadow_share too")


async def _try_canaries(service: ScoringService, new: LiveModel, plan: SwapPlan) -> int:
    """How many pairs the new version ranks right. Raises SwapRefused if these are too few, or one has no score."""
    if not plan.canaries:
        return 0
    groups = tuple(PromptGroup("", pair.prompt, (pair.better, pair.worse)) for pair in plan.canaries)
    try:
        result = await service.score_with(new, ScoreRequest("canaries", plan.name, groups))
    except InvalidRequest as error:
        raise InvalidRequest(_of_canaries(error.field), error.description) from None
    num_right = 0
    for number, group in enumerate(result.groups):
        better, worse = group.items
        for item in (better, worse):
            if item.failure is not None:
                raise SwapRefused(f"canaries[{number}] has no score: {item.failure.message}")
        assert better.score is not None and worse.score is not None
        num_right += better.score > worse.score
    if num_right / len(groups) < plan.min_canary_accuracy:  # 0.56 times 25 is more than 14
        raise SwapRefused(
            f"the new version ranks {num_right} of {len(groups)} canary pairs right, "
            f"and {plan.min_canary_accuracy:.0%} were asked for; the old one goes on serving"
        )
    return num_right


def _of_canaries(field: str) -> str:
    """Errors name the fields of the caller's own message, not of the Score request made from it."""
    field = re.sub(r"^groups\[(\d+)\]", r"canaries[\1]", field)
    return field.replace(".responses[0]", ".better", 1).replace(".responses[1]", ".worse", 1)


async def _shadowed(service: ScoringService, old: LiveModel, new: LiveModel, plan: SwapPlan) -> Shadow:
    shadow = Shadow(lambda request: service.score_with(new, request), plan.shadow_share, plan.shadow_requests)
    if not plan.shadow_share:
        return shadow
    old.shadow = shadow
    try:
        await shadow.wait(plan.shadow_timeout_s)
    finally:
        old.shadow = None
    _check_shadow(shadow, plan)
    return shadow


def _check_shadow(shadow: Shadow, plan: SwapPlan) -> None:
    """Raises SwapRefused."""
    if shadow.num_failed:
        raise SwapRefused(
            f"in {shadow.num_requests} shadowed requests the new version failed {shadow.num_failed} times to score what"
            f" the old one had scored, at last: {shadow.failure}; the old one goes on serving"
        )
    wanted, found = plan.min_rank_correlation, mean_rank_correlation(shadow.groups)
    if wanted is None:
        return
    if shadow.num_requests < plan.shadow_requests:
        raise SwapRefused(
            f"{shadow.num_requests} of {plan.shadow_requests} requests were shadowed in {plan.shadow_timeout_s:g} s, "
            "too few for a rank correlation; raise shadow_timeout_s or shadow_share, or ask for fewer shadow_requests"
        )
    if found is None or found < wanted:
        told = "no order was compared" if found is None else f"it is {found:.3f} over {len(shadow.groups)} groups"
        raise SwapRefused(f"rank correlation with the old version: {told}, {wanted:g} was asked for")
