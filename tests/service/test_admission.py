"""Who may come in, who is sent away for how long, and that everyone who came in is counted out."""

import asyncio
import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from rewardserve.errors import InvalidRequest, Overloaded, RewardServeError, Unavailable
from rewardserve.metrics import Metrics, ModelMetrics
from rewardserve.service.admission import Admission, Limits, estimate_tokens
from rewardserve.types import Conversation, Message, PlainText, PromptGroup, Rendered, ScoreRequest, TokenIds

examples = settings(max_examples=100)


def admission(**limits: int) -> Admission:
    return Admission(Limits(**limits), ModelMetrics(Metrics(CollectorRegistry()), "m"))


def groups(*sizes: tuple[int, ...]) -> ScoreRequest:
    """Each tuple is a group: tokens of the prompt, of each response."""
    made = tuple(
        PromptGroup("", TokenIds(bytes(4 * prompt)), tuple(TokenIds(bytes(4 * n)) for n in responses))
        for prompt, *responses in sizes
    )
    return ScoreRequest("r", "m", made)


def enter_all(door: Admission, stack: contextlib.ExitStack, *requests: ScoreRequest) -> None:
    for request in requests:
        stack.enter_context(door.admit(request))


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (ScoreRequest("r", "m", ()), "groups"),
        (groups((3,)), "groups[0].responses"),
        (groups((3, 1), (3,)), "groups[1].responses"),
        (groups((0, 1)), "groups[0].prompt"),
        (ScoreRequest("r", "m", (PromptGroup("", PlainText(""), ("x",)),)), "groups[0].prompt"),
        (ScoreRequest("r", "m", (PromptGroup("", Rendered(""), ("x",)),)), "groups[0].prompt"),
        (ScoreRequest("r", "m", (PromptGroup("", Conversation(()), ("x",)),)), "groups[0].prompt"),
    ],
)
def test_what_is_empty_is_refused_by_name(request_: ScoreRequest, field: str) -> None:
    door = admission()
    with pytest.raises(InvalidRequest) as refused, door.admit(request_):
        pass
    assert refused.value.field == field
    assert door.num_requests == 0


def test_too_many_responses_in_one_request_are_refused_with_both_numbers() -> None:
    door = admission(max_pairs_per_request=3)
    with door.admit(groups((1, 1, 1), (1, 1))):
        pass
    with pytest.raises(InvalidRequest, match=r"4 .* 3"), door.admit(groups((1, 1, 1), (1, 1, 1))):
        pass


def test_requests_up_to_the_limit_come_in_and_one_more_does_not() -> None:
    door = admission(max_queued_requests=2)
    with contextlib.ExitStack() as inside:
        enter_all(door, inside, groups((1, 1)), groups((1, 1)))
        with pytest.raises(Overloaded, match="2 requests"), door.admit(groups((1, 1))):
            pass
        assert door.num_requests == 2
    with door.admit(groups((1, 1))):
        assert door.num_requests == 1


def test_tokens_up_to_the_limit_come_in_and_one_more_does_not() -> None:
    door = admission(max_queued_tokens=10)
    with contextlib.ExitStack() as inside:
        enter_all(door, inside, groups((2, 3)), groups((2, 3)))
        with pytest.raises(Overloaded, match="10 tokens"), door.admit(groups((1, 0))):
            pass


def test_one_oversized_request_is_let_in_alone_and_nobody_beside_it() -> None:
    door = admission(max_queued_tokens=10)
    with door.admit(groups((1000, 1))), pytest.raises(Overloaded), door.admit(groups((1, 1))):
        pass
    with door.admit(groups((1, 1))), pytest.raises(Overloaded), door.admit(groups((1000, 1))):
        pass


@examples
@given(
    tokens=st.integers(0, 10**9),
    forwards=st.lists(st.tuples(st.integers(0, 10**7), st.floats(0, 1e6)), max_size=5),
)
def test_whoever_is_sent_away_is_told_a_time_between_nothing_and_thirty_seconds(tokens, forwards) -> None:
    door = admission(max_queued_requests=1)
    for num_tokens, seconds in forwards:
        door.observe_rate(num_tokens, seconds)
    door._count(+1, tokens)
    with pytest.raises(Overloaded) as refused, door.admit(groups((1, 1))):
        pass
    assert 0 < refused.value.retry_after_s <= 30


def test_the_time_told_grows_with_what_is_under_way_and_shrinks_with_speed() -> None:
    def told(tokens: int, tokens_per_s: int) -> float:
        door = admission(max_queued_requests=1)
        door.observe_rate(tokens_per_s, 1.0)
        with door.admit(groups((tokens, 1))), pytest.raises(Overloaded) as refused, door.admit(groups((1, 1))):
            pass
        return refused.value.retry_after_s

    assert told(2000, 1000) == pytest.approx(1.0, rel=0.01), "half of it takes one second"
    assert told(1000, 1000) < told(5000, 1000)
    assert told(5000, 10_000) < told(5000, 1000)


