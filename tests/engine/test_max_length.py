"""A checkpoint has as many positions as it has: who asks for more is told so."""

from pathlib import Path

import pytest
from checkpoints import save_checkpoint
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.options import NativeOptions


@pytest.mark.parametrize(("asked_for", "got", "is_said"), [(0, 2048, False), (100, 100, False), (5000, 2048, True)])
def test_more_than_the_checkpoint_has_is_not_cut_down_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, asked_for: int, got: int, is_said: bool
) -> None:
    save_checkpoint(tmp_path, "qwen3")
    assert load_runner(NativeOptions(str(tmp_path), path="padded", max_length=asked_for)).info.max_length == got
    said = [line for line in caplog.messages if line.startswith("max_length is ")]
    assert len(said) == is_said
    assert all("2048, not 5000" in line and f"{tmp_path}/config.json" in line for line in said)
