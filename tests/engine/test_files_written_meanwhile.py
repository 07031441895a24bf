"""A checkpoint that is written while it is read is not served: it would be of two versions, under the name of one."""

import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint
from rewardserve.engine.native import load
from rewardserve.engine.native.options import NativeOptions
from rewardserve.errors import LoadFailed
from rewardserve.models import loader
from safetensors.torch import load_file, save_file


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints of a run, which differ in their weights."""
    old, new = tmp_path / "step-1", tmp_path / "step-2"
    save_checkpoint(old)
    shutil.copytree(old, new)
    weights = {name: 1.25 * tensor for name, tensor in load_file(old / "model.safetensors").items()}
    save_file(weights, new / "model.safetensors", {"format": "pt"})
    return old, new


def scores(loaded: load.Loaded) -> torch.Tensor:
    return loaded.model.features_padded([torch.arange(5, 25)], [[19]])


def write_before(monkeypatch: pytest.MonkeyPatch, where: object, name: str, file: Path, times: int = 100) -> None:
    """The same bytes once more, when function `name` is called."""
    function, left = getattr(where, name), [None] * times

    def called(*arguments: object) -> object:
        if left:
            left.pop()
            file.write_bytes(file.read_bytes())
        return function(*arguments)

    monkeypatch.setattr(where, name, called)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_what_is_written_while_a_model_loads_refuses_it(folders, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _, new = folders
    write_before(monkeypatch, loader, "load", new / name)
    with pytest.raises(LoadFailed, match=f"{name}: was written to while it was read; try again"):
        load.load_runner(NativeOptions(str(new), path="padded"))


def test_weights_that_are_written_once_while_they_are_taken_over_are_read_again(
    folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = folders
    wanted = scores(load.load_runner(NativeOptions(str(new), path="padded")))
    loaded = load.load_runner(NativeOptions(str(old), path="padded"))
    write_before(monkeypatch, load, "refresh", new / "model.safetensors", times=1)
    assert loaded.refreshed(str(new)).info.version != loaded.info.version
    assert torch.equal(scores(loaded), wanted)


@pytest.mark.parametrize("are_there", [True, False])
def test_weights_that_are_written_again_and_again_give_way_to_those_before(
    folders, monkeypatch: pytest.MonkeyPatch, are_there: bool
) -> None:
    """Where these are not there any more the engine ends: what it holds is of no version."""
    old, new = folders
    loaded = load.load_runner(NativeOptions(str(old), path="padded"))
    wanted = scores(loaded)
    if not are_there:
        shutil.rmtree(old)
    write_before(monkeypatch, load, "refresh", new / "model.safetensors")
    with pytest.raises(LoadFailed if are_there else RuntimeError, match="was written to while it was read"):
        loaded.refreshed(str(new))
    assert torch.equal(scores(loaded), wanted) == are_there
