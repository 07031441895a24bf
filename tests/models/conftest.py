"""One tiny checkpoint; every test spoils a copy of its own."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]


class Folder:
    """A checkpoint's files, with verbs that spoil them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def index(self) -> Path:
        return self.path / "model.safetensors.index.json"

    def configure(self, **changes: object) -> None:
        self.config.write_text(json.dumps({**json.loads(self.config.read_text()), **changes}))

    def reweigh(self, change: Callable[[Weights], object]) -> None:
        """`change` edits the weights in place."""
        weights = load_file(self.weights)
        change(weights)
        save_file(weights, self.weights, metadata={"format": "pt"})

    def rename(self, name: Callable[[str], str]) -> None:
        weights = {name(key): tensor.clone() for key, tensor in load_file(self.weights).items()}
        save_file(weights, self.weights, metadata={"format": "pt"})

    def flip_byte(self, offset: int) -> None:
        data = bytearray(self.weights.read_bytes())
        data[offset] ^= 1
        self.weights.write_bytes(data)


@pytest.fixture(scope="session", autouse=True)
def offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    save_checkpoint(folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Folder:
    return Folder(Path(shutil.copytree(pristine, tmp_path / "model")))


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    save_checkpoint(folder, max_shard_size="200KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Folder:
    return Folder(Path(shutil.copytree(sharded, tmp_path / "shards")))
