"""One request's journey, what the metrics say of it, and what is made of its scores."""

import asyncio
import itertools
import math
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rewardserve.engine.base import BatchReport
from rewardserve.errors import DeadlineExceeded, InvalidRequest, ItemFailed
from rewardserve.evaluation.calibration_file import sigmoid
from rewardserve.service.rank import compare, rank
from rewardserve.text.encoder import Abandoned
from rewardserve.types import ItemCode, ItemFailure, Overflow, PromptGroup, ScoreRequest, TokenIds

examples = settings(max_examples=100)

finite = st.floats(-3e38, 3e38, allow_nan=False)


async def served(make_house):
    house = make_house()
    await house.serve()
    return house


async def test_the_reply_has_every_group_and_response_in_the_order_sent(house, tools) -> None:
    await house.serve()
    groups = tuple(
        PromptGroup(f"id-{g}", tools.pack(1, g), tuple(tools.pack(10 * g + r, 9) for r in range(g + 1)))
        for g in range(4)
    )
    result = await house.service.score(ScoreRequest("mine", "m", groups))
    assert (result.request_id, result.model, result.version) == ("mine", "m", "v1")
    assert [group.id for group in result.groups] == ["id-0", "id-1", "id-2", "id-3"]
    scores = [[item.score for item in group.items] for group in result.groups]
    assert scores == [[10 * g + r for r in range(g + 1)] for g in range(4)]
    assert all((i.num_prompt_tokens, i.num_response_tokens) == (2, 2) for g in result.groups for i in g.items)


lengths = st.lists(st.integers(0, 130), min_size=1, max_size=6)


@examples
@given(groups=st.lists(lengths, min_size=1, max_size=3), overflow=st.sampled_from(Overflow))
def test_failed_cut_and_fitting_responses_together_keep_their_scores_and_the_metrics_agree(
    make_house, tools, groups: list[list[int]], overflow: Overflow
) -> None:
    async def go() -> None:
        house = await served(make_house)
        numbers = itertools.count()
        sent = tuple(
            PromptGroup("", tools.pack(*range(1, 31)), tuple(tools.pack(*([next(numbers)] * n)) for n in lengths))
            for lengths in groups
        )
        result = await house.service.score(ScoreRequest("r", "", sent, overflow))
        items = [item for group in result.groups for item in group.items]
        assert all((item.score is None) != (item.failure is None) for item in items)
        for number, (item, length) in enumerate(zip(items, itertools.chain(*groups), strict=True)):
            if item.score is not None:
                assert item.score == number, "scores are where they belong"
                assert item.truncated == (30 + length > 100)
        scored = [item for item in items if item.score is not None]
        assert house.sample("pairs_total") == len(scored)
        for bound in ("-20.0", "0.0", "1.0", "5.0", "40.0", "+Inf"):
            assert house.sample("score_bucket", le=bound) == sum(item.score <= float(bound) for item in scored)
        tokens = sum(item.num_prompt_tokens + item.num_response_tokens for item in scored)
        assert house.sample("tokens_total") == tokens
        for code in ("OUT_OF_RANGE", "INVALID_ARGUMENT"):
            failed = [i for i in items if i.failure is not None and i.failure.code.name == code]
            assert (house.sample("item_failures_total", code=code) or 0) == len(failed)

    asyncio.run(go())


async def test_when_every_response_has_failed_the_engine_is_left_alone(house, tools) -> None:
    await house.serve()
    result = await house.service.score(tools.request(TokenIds(b""), tools.pack(*range(1, 200))))
    assert not house.engines["m"].seen
    assert [item.failure.code.name for item in result.groups[0].items] == ["INVALID_ARGUMENT", "OUT_OF_RANGE"]


