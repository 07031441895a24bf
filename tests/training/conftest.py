"""A tiny base, and the verb run in this process."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from preferences import pair_rows, quick_garbage_collection, save_causal_base, save_reward_base
from rewardserve.cli import train

__all__ = ["quick_garbage_collection"]


@pytest.fixture(scope="session")
def reward_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_base(tmp_path_factory.mktemp("reward-base"))


@pytest.fixture(scope="session")
def causal_base(tmp_path_factory: pytest.TempPathFactory, reward_base: Path) -> Path:
    return save_causal_base(tmp_path_factory.mktemp("causal-base"), like=reward_base)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows to a file."""

    def write_rows(rows: Sequence[dict[str, Any]], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write_rows


@pytest.fixture
def run_train(reward_base: Path, tmp_path: Path, write: Callable[..., Path]) -> Iterator[Callable[..., Path]]:
    """Trains briefly on the data and returns the folder; flags that are given later win."""
    runs = iter(range(1000))

    def run(*flags: object, rows: Sequence[dict[str, Any]] = (), base: Path = reward_base, code: int = 0) -> Path:
        output = tmp_path / f"out-{next(runs)}"
        data = write(rows or pair_rows(24))
        usual = ["--base", base, "--output", output, "--threads", 1, "--batch-size", 8, "--learning-rate", "1e-3"]
        usual += ["--device", "cpu"]
        given = [str(flag) for flag in flags]
        kept = [usual[i : i + 2] for i in range(0, len(usual), 2) if usual[i] not in given]
        arguments = [str(data), *(str(part) for pair in kept for part in pair), *given]
        assert train.run(arguments) == code
        return Path(given[given.index("--output") + 1]) if "--output" in given else output

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)
