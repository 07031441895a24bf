"""The journey through vLLM without vLLM: the model is pretended, everything around it is real."""

import asyncio
import math
import queue
import threading
import time

import pytest
from rewardserve.engine.base import EngineRequest
from rewardserve.engine.fake import fake_info
from rewardserve.engine.vllm_engine import ItemFailed, ModelGone, Scored, Step, VllmLoop
from rewardserve.types import EncodedGroup, ItemCode, ItemFailure
from scoring import pack

INFO = fake_info(path="vllm", path_reason="asked for")
WAIT_S = 20


class PretendedModel:
    """Scores are the sum of the ids, once released. It notes what it was given, in order, and what was aborted."""

    info = INFO
    max_batch_tokens = 10
    max_batch_sequences = 2

    def __init__(self, on_step) -> None:
        self.given: list[tuple[list[int], int]] = []
        self.aborted: list[list[int]] = []
        self.released = threading.Event()
        self.released.set()
        self.is_gone = False
        self._on_step = on_step

    async def score(self, item_id: str, token_ids: list[int], priority: int) -> Scored:
        self.given.append((token_ids, priority))
        if token_ids[-1] == 55:
            self.released.wait()  # nothing else runs on the event loop, as when vLLM's front has much to do
        try:
            while not self.released.is_set():
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.aborted.append(token_ids)
            raise
        if token_ids[-1] == 13:
            raise ItemFailed(ItemFailure(ItemCode.INTERNAL, "the forward failed: thirteen"))
        if token_ids[-1] == 66:
            raise ModelGone("it has died")
        self._on_step(Step(len(token_ids), 0.01, {item_id: 0.0}))
        return Scored(math.nan if token_ids[-1] == 99 else float(sum(token_ids)), len(token_ids) - 1)


class House:
    """A loop that runs, and what it said."""

    def __init__(self) -> None:
        self.outcomes: queue.Queue = queue.Queue()
        self.reports: queue.Queue = queue.Queue()
        self.poison: queue.Queue = queue.Queue()

        async def load(on_step):
            self.model = PretendedModel(on_step)
            return self.model

        self.loop = VllmLoop(
            load,
            on_outcome=self.outcomes.put,
            on_batch=self.reports.put,
            on_info=lambda info: None,
            on_poisoned=self.poison.put,
        )
        assert self.loop.start() == INFO

    def submit(self, name, *groups, **fields) -> None:
        encoded = tuple(EncodedGroup(pack(prompt), tuple(map(pack, responses))) for prompt, responses in groups)
        self.loop.submit(EngineRequest(name, encoded, **fields))

    def outcome(self):
        return self.outcomes.get(timeout=WAIT_S)

    def items(self, *groups):
        self.submit("r", *groups)
        return [item for group in self.outcome().result.groups for item in group.items]

    def until(self, condition) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.001)


@pytest.fixture
def house() -> House:
    return House()


def test_scores_come_back_in_their_places(house):
    house.submit("r", ([1, 2], [[3], [4, 5]]), ([], [[6]]))
    outcome = house.outcome()
    assert (outcome.request_id, outcome.expired) == ("r", False)
    assert [[item.score for item in group.items] for group in outcome.result.groups] == [[6.0, 12.0], [6.0]]


def test_what_is_cached_is_counted_of_the_prompt_and_by_the_sequence_that_found_least(house):
    house.submit("r", ([1, 2, 3], [[4, 5, 6, 7], [8]]), ([1], [[2, 3]]))
    assert [group.num_cached_tokens for group in house.outcome().result.groups] == [3, 1]
    reports = [house.reports.get(timeout=WAIT_S) for _ in range(3)]
    assert sum(report.num_cached_tokens for report in reports) == 4
    assert sum(report.num_prompt_tokens for report in reports) == 0
    assert sum(report.num_pairs for report in reports) == 3


@pytest.mark.parametrize(
    ("bad", "code", "said"),
    [
        ([], ItemCode.INVALID_ARGUMENT, "no token"),
        ([1] * 101, ItemCode.OUT_OF_RANGE, "101 tokens"),
        ([1, 1000], ItemCode.INVALID_ARGUMENT, "1000 is outside"),
        ([-1], ItemCode.INVALID_ARGUMENT, "-1 is outside"),
        ([13], ItemCode.INTERNAL, "thirteen"),
        ([99], ItemCode.INTERNAL, "not a number"),
    ],
)
def test_a_bad_item_fails_alone(house, bad, code, said):
    good, failed, other = house.items(([], [[5], bad, [6]]))
    assert (good.score, other.score, failed.score) == (5.0, 6.0, None)
    assert failed.failure.code is code and said in failed.failure.message
    assert failed.failure.is_of_the_score == (bad == [99])
    assert house.poison.empty()


def test_each_step_is_read_at_its_end_and_the_least_is_the_score(house):
    encoded = EncodedGroup(pack([1, 2]), (pack([3, 4, 5]), pack([6])), ((2, 4), ()))
    house.loop.submit(EngineRequest("r", (encoded,)))
    (group,) = house.outcome().result.groups
    assert [(item.score, item.steps) for item in group.items] == [(6.0, (6.0, 15.0)), (9.0, ())]
    assert sorted(ids for ids, _ in house.model.given) == [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 6]]
    reports = [house.reports.get(timeout=WAIT_S) for _ in range(3)]
    assert sum(report.num_pairs for report in reports) == 2, "a pair is one, however many steps it has"


