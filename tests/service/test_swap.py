"""A version takes another's place only if it serves, scores what the other scores, and was tried as often as asked."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
from rewardserve.errors import InvalidRequest, LoadFailed, SwapRefused, Unavailable
from rewardserve.service.live_model import LiveModel
from rewardserve.service.swap import CanaryPair, SwapPlan, rollback, swap
from rewardserve.types import ItemCode, ItemFailure, ScoreRequest, ScoreResult, TextSpec


@pytest.fixture
def engines(house, tools, monkeypatch):
    """Of the versions, in the order in which they were loaded."""
    made = []

    def make(name: str, source: str, dtype: str):
        made.append(tools.Engine())
        return made[-1]

    monkeypatch.setattr(house.registry, "_make_engine", make)
    return made


async def swapped(house, tools, engines, plan: SwapPlan, change: Callable[[], object]) -> object:
    """What becomes of a swap under traffic, with `change` made when the new version is loaded."""
    ending = asyncio.create_task(swap(house.service, house.registry, plan, grace_s=1))
    async with asyncio.timeout(30):
        while len(engines) < 2 or not engines[1]._running:
            await asyncio.sleep(0)
        change()
        while not ending.done():
            await house.service.score(tools.request())
            await asyncio.sleep(0)
    return await ending


async def still_serves(house, tools, old: LiveModel, engines) -> None:
    assert house.registry.get("m") is old
    assert (await house.service.score(tools.request())).groups[0].items[0].score is not None
    assert [engine.num_stops for engine in engines] == [0, 1]


@pytest.mark.parametrize("fails", ["whole", "in one item"])
async def test_one_that_fails_what_the_other_scores_is_refused(house, tools, engines, fails) -> None:
    old = await house.serve()

    def break_it() -> None:
        if fails == "whole":
            engines[1].fails_to_score = Unavailable("its device hangs")
        else:
            engines[1].scores = [ItemFailure(ItemCode.INTERNAL, "its device hangs")] * 9

    plan = SwapPlan("m", "/models/new", shadow_share=1.0, shadow_requests=3)
    with pytest.raises(SwapRefused, match="to score what the old one had scored, at last: its device hangs"):
        await swapped(house, tools, engines, plan, break_it)
    await still_serves(house, tools, old, engines)


NAN = ItemFailure(ItemCode.INTERNAL, "the model's score is nan, not a number", is_of_the_score=True)


async def test_one_whose_weights_have_become_nan_is_refused(house, tools, engines, monkeypatch) -> None:
    old = await house.serve()

    def make(name: str, source: str, dtype: str):
        engines.append(tools.Engine())
        engines[-1].warm_up_failure = NAN
        return engines[-1]

    monkeypatch.setattr(house.registry, "_make_engine", make)
    with pytest.raises(LoadFailed, match=r"no score for an input .* score is nan, .* may have become NaN in training"):
        await swap(house.service, house.registry, SwapPlan("m", "/models/new"), grace_s=1)
    await still_serves(house, tools, old, engines)


async def test_one_that_has_no_number_where_the_other_has_none_either_may_serve(house, tools, engines) -> None:
    old = await house.serve()
    old.no_number = NAN.message
    plan = SwapPlan("m", "/models/new")
    assert (await swap(house.service, house.registry, plan, grace_s=1)).model.source == "/models/new"


async def test_one_whose_engine_has_died_for_good_is_refused_however_well_it_scored(house, tools, engines) -> None:
    old, score_with = await house.serve(), house.service.score_with

    async def score_and_die(model: LiveModel, request: ScoreRequest) -> ScoreResult:
        result = await score_with(model, request)
        engines[1].listener.on_failed("died too often")
        return result

    house.service.score_with = score_and_die
    plan = SwapPlan("m", "/models/new", shadow_share=1.0, shadow_requests=1)
    with pytest.raises(SwapRefused, match="the new version is failed: died too often; the old one goes on serving"):
        await swapped(house, tools, engines, plan, lambda: None)
    await still_serves(house, tools, old, engines)


async def test_a_correlation_of_fewer_requests_than_were_asked_for_is_none(house, tools, engines) -> None:
    old = await house.serve()
    plan = SwapPlan(
        "m", "/models/new", shadow_share=1.0, shadow_requests=10**6, shadow_timeout_s=0.2, min_rank_correlation=0.9
    )
    with pytest.raises(SwapRefused, match=r"of 1000000 requests were shadowed in 0\.2 s, too few"):
        await swapped(house, tools, engines, plan, lambda: None)
    await still_serves(house, tools, old, engines)


@pytest.mark.parametrize("texts", [True, False])
async def test_a_version_of_weights_alone_is_told_of_where_the_one_before_took_texts(
    house, tools, engines, caplog, texts: bool
) -> None:
    old = await house.serve()
    if texts:
        old.info = replace(old.info, text=TextSpec("{}", None, {}, None))
    await swap(house.service, house.registry, SwapPlan("m", "/models/weights"), grace_s=1)
    told = [line for line in caplog.messages if "/models/weights does not" in line and "will be refused" in line]
    assert len(told) == texts


@pytest.mark.parametrize("adapted", ["", "-adapted"])
async def test_a_rollback_puts_no_other_version_in_the_place_of_the_one_before(
    house, tools, engines, adapted: str
) -> None:
    """A trainer wrote the new one over it: what lies there now is what was to be left."""
    old = await house.serve()
    old.info = replace(old.info, version=f"v1{adapted}")
    await swap(house.service, house.registry, SwapPlan("m", old.source), grace_s=1)
    new = house.registry.get("m")
    new.info = replace(new.info, version="v2")
    make = house.registry._make_engine
    house.registry._make_engine = lambda *of: engines.append(tools.Engine(new.info)) or engines[-1]
    with pytest.raises(SwapRefused, match=f"/models/m is not what it was: version v2, not v1{adapted};"):
        await rollback(house.registry, "m", grace_s=1)
    assert house.registry.get("m") is new and engines[-1].num_stops == 1
    house.registry._make_engine = make
    assert (await rollback(house.registry, "m", grace_s=1)).info.version == "v1"


async def test_the_share_of_canaries_that_was_asked_for_is_enough(house, tools, engines) -> None:
    """0.56 * 25 is 14.000000000000002."""
    await house.serve()
    right, wrong = (CanaryPair(tools.pack(1), tools.pack(a), tools.pack(b)) for a, b in ((3, 2), (2, 3)))
    plan = SwapPlan("m", "/models/new", canaries=(right,) * 14 + (wrong,) * 11, min_canary_accuracy=0.56)
    assert (await swap(house.service, house.registry, plan, grace_s=1)).num_canaries_right == 14
    with pytest.raises(SwapRefused, match="ranks 14 of 25 canary pairs right, and 57%"):
        await swap(house.service, house.registry, replace(plan, min_canary_accuracy=0.57), grace_s=1)


@pytest.mark.parametrize(("part", "field"), [(0, "prompt"), (1, "better"), (2, "worse")])
async def test_a_canary_that_no_model_could_score_is_named_as_it_was_sent(
    house, tools, engines, part: int, field: str
) -> None:
    old, sent = await house.serve(), [tools.pack(1), tools.pack(2), tools.pack(3)]
    good, sent[part] = CanaryPair(*sent), tools.pack(10**6)
    with pytest.raises(InvalidRequest) as refused:
        await swap(house.service, house.registry, SwapPlan("m", "/n", canaries=(good, CanaryPair(*sent))), grace_s=1)
    assert refused.value.field == f"canaries[1].{field}.token_ids"
    await still_serves(house, tools, old, engines)


@pytest.mark.parametrize(
    "wrong", [{"shadow_requests": -1}, {"shadow_timeout_s": float("nan")}, {"min_rank_correlation": float("nan")}]
)
async def test_a_number_that_is_none_is_refused_by_name_before_anything_is_loaded(
    house, tools, engines, wrong: dict[str, float]
) -> None:
    await house.serve()
    with pytest.raises(InvalidRequest) as refused:
        await swap(house.service, house.registry, SwapPlan("m", "/n", shadow_share=1.0, **wrong), grace_s=1)
    assert refused.value.field in wrong and len(engines) == 1