@examples
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50), st.booleans()), max_size=20))
def test_counts_return_to_zero_whatever_happened_inside(requests) -> None:
    metrics = Metrics(CollectorRegistry())
    door = Admission(Limits(max_queued_requests=5, max_queued_tokens=200), ModelMetrics(metrics, "m"))
    inside: list[contextlib.ExitStack] = []
    for prompt, response, fails in requests:
        stack = contextlib.ExitStack()
        try:
            stack.enter_context(door.admit(groups((prompt, response))))
            inside.append(stack)
        except Overloaded:
            if inside:
                inside.pop(0).close()
        if fails and inside:
            with contextlib.suppress(KeyError), inside.pop():
                raise KeyError
        assert door.num_requests == len(inside)
        assert metrics.registry.get_sample_value("rewardserve_in_flight_requests", {"model": "m"}) == len(inside)
    for stack in inside:
        stack.close()
    for gauge in ("in_flight_requests", "in_flight_tokens"):
        assert metrics.registry.get_sample_value(f"rewardserve_{gauge}", {"model": "m"}) == 0


@pytest.mark.parametrize("error", [Unavailable("died"), RuntimeError("bug"), asyncio.CancelledError()])
async def test_an_engine_that_fails_leaves_nothing_counted(house, tools, error: BaseException) -> None:
    model = await house.serve()
    house.engines["m"].fails_to_score = error
    with pytest.raises(type(error)):
        await house.service.score(tools.request())
    assert model.admission.num_requests == 0 and house.sample("in_flight_tokens") == 0


async def test_a_cancelled_call_leaves_nothing_counted(house, tools) -> None:
    model = await house.serve()
    house.engines["m"].may_score.clear()
    calls = [asyncio.create_task(house.service.score(tools.request())) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert model.admission.num_requests == 3 and house.sample("in_flight_tokens") == 15
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert model.admission.num_requests == 0 and house.sample("in_flight_tokens") == 0


async def test_a_deadline_that_passes_leaves_nothing_counted(house, tools) -> None:
    model = await house.serve()
    house.engines["m"].may_score.clear()
    with pytest.raises(RewardServeError, match="deadline"):
        await house.service.score(tools.request(deadline=time.monotonic() + 0.01))
    assert model.admission.num_requests == 0


async def test_refusals_are_counted_by_reason(make_house, tools) -> None:
    house = make_house(max_queued_requests=2, max_queued_tokens=10)
    await house.serve()
    house.engines["m"].may_score.clear()
    call = asyncio.create_task(house.service.score(tools.request()))
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded):
        await house.service.score(tools.request(tools.pack(*range(20))))
    second = asyncio.create_task(house.service.score(tools.request()))
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded):
        await house.service.score(tools.request())
    assert house.sample("admission_rejections_total", reason="tokens") == 1
    assert house.sample("admission_rejections_total", reason="requests") == 1
    house.engines["m"].may_score.set()
    await asyncio.gather(call, second)
    assert house.sample("in_flight_requests") == 0


def test_ids_are_counted_exactly_and_text_is_rather_too_many() -> None:
    assert estimate_tokens(groups((3, 1, 2), (4, 5))) == 15
    text = "The quick brown fox jumps over the lazy dog. " * 20  # 200 words and full stops
    for prompt in (PlainText(text), Rendered(text), Conversation((Message("user", text),))):
        assert 200 <= estimate_tokens(ScoreRequest("r", "m", (PromptGroup("", prompt, ("",)),))) <= 400


def test_what_is_longer_than_the_model_takes_counts_no_more_than_it_takes() -> None:
    assert estimate_tokens(groups((3, 1, 2), (4, 5)), 100) == 15
    assert estimate_tokens(groups((3000, 1, 2), (4, 5)), 100) == 2 * 100 + 9
    huge = ScoreRequest("r", "m", (PromptGroup("", PlainText("x" * 48_000_000), ("",)),))
    assert estimate_tokens(huge, 2048) == 2048


async def test_one_huge_text_keeps_nobody_out(make_house, tools) -> None:
    house = make_house(max_queued_tokens=1000)
    await house.serve()  # max_length 100
    model = house.registry.get("m")
    with model.admission.admit(tools.request("x" * 100_000)):
        await house.service.score(tools.request())
    assert not house.sample("admission_rejections_total", reason="tokens")
