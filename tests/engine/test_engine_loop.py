"""The loop around scheduler and runner: whatever a forward does, every caller gets an answer."""

import asyncio
import concurrent.futures
import queue
import threading
from pathlib import Path

import pytest
import torch
from checkpoints import padded_scores, save_checkpoint
from rewardserve.engine.base import EngineListener, EngineRequest
from rewardserve.engine.native.engine import NativeEngine
from rewardserve.engine.native.options import NativeOptions
from rewardserve.engine.native.runner import PackedRunner
from rewardserve.errors import DeadlineExceeded, Unavailable
from rewardserve.models.backbone import Backbone
from rewardserve.models.packing import NotPackable
from rewardserve.types import EncodedGroup, ItemCode
from scoring import IdGroup, joined, native, pack

GROUPS: list[IdGroup] = [
    (list(range(5, 155)), [list(range(10, 10 + n)) for n in (7, 40, 1, 90)]),
    (list(range(200, 230)), [list(range(300, 300 + n)) for n in (3, 60)]),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    save_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def wanted(checkpoint: Path) -> torch.Tensor:
    return padded_scores(checkpoint, joined(GROUPS), torch.float32)


def refuse(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str, above: int, only: int = -1
) -> list[int]:
    """Forwards of more than `above` tokens, or that hold token `only`, fail. Returns the sizes of those that ran."""
    run, sizes = Backbone.run_packed, []

    def failing(self, packed, pool):
        if len(packed.input_ids) > above or only in packed.input_ids:
            raise error(message)
        sizes.append(len(packed.input_ids))
        return run(self, packed, pool)

    monkeypatch.setattr(Backbone, "run_packed", failing)
    return sizes


async def test_memory_exhaustion_is_met_with_smaller_forwards(
    checkpoint: Path, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with native(checkpoint) as scorer:
        sizes = refuse(monkeypatch, torch.OutOfMemoryError, "CUDA out of memory", above=130)
        got = await scorer.scores(GROUPS)
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert max(sizes) <= 130


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("DefaultCPUAllocator: can't allocate memory", ItemCode.RESOURCE_EXHAUSTED),
        ("index 99 is out of bounds", ItemCode.INTERNAL),
    ],
)
async def test_only_the_item_that_cannot_be_computed_fails_and_the_log_says_where(
    message: str,
    code: ItemCode,
    checkpoint: Path,
    wanted: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Token 99 stands in the 90-token response of the first group only. Of memory there is nothing to be traced."""
    async with native(checkpoint) as scorer:
        refuse(monkeypatch, RuntimeError, message, above=10_000, only=99)
        groups = [(GROUPS[0][0][:90], GROUPS[0][1]), GROUPS[1]]
        result = await scorer.run(groups)
        items = [item for group in result.groups for item in group.items]
        assert [item.failure.code if item.failure else None for item in items] == ([None, None, None, code, None, None])
        assert torch.allclose(torch.tensor([item.score for item in items[4:]]), wanted[4:], rtol=1e-5, atol=1e-6)
    assert f"one item cannot be computed: RuntimeError: {message}" in caplog.text
    assert ("in failing" in caplog.text) == (code is ItemCode.INTERNAL)  # the traceback's last line


async def test_a_backbone_found_unfit_while_serving_is_served_padded_from_then_on(
    checkpoint: Path, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    infos = []
    engine = NativeEngine(NativeOptions(str(checkpoint), num_threads=2, prefix_cache_bytes=16 << 20))
    info = await engine.start(EngineListener(on_up=infos.append))
    assert info.path == "packed"
    refuse(monkeypatch, NotPackable, "attention was called 2 times instead of 4 in a forward", above=0)
    encoded = tuple(EncodedGroup(pack(p), tuple(map(pack, rs))) for p, rs in GROUPS)
    results = await asyncio.gather(*(engine.score(EngineRequest(str(i), encoded)) for i in range(3)))
    for result in results:
        got = torch.tensor([item.score for group in result.groups for item in group.items])
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert [info.path for info in infos] == ["padded"] and "called 2 times" in infos[0].path_reason
    await engine.stop()


async def test_the_call_count_is_checked_on_every_forward(
    checkpoint: Path, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that stops asking our attention (here: it is skipped) gives wrong states, whatever they look like."""
    async with native(checkpoint) as scorer:
        assert scorer.info.path == "packed"
        layers = scorer.engine._loop._loaded.model.backbone._layers
        forward = layers[1].forward
        monkeypatch.setattr(layers[1], "forward", lambda hidden_states, **_: hidden_states)
        await scorer.run(GROUPS[1:])
        assert scorer.engine._loop._loaded.info.path == "padded"
        monkeypatch.setattr(layers[1], "forward", forward)
        got = await scorer.scores(GROUPS)
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


async def test_a_poisoned_device_fails_the_callers_and_the_engine(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = []
    engine = NativeEngine(NativeOptions(str(checkpoint), num_threads=2, prefix_cache_bytes=16 << 20))
    await engine.start(EngineListener(on_failed=failed.append))
    refuse(monkeypatch, RuntimeError, "CUDA error: device-side assert triggered", above=0)
    group = EncodedGroup(pack([1, 2, 3]), (pack([4]),))
    with pytest.raises(Unavailable, match="device-side assert"):
        await asyncio.wait_for(engine.score(EngineRequest("r", (group,))), 30)
    assert len(failed) == 1
    with pytest.raises(Unavailable):
        await engine.score(EngineRequest("later", (group,)))
    await engine.stop()


async def test_an_expired_request_is_answered_and_costs_nothing(checkpoint: Path) -> None:
    async with native(checkpoint) as scorer:
        request = EngineRequest("late", (EncodedGroup(pack([1, 2]), (pack([3]),)),), deadline=0.0)
        with pytest.raises(DeadlineExceeded):
            await scorer.engine.score(request)


async def test_stopping_answers_those_who_wait(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with native(checkpoint, max_batch_tokens=256) as scorer:
        calls = [asyncio.create_task(scorer.run([(list(range(300)), [[i] * 200])])) for i in range(20)]
        await asyncio.sleep(0.05)
        await scorer.engine.stop()
        outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30)
    assert any(isinstance(outcome, Unavailable) for outcome in outcomes)
    assert all(isinstance(outcome, Unavailable) or outcome.groups for outcome in outcomes)


class Device(threading.Thread):
    """A GPU's stream: forwards are handed to it and computed in order, on a thread; what goes wrong shows later."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, largest: int = 10_000) -> None:
        super().__init__(daemon=True)
        self.queue: queue.Queue = queue.Queue()
        self.num_launched, self.num_under_way, self.most_under_way = 0, 0, 0
        self.two_launched = threading.Event()
        self.largest = largest
        self.launch_now = PackedRunner.launch
        monkeypatch.setattr(PackedRunner, "launch", lambda runner, step: self.launch(runner, step))
        self.start()

    def launch(self, runner: PackedRunner, step) -> "Device.Launched":
        launched = Device.Launched(self)
        self.num_launched += 1
        self.num_under_way += 1
        self.most_under_way = max(self.most_under_way, self.num_under_way)
        if self.num_launched == 2:
            self.two_launched.set()
        self.queue.put((launched, runner, step))
        return launched

    def run(self) -> None:
        while True:
            launched, runner, step = self.queue.get()
            if launched is self.first and not self.two_launched.wait(60):
                launched.future.set_exception(AssertionError("nothing was launched beside the first forward"))
            elif len(step.inputs.input_ids) > self.largest:
                launched.future.set_exception(RuntimeError("CUDA out of memory"))
            else:
                try:
                    launched.future.set_result(self.launch_now(runner, step).features())
                except Exception as error:  # or everyone would wait for this thread
                    launched.future.set_exception(error)

    first: "Device.Launched | None" = None

    class Launched:
        def __init__(self, device: "Device") -> None:
            self.device, self.future = device, concurrent.futures.Future()
            device.first = device.first or self

        def ready(self) -> bool:
            return self.future.done()

        def features(self) -> list[list[float]]:
            self.device.num_under_way -= 1
            return self.future.result()


async def test_a_forward_is_launched_while_another_is_under_way_and_no_more_than_two(
    checkpoint: Path, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first forward ends only once a second one was launched: a loop that waits for it would never go on."""
    async with native(checkpoint, max_batch_tokens=64) as scorer:
        device = Device(monkeypatch)
        got = await scorer.scores(GROUPS)
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert device.num_launched > 4 and device.most_under_way == 2


async def test_a_failure_that_shows_late_rolls_back_the_forward_launched_after_it(
    checkpoint: Path, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with native(checkpoint, max_batch_tokens=256) as scorer:
        device = Device(monkeypatch, largest=130)
        for _ in range(3):
            got = await scorer.scores(GROUPS)
            assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert device.most_under_way == 2
