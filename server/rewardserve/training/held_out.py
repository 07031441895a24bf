"""What is held out of training, and how often a model has its responses in the right order."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset


@dataclass(frozen=True, slots=True)
class Judged:
    """A comparison of two held-out responses, by their positions among all."""

    better: int
    worse: int
    label: float
    margin: float
    domain: str


@dataclass(frozen=True, slots=True)
class Share:
    """Of `pairs` comparisons, how many are in the right order; equal scores are half right."""

    pairs: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class Figures:
    overall: Share
    domains: dict[str, Share]  # by name; empty where rows name no domain

    def values(self) -> dict[str, Any]:
        """As JSON takes them."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class HeldOut:
    ids: tuple[np.ndarray, ...]  # of each response with its prompt, [tokens] int32
    judged: tuple[Judged, ...]
    targets: tuple[float, ...]  # one for each response, where the loss is of single ones

    def dataset(self) -> Dataset:
        """Every response, the longest first, so that what is padded together is of about one length."""
        return Dataset.from_dict({"ids": [self.ids[index] for index in self._by_length()]})

    def in_order(self, scores: np.ndarray) -> np.ndarray:
        """Scores of `dataset()` -> scores of `ids`, both [responses]."""
        ordered = np.empty(len(self.ids), np.float64)
        ordered[self._by_length()] = scores
        return ordered

    def figures(self, scores: np.ndarray) -> Figures:
        """scores [responses], as `ids`."""
        right: dict[str, list[float]] = defaultdict(list)
        for pair in self.judged:
            right[pair.domain].append(_right(scores[pair.better], scores[pair.worse]))
        domains = {name: _share(found) for name, found in sorted(right.items()) if name}
        return Figures(_share([each for found in right.values() for each in found]), domains)

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(better, worse, label, margin) of all comparisons, [pairs] each."""
        rows = [(pair.better, pair.worse, pair.label, pair.margin) for pair in self.judged]
        better, worse, label, margin = np.array(rows, np.float64).reshape(-1, 4).T
        return better.astype(int), worse.astype(int), label, margin

    def _by_length(self) -> list[int]:
        return sorted(range(len(self.ids)), key=lambda index: -len(self.ids[index]))


def disagreement(held_out: HeldOut, members: Sequence[np.ndarray]) -> float:
    """Share of the comparisons on whose order the members, scores [responses] each, are not all of one mind."""
    better, worse, _, _ = held_out.columns()
    signs = np.stack([np.sign(scores[better] - scores[worse]) for scores in members])  # [members, pairs]
    return float((signs != signs[0]).any(0).mean())


def _right(better: float, worse: float) -> float:
    return 0.5 if better == worse else float(better > worse)


def _share(right: Sequence[float]) -> Share:
    return Share(len(right), sum(right) / len(right))