@pytest.mark.parametrize(("bad", "said"), [(13, "thirteen"), (99, "not a number")])
def test_a_step_that_has_no_score_fails_its_response(house, bad, said):
    encoded = EncodedGroup(b"", (pack([bad, 4, 5]), pack([6, 7, 8])), ((0, 2), (0, 2)))
    house.loop.submit(EngineRequest("r", (encoded,)))
    (group,) = house.outcome().result.groups
    assert group.items[0].score is None and said in group.items[0].failure.message
    assert group.items[1].steps == (6.0, 21.0)


def test_no_more_than_a_few_batches_lie_in_vllm_and_the_rest_waits(house):
    house.model.released.clear()
    house.submit("r", ([1], [[2]] * 100))
    house.until(lambda: len(house.model.given) >= 16)
    time.sleep(0.05)
    assert len(house.model.given) == 16, "eight batches of two sequences"
    house.model.released.set()
    assert len(house.outcome().result.groups[0].items) == 100
    waiting = [house.reports.get(timeout=WAIT_S).queued_tokens for _ in range(100)]
    assert waiting[0] > 0 and waiting[-1] == 0


def test_a_deadline_that_passes_ends_the_request_and_aborts_what_is_in_vllm(house):
    house.model.released.clear()
    house.submit("r", ([1], [[2]] * 50), deadline=time.monotonic() + 0.1)
    outcome = house.outcome()
    assert outcome.result is None and outcome.expired
    house.until(lambda: len(house.model.aborted) == 16)
    house.model.released.set()
    house.submit("next", ([1], [[2]]))
    assert house.outcome().request_id == "next"
    assert len(house.model.given) == 17, "what had not begun never does"


def test_a_deadline_that_has_passed_already_computes_nothing_more(house):
    house.model.released.clear()
    house.submit("r", ([1], [[2]]), deadline=time.monotonic() - 1)
    assert house.outcome().expired


def test_what_is_cancelled_is_aborted_and_others_go_on(house):
    house.model.released.clear()
    house.submit("a", ([1], [[2]]))
    house.submit("b", ([3], [[4]]))
    house.until(lambda: len(house.model.given) == 2)
    house.loop.cancel("a")
    house.loop.cancel("unknown")
    assert (house.outcome().request_id, house.model.released.set()) == ("a", None)
    outcome = house.outcome()
    assert outcome.request_id == "b" and outcome.result.groups[0].items[0].score == 7.0
    assert house.model.aborted == [[1, 2]]


def test_who_leaves_makes_room_for_those_who_wait(house):
    house.model.released.clear()
    house.submit("leaves", ([1], [[2]] * 40))
    house.until(lambda: len(house.model.given) == 16)
    house.submit("waits", ([3], [[4]]))
    house.loop.cancel("leaves")
    assert house.outcome().request_id == "leaves"
    house.until(lambda: house.model.given[16:] == [([3, 4], 0)])
    house.model.released.set()
    assert house.outcome().request_id == "waits"


def test_who_leaves_before_vllm_has_heard_of_it_takes_no_room(house):
    house.model.released.clear()
    house.submit("busy", ([], [[55]]))
    house.until(lambda: house.model.given)
    house.submit("leaves", ([1], [[2]] * 100))
    house.loop.cancel("leaves")
    house.model.released.set()
    assert {house.outcome().request_id for _ in range(2)} == {"leaves", "busy"}
    assert house.model.given == [([55], 0)], "it did leave before"
    house.model.released.clear()
    house.submit("next", ([1], [[2]] * 100))
    house.until(lambda: len(house.model.given) == 1 + 16)


def test_between_equals_every_client_is_served_and_priority_comes_first(house):
    """All but the first sixteen wait here, so the order is the queue's."""
    house.model.released.clear()
    house.submit("hog", ([], [[1]] * 40), client="hog")
    house.until(lambda: len(house.model.given) == 16)
    house.submit("small", ([], [[2]]), client="other")
    house.submit("urgent", ([], [[3]]), client="third", priority=5)
    house.model.released.set()
    assert [house.outcome().request_id for _ in range(3)] == ["urgent", "small", "hog"]
    assert house.model.given[16] == ([3], 5)


def test_what_waited_here_and_was_cancelled_costs_its_client_nothing(house):
    house.model.released.clear()
    house.submit("fills", ([], [[1]] * 16))
    house.submit("other", *[([], [[2]])] * 8, client="b")
    house.submit("cancelled", ([], [[3]] * 50), client="a")
    house.until(lambda: len(house.model.given) == 16)
    house.loop.cancel("cancelled")
    house.submit("asked again", *[([], [[3]])] * 8, client="a")
    house.model.released.set()
    assert {house.outcome().request_id for _ in range(4)} == {"cancelled", "fills", "other", "asked again"}
    assert sorted(ids for ids, _ in house.model.given[16:20]) == [[2], [2], [3], [3]]


def test_a_model_that_dies_ends_the_process_whether_it_has_work_or_not(house):
    house.submit("r", ([], [[66]]))
    assert "it has died" in house.poison.get(timeout=WAIT_S)
    idle = House()
    idle.model.is_gone = True
    assert "died" in idle.poison.get(timeout=WAIT_S)


def test_what_loading_raises_start_raises():
    async def load(on_step):
        raise RuntimeError("no such model")

    ignore = {"on_outcome": print, "on_batch": print, "on_info": print, "on_poisoned": print}
    with pytest.raises(RuntimeError, match="no such model"):
        VllmLoop(load, **ignore).start()