async def test_an_engines_failure_of_one_item_reaches_the_reply(house, tools) -> None:
    await house.serve()
    house.engines["m"].scores = [1.0, tools.failure("not finite"), 2.0]
    items = (await house.service.score(tools.request(*[tools.pack(4)] * 3))).groups[0].items
    assert [item.score for item in items] == [1.0, None, 2.0]
    assert items[1].failure == tools.failure("not finite")
    assert house.sample("item_failures_total", code="OUT_OF_RANGE") == 1


async def test_what_truncation_left_nothing_to_read_of_was_too_long(house, tools) -> None:
    await house.serve()
    nothing = ItemFailure(ItemCode.INVALID_ARGUMENT, "no step tag: nothing to read")
    house.engines["m"].scores = [nothing, nothing]
    request = tools.request(tools.pack(4), tools.pack(*range(1, 200)))
    request = replace(request, overflow=Overflow.TRUNCATE_RESPONSE_RIGHT)
    items = (await house.service.score(request)).groups[0].items
    assert [(item.truncated, item.failure.code.name) for item in items] == [
        (False, "INVALID_ARGUMENT"),
        (True, "OUT_OF_RANGE"),
    ]
    assert items[1].failure.message == "truncated to max_length: no step tag: nothing to read"


async def test_a_final_score_that_fp32_cannot_hold_fails_its_item_and_is_in_no_sum(make_house, tools) -> None:
    house = make_house()
    house.engines["m"] = tools.Engine(replace(tools.INFO, scale=1e-30))
    await house.serve()
    house.engines["m"].scores = [1.0, 1e9, -1e300]  # the last one overflows already as a double
    items = (await house.service.score(tools.request(*[tools.pack(4)] * 3))).groups[0].items
    assert [item.score for item in items] == [pytest.approx(1e30), None, None]
    assert [item.failure and item.failure.code.name for item in items] == [None, "INTERNAL", "INTERNAL"]
    assert house.sample("score_total") == pytest.approx(1e30) and house.sample("pairs_total") == 1
    assert house.sample("item_failures_total", code="INTERNAL") == 2


async def test_stage_timings_are_the_replys_and_the_histograms_alike(house, tools) -> None:
    await house.serve()
    result = await house.service.score(tools.request(received_at=time.monotonic() - 1))
    timings = result.timings
    assert timings.admission_s >= 1 and timings.total_s >= timings.admission_s + timings.tokenization_s
    assert (timings.queue_s, timings.compute_s) == (0.25, 0.5)
    for stage in ("admission", "tokenization", "queue", "compute", "total"):
        assert house.sample("stage_seconds_sum", stage=stage) == getattr(timings, f"{stage}_s")
        assert house.sample("stage_seconds_count", stage=stage) == 1


async def test_what_the_engine_reports_of_a_batch_is_in_the_metrics(house) -> None:
    await house.serve()
    count, total = house.sample("batch_tokens_count"), house.sample("batch_tokens_sum")
    report = BatchReport(
        num_tokens=700,
        num_pairs=3,
        num_prompt_tokens=500,
        num_cached_tokens=128,
        compute_s=0.1,
        queued_requests=4,
        queued_tokens=99,
    )
    house.engines["m"].listener.on_batch(report)
    assert house.sample("batch_tokens_count") == count + 1 and house.sample("batch_tokens_sum") == total + 700
    assert house.sample("prefix_cache_tokens_total", result="hit") == 128
    assert house.sample("prefix_cache_tokens_total", result="miss") == 500
    assert house.sample("queued_requests") == 4 and house.sample("queued_tokens") == 99


async def test_priority_deadline_and_client_reach_the_engine_under_a_name_of_its_own(house, tools) -> None:
    await house.serve()
    deadline = time.monotonic() + 60
    for _ in range(2):
        await house.service.score(tools.request(priority=7, deadline=deadline, client="me"))
    first, second = house.engines["m"].seen
    assert (first.priority, first.deadline, first.client) == (7, deadline, "me")
    assert first.request_id != second.request_id, "two requests may carry the same id of their callers"


