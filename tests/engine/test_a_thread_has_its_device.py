"""Streams, events and launches are of the thread's own device: each thread of an engine takes the engine's."""

import threading
from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint
from rewardserve.engine.base import EngineListener, EngineRequest
from rewardserve.engine.native import gpu, load, runner
from rewardserve.engine.native.engine import NativeEngine
from rewardserve.engine.native.options import NativeOptions
from rewardserve.types import EncodedGroup
from scoring import pack


@pytest.mark.parametrize(("device", "taken"), [("cuda:1", [1]), ("cuda", []), ("cpu", [])])
def test_the_device_with_a_number_is_taken(device: str, taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(device.index))
    gpu.use_device(torch.device(device))
    assert found == taken


async def test_by_the_thread_that_runs_and_by_the_one_that_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()
    for module in (load, runner):
        monkeypatch.setattr(module, "use_device", lambda device: threads.add(threading.current_thread().name))
    save_checkpoint(tmp_path)
    engine = NativeEngine(NativeOptions(str(tmp_path), num_threads=1, prefix_cache_bytes=16 << 20, compile="off"))
    await engine.start(EngineListener())
    try:
        await engine.score(EngineRequest("1", (EncodedGroup(pack([1, 2, 3]), (pack([4]),)),)))
    finally:
        await engine.stop()
    assert threads == {"runner", "planner"}
