"""Compiling is kept where it works and pays; where it does not, the model is served as right as ever."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from checkpoints import padded_scores, save_checkpoint
from rewardserve.engine.native import speed_up
from rewardserve.errors import LoadFailed
from rewardserve.models.backbone import Backbone
from scoring import IdGroup, joined, native

GROUPS: list[IdGroup] = [(list(range(5, 155)), [list(range(10, 10 + n)) for n in (7, 40, 1, 90)])]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path)
    return tmp_path


@pytest.fixture
def no_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("/nonexistent/g++",), "fx_graph_cache": False}):
        yield


async def is_right(checkpoint: Path, **options: object) -> None:
    wanted = padded_scores(checkpoint, joined(GROUPS), torch.float32)
    async with native(checkpoint, **options) as scorer:
        assert scorer.info.path == "packed"
        assert torch.allclose(await scorer.scores(GROUPS), wanted, rtol=1e-5, atol=1e-6)


async def test_without_a_compiler_a_model_is_served_packed_and_uncompiled(
    checkpoint: Path, no_compiler: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(speed_up, "MIN_PARAMETERS_TO_COMPILE", 0)
    await is_right(checkpoint, compile="auto")
    assert "layers run uncompiled: compiling failed" in caplog.text and "C++ compiler" in caplog.text


async def test_compile_on_refuses_to_start_without_a_compiler(checkpoint: Path, no_compiler: None) -> None:
    with pytest.raises(LoadFailed, match=r"compile = on, but compiling failed.*use compile = auto or off"):
        await is_right(checkpoint, compile="on")


@pytest.mark.parametrize("faster", [True, False])
async def test_what_was_measured_decides_whether_layers_run_compiled(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, faster: bool
) -> None:
    """A clock that gives the second run of every pair (uncompiled) more time, or less."""
    times = iter([x for i in range(100) for x in ((0, 2, 0, 3) if faster else (0, 3, 0, 2))])
    final: list[bool] = []
    monkeypatch.setattr(speed_up, "MIN_PARAMETERS_TO_COMPILE", 0)
    monkeypatch.setattr(speed_up, "_clock", lambda: next(times))
    set_compiled = Backbone.set_compiled
    monkeypatch.setattr(
        Backbone, "set_compiled", lambda self, value: (final.append(value), set_compiled(self, value))[1]
    )
    caplog.set_level(logging.INFO)
    await is_right(checkpoint, compile="auto")
    assert final[-1] is faster
    assert ("compiled layers run 1.50 x as fast" if faster else "compiled they run 0.67 x as fast") in caplog.text
