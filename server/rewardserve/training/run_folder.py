"""The folder that a run writes to: whether it may begin there, go on there, or is complete."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewardserve.options import ConfigError

UNFINISHED = "unfinished.json"  # what was asked for; there until the run is complete
FREE_TO_CHANGE = {"resume", "threads", "device", "config"}  # without changing what is learned


def begin(folder: Path, asked: Mapping[str, Any], resume: bool) -> None:
    """Notes what was asked for. Raises ConfigError where the folder holds something else."""
    note = folder / UNFINISHED
    asked = {key: value for key, value in asked.items() if key not in FREE_TO_CHANGE}
    if note.is_file():
        if not resume:
            raise ConfigError(
                f"--output {folder} holds an unfinished run: go on with it by --resume, or choose another"
            )
        _check_same(json.loads(note.read_text(encoding="utf-8")), asked, folder)
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        complete = " and the run in it is complete" if resume else ""
        raise ConfigError(f"--output {folder} is not empty{complete}; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")


def _check_same(before: Mapping[str, Any], asked: Mapping[str, Any], folder: Path) -> None:
    now = json.loads(json.dumps(asked))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"--resume: {key.replace('_', '-')} was {before.get(key)!r} when the run in {folder} began, and now is "
            f"{now.get(key)!r}; give what was given then, or choose another --output"
        )


def give_up(folder: Path) -> None:
    """Of a run that ended before anything came of it: the folder is free for one that goes by other options."""
    if all(path.is_dir() or path.name == UNFINISHED for path in folder.rglob("*")):
        for made in filter(Path.is_dir, folder.iterdir()):  # where checkpoints were to go
            shutil.rmtree(made)
        complete(folder)


def complete(folder: Path) -> None:
    (folder / UNFINISHED).unlink(missing_ok=True)
