"""What the loop lets go of: memory of a failed forward and of a path given up, threads, and answers to who asks."""

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint
from rewardserve.engine.base import EngineRequest, Outcome
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.loop import EngineLoop
from rewardserve.engine.native.options import NativeOptions
from rewardserve.engine.native.runner import PackedRunner
from rewardserve.models.backbone import Backbone
from rewardserve.models.packing import NotPackable
from rewardserve.types import EncodedGroup
from scoring import pack

ANTI_HANG_S = 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    save_checkpoint(folder)
    return folder


class Running:
    """A loop, and what it has said."""

    def __init__(self, checkpoint: Path) -> None:
        options = NativeOptions(str(checkpoint), num_threads=2, prefix_cache_bytes=16 << 20, max_batch_tokens=256)
        self.outcomes: list[Outcome] = []
        self.poisoned = threading.Event()
        self.changed = threading.Condition()
        self.loop = EngineLoop(
            lambda: load_runner(options),
            options.max_batch_sequences,
            on_outcome=self._hear,
            on_batch=lambda report: None,
            on_info=lambda info: None,
            on_poisoned=lambda reason: self.poisoned.set(),
        )
        self.loop.start()

    def _hear(self, outcome: Outcome) -> None:
        with self.changed:
            self.outcomes.append(outcome)
            self.changed.notify_all()

    def submit(self, name: str, prompt: list[int], *responses: list[int]) -> None:
        self.loop.submit(EngineRequest(name, (EncodedGroup(pack(prompt), tuple(map(pack, responses))),)))

    def outcome(self, name: str) -> Outcome:
        def found() -> list[Outcome]:
            return [outcome for outcome in self.outcomes if outcome.request_id == name]

        with self.changed:
            assert self.changed.wait_for(found, ANTI_HANG_S)
        return found()[0]

    def stop(self) -> bool:
        """Whether it ended."""
        stopping = threading.Thread(target=self.loop.stop, daemon=True)
        stopping.start()
        stopping.join(ANTI_HANG_S)
        return not stopping.is_alive()


@pytest.fixture
def running(checkpoint: Path):
    running = Running(checkpoint)
    yield running
    assert running.stop()


def before_each_forward(monkeypatch: pytest.MonkeyPatch, do: Callable[[int], object]) -> None:
    """`do` is called with the number of rows, and what it makes is a local of the forward."""
    run = Backbone.run_packed

    def changed(self, packed, pool):
        made = do(len(packed.input_ids))
        if isinstance(made, BaseException):
            raise made
        return run(self, packed, pool)

    monkeypatch.setattr(Backbone, "run_packed", changed)


def test_what_a_failed_forward_had_computed_is_gone_when_the_next_begins(running, monkeypatch) -> None:
    made: list[weakref.ref] = []
    alive: list[bool] = []

    def run_out_of_memory_at_first(num_rows: int) -> object:
        alive.extend(activations() is not None for activations in made)
        if made:
            return None
        activations = torch.ones(num_rows)
        made.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    before_each_forward(monkeypatch, run_out_of_memory_at_first)
    running.submit("r", list(range(5, 45)), [1] * 60, [2] * 60)
    assert running.outcome("r").result is not None
    assert alive and not any(alive)


def test_a_path_that_was_given_up_holds_no_memory(running, monkeypatch) -> None:
    held = weakref.ref(running.loop._runner)
    assert isinstance(held(), PackedRunner)
    before_each_forward(monkeypatch, lambda num_rows: NotPackable("attention was called 2 times instead of 4"))
    running.submit("r", [1, 2, 3], [4])
    assert running.outcome("r").result is not None
    gc.collect()
    assert held() is None


def test_what_ended_just_before_a_fall_back_is_told_all_the_same(running) -> None:
    """A request of nothing to read has ended when it comes; the planner would tell of it."""
    with running.loop._lock:
        running.submit("nothing", [1, 2, 3])
        running.loop._fall_back("attention was called 2 times instead of 4")
    assert running.outcome("nothing").result is not None


def test_it_can_be_stopped_when_its_runner_has_died_over_a_forward(checkpoint, monkeypatch) -> None:
    running = Running(checkpoint)
    before_each_forward(monkeypatch, lambda num_rows: RuntimeError("CUDA error: device-side assert triggered"))
    for number in range(20):  # more than one forward, so that the planner has another to hand over
        running.submit(str(number), [number] * 100, [1] * 60)
    assert running.poisoned.wait(ANTI_HANG_S)
    assert running.stop()


class Held:
    """A forward that does not end: of a CPU, which computes as it launches, or of a GPU, which says that it is not
    ready."""

    def __init__(self) -> None:
        self.begun, self.released = threading.Event(), threading.Event()

    def wait(self, num_rows: int = 0) -> None:
        self.begun.set()
        assert self.released.wait(ANTI_HANG_S)

    def never_ready(self, monkeypatch: pytest.MonkeyPatch) -> None:
        launch = PackedRunner.launch

        def launched(runner, step):
            done = launch(runner, step)
            self.begun.set()
            held = self

            class Launched:
                def ready(self) -> bool:
                    return held.released.is_set()

                def features(self):
                    held.wait()
                    return done.features()

            return Launched()

        monkeypatch.setattr(PackedRunner, "launch", launched)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_who_asks_is_answered_between_forwards_and_not_while_one_hangs(running, monkeypatch, on_gpu) -> None:
    held, answers = Held(), [threading.Event() for _ in range(3)]
    running.loop.ping(answers[0].set)
    assert answers[0].wait(ANTI_HANG_S), "it has nothing to do"
    if on_gpu:
        held.never_ready(monkeypatch)
    else:
        before_each_forward(monkeypatch, held.wait)
    running.submit("r", [1, 2, 3], [4])
    assert held.begun.wait(ANTI_HANG_S)
    running.loop.ping(answers[1].set)
    running.loop.ping(answers[2].set)
    running.loop.cancel("r")
    assert running.outcome("r").result is None
    assert not answers[1].wait(0.5) and not answers[2].is_set()
    held.released.set()
    assert all(answer.wait(ANTI_HANG_S) for answer in answers)
