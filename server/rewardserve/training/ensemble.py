"""One model or several members: trains those that are not there yet, and says how good they are, alone and together."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from rewardserve import __version__
from rewardserve.training.held_out import Figures, HeldOut, disagreement
from rewardserve.training.member import Material, Trained, train_member
from rewardserve.training.recipe import Recipe
from rewardserve.training.save import read_figures, save_figures

SCORES_FILE = "held_out_scores.npy"  # in a member's folder, until all members are complete
LIBRARIES = ("torch", "transformers", "trl", "peft")


@dataclass(frozen=True, slots=True)
class Member:
    seed: int
    folder: Path
    figures: Figures | None
    scores: np.ndarray | None  # of the held-out responses; None where none are, or the member was there before


@dataclass(frozen=True, slots=True)
class Together:
    """The mean of the members' raw scores."""

    figures: Figures
    disagreement: float  # share of the held-out comparisons on whose order members differ


def train_members(
    material: Material,
    recipe: Recipe,
    seeds: Sequence[int],
    output: Path,
    about: Mapping[str, Any],
    resume: bool = False,
    show_progress: bool = False,
) -> tuple[list[Member], Together | None]:
    """One seed is trained into `output` itself, several into output/seed-N. `about` goes into each training.json."""
    members = []
    for seed in seeds:
        folder = output if len(seeds) == 1 else output / f"seed-{seed}"
        done = _read_done(folder, seed, material.held_out) if resume else None
        members.append(done or _train_one(material, recipe, seed, folder, about, resume, show_progress))
    together = _together(members, material.held_out)
    if together is not None:
        named = {"members": [member.folder.name for member in members]}
        mean = {"mean": together.figures.values(), "disagreement": together.disagreement}
        save_figures(output, {**about, **named, "held_out": mean})
    for member in members:
        (member.folder / SCORES_FILE).unlink(missing_ok=True)
    return members, together


def _train_one(
    material: Material,
    recipe: Recipe,
    seed: int,
    folder: Path,
    about: Mapping[str, Any],
    resume: bool,
    show_progress: bool,
) -> Member:
    trained = train_member(material, recipe, seed, folder, resume, show_progress)
    if trained.held_out_scores is not None:
        np.save(folder / SCORES_FILE, trained.held_out_scores)
    save_figures(folder, {**about, **_figures(trained, seed), "libraries": libraries()})
    return Member(seed, folder, trained.figures, trained.held_out_scores)


def _figures(trained: Trained, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "num_steps": trained.num_steps,
        "seconds": round(trained.seconds, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "held_out": None if trained.figures is None else trained.figures.values(),
    }


def _read_done(folder: Path, seed: int, held_out: HeldOut | None) -> Member | None:
    """A member that an earlier run has brought to its end."""
    if read_figures(folder) is None:
        return None
    file = folder / SCORES_FILE
    scores = np.load(file) if held_out is not None and file.is_file() else None
    return Member(seed, folder, None if scores is None else held_out.figures(scores), scores)


def _together(members: Sequence[Member], held_out: HeldOut | None) -> Together | None:
    scores = [member.scores for member in members if member.scores is not None]
    if held_out is None or len(members) < 2 or len(scores) < len(members):
        return None
    return Together(held_out.figures(np.mean(scores, axis=0)), disagreement(held_out, scores))


def libraries() -> dict[str, str]:
    """What the model was trained with; a score can change with any of them."""
    found = {"rewardserve": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # peft is needed for adapters only
            continue
    return found