async def test_a_deadline_that_passes_cancels_the_engines_work(house, tools) -> None:
    await house.serve()
    engine = house.engines["m"]
    cancelled = []

    async def wait(request):
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    engine.score = wait
    for deadline in (time.monotonic() + 0.02, time.monotonic() - 1):
        with pytest.raises(DeadlineExceeded):
            await house.service.score(tools.request(deadline=deadline))
    assert cancelled


# -- rank ----------------------------------------------------------------------------------------------------------


@examples
@given(
    scores=st.lists(st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0]), finite, st.none()), min_size=1, max_size=12),
    top_k=st.integers(0, 15),
)
@example(scores=[1.0, 1.0, 2.0, 2.0], top_k=0)
@example(scores=[None, None], top_k=1)
@example(scores=[0.3, math.nextafter(0.3, 1), 0.1], top_k=0)
def test_the_best_come_first_equal_ones_as_sent_and_failures_have_no_rank(make_house, tools, scores, top_k) -> None:
    async def go():
        house = await served(make_house)
        house.engines["m"].scores = [tools.failure() if score is None else score for score in scores]
        return await rank(house.service, tools.request(*[tools.pack(4)] * len(scores)), top_k)

    ranking = asyncio.run(go())
    scored = [i for i, score in enumerate(scores) if score is not None]
    order = sorted(scored, key=lambda i: (-np.float32(scores[i]), i))  # as the reply holds them
    assert list(ranking.ranked) == (order[:top_k] if top_k else order)
    assert list(ranking.failed) == [i for i, score in enumerate(scores) if score is None]
    assert [item.score for item in ranking.items] == scores


async def test_a_negative_top_k_is_refused_before_any_work(house, tools) -> None:
    await house.serve()
    with pytest.raises(InvalidRequest) as refused:
        await rank(house.service, tools.request(), -1)
    assert refused.value.field == "top_k" and not house.engines["m"].seen


async def test_rank_names_the_fields_of_its_own_message(make_house, tools) -> None:
    house = make_house(max_pairs_per_request=3)
    await house.serve()

    async def field(request: ScoreRequest) -> str:
        with pytest.raises(InvalidRequest) as refused:
            await rank(house.service, request, 0)
        return refused.value.field

    assert await field(tools.request(tools.pack(1), TokenIds(b"x"))) == "responses[1].token_ids"
    assert await field(tools.request(tools.pack(1), "text")) == "responses[1].text"
    assert await field(tools.request(prompt=tools.pack(-1))) == "prompt.token_ids"
    assert await field(tools.request(*[tools.pack(1)] * 4)) == "responses"
    assert await field(ScoreRequest("r", "", (PromptGroup("", tools.pack(1), ()),))) == "responses"


# -- compare -------------------------------------------------------------------------------------------------------


@examples
@given(margin=st.floats(allow_nan=False), other=st.floats(allow_nan=False))
@example(margin=1e308, other=-1e308)
@example(margin=710.0, other=-746.0)
@example(margin=float("inf"), other=float("-inf"))
def test_preference_probabilities_add_up_grow_with_the_margin_and_never_overflow(margin: float, other: float) -> None:
    p = sigmoid(margin)
    assert 0 <= p <= 1 and p + sigmoid(-margin) == pytest.approx(1, abs=1e-15)
    low, high = sorted((margin, other))
    assert sigmoid(low) <= sigmoid(high)
    assert (p >= 0.5) == (margin >= 0 or p == 0.5)
    assert sigmoid(0) == 0.5


@examples
@given(st.floats(-30, 30))
def test_the_margin_is_the_probabilitys_log_odds(margin: float) -> None:
    p = sigmoid(margin)
    assert math.log(p) - math.log(sigmoid(-margin)) == pytest.approx(margin, abs=1e-9)


@examples
@given(a=finite, b=finite)
def test_two_responses_compared_and_swapped_mirror_each_other(make_house, tools, a: float, b: float) -> None:
    async def go():
        house = await served(make_house)
        outcomes = []
        for scores in ([a, b], [b, a]):
            house.engines["m"].scores = scores
            outcomes.append(await compare(house.service, tools.request(tools.pack(4), tools.pack(5))))
        return outcomes

    one, other = asyncio.run(go())
    assert (one.a.score, one.b.score) == (a, b)
    assert one.margin == a - b == -other.margin
    assert one.probability_a + other.probability_a == pytest.approx(1, abs=1e-15)
    assert (one.probability_a >= 0.5) == (a >= b or one.probability_a == 0.5)


async def test_probabilities_are_compared_by_their_odds(make_house, tools) -> None:
    """Of two that are right with chances of 0.9 and 0.5, one of them right: 0.9 * 0.5 to 0.5 * 0.1."""
    house = make_house()
    house.engines["m"] = tools.Engine(replace(tools.INFO, is_probability=True))
    await house.serve()
    house.engines["m"].scores = [0.9, 0.5]
    found = await compare(house.service, tools.request(tools.pack(4), tools.pack(5)))
    assert (found.margin, found.probability_a) == (pytest.approx(0.4), pytest.approx(0.9))
    house.engines["m"].scores = [1.0, 0.0]
    found = await compare(house.service, tools.request(tools.pack(4), tools.pack(5)))
    assert found.probability_a == pytest.approx(1.0)


@pytest.mark.parametrize("which", [0, 1])
async def test_a_comparison_with_a_failed_response_names_it_with_its_code(house, tools, which: int) -> None:
    await house.serve()
    scores: list[float | ItemFailure] = [1.0, 1.0]
    scores[which] = tools.failure("too long by 3")
    house.engines["m"].scores = scores
    with pytest.raises(ItemFailed, match=f"response_{'ab'[which]}: too long by 3") as failed:
        await compare(house.service, tools.request(tools.pack(4), tools.pack(5)))
    assert failed.value.grpc == "OUT_OF_RANGE"


async def test_compare_names_the_fields_of_its_own_message(house, tools) -> None:
    await house.serve()

    async def field(request: ScoreRequest) -> str:
        with pytest.raises(InvalidRequest) as refused:
            await compare(house.service, request)
        return refused.value.field

    bad = TokenIds(b"xyz")
    assert await field(tools.request(bad, tools.pack(1))) == "response_a.token_ids"
    assert await field(tools.request(tools.pack(1), bad)) == "response_b.token_ids"
    assert await field(tools.request(tools.pack(1), tools.pack(1), prompt=bad)) == "prompt.token_ids"


# -- threads -------------------------------------------------------------------------------------------------------


async def test_many_ids_are_encoded_off_the_event_loop_and_few_on_it(make_house, tools) -> None:
    house = await served(make_house)
    model = house.registry.get("m")
    encode, threads = model.encoder.encode, []

    def noted(request, *abandoned):
        threads.append(threading.current_thread())
        return encode(request, *abandoned)

    model.encoder.encode = noted
    for count in (1, 2000):
        await house.service.score(tools.request(*[tools.pack(4)] * count))
    assert (threads[0] is threading.main_thread(), threads[1] is threading.main_thread()) == (True, False)


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
async def test_the_thread_that_encodes_hears_that_its_caller_has_left(house, tools, how: str) -> None:
    await house.serve()
    began, heard = threading.Event(), threading.Event()

    def encode(request, abandoned: threading.Event):
        began.set()
        if abandoned.wait(20):
            heard.set()
        raise Abandoned

    house.registry.get("m").encoder.encode = encode
    deadline = time.monotonic() + 0.05 if how == "deadline" else None
    call = asyncio.create_task(house.service.score(tools.request("text", deadline=deadline)))
    await asyncio.to_thread(began.wait, 20)
    if how == "cancelled":
        call.cancel()
    with pytest.raises((asyncio.CancelledError, DeadlineExceeded)):
        await call
    assert await asyncio.to_thread(heard.wait, 20)
    assert house.registry.get("m").admission.num_requests == 0
