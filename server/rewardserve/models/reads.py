"""Where a head reads a sequence's hidden states, and what a score is made of what it read. Loads no torch.

A head turns the final hidden state of one position into features, a few floats. Most read the last position and one
feature is the score. Others read where a tag ends a step, or where the last user turn ends, which may lie in a prompt
that the prefix cache holds: so the features of such positions are kept beside its blocks. Which positions of a block
these are depends on no token after the block; otherwise what is kept for one prompt would lack what another needs.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewardserve.types import ItemCode, ItemFailure

Features = Sequence[float]


class ReadAt(enum.Enum):
    LAST = "last"  # the last token
    FIRST = "first"  # the first token, which an encoder's attention lets see all others
    MEAN = "mean"  # the mean over all tokens
    GATED = "gated"  # the last token, and the last occurrence of a pattern
    LAST_OF = "last-of"  # the last occurrence of a pattern
    EVERY = "every"  # every occurrence of a pattern: step by step


@dataclass(frozen=True, slots=True)
class Pattern:
    """Consecutive token ids. What is read is the position `offset` after that of the first one."""

    ids: tuple[int, ...]
    offset: int = 0

    def starts(self, tokens: np.ndarray, cut_off: bool = False) -> np.ndarray:
        """Where it occurs in `tokens`. With `cut_off` also where it may, if the right tokens were to follow."""
        size = len(self.ids)
        found = np.ones(len(tokens), bool)
        for i, wanted in enumerate(self.ids):
            here = tokens[i:] == wanted
            found[: len(here)] &= here
            found[len(here) :] &= cut_off
        return np.flatnonzero(found if cut_off else found[: max(0, len(tokens) - size + 1)])


@dataclass(frozen=True, slots=True)
class ReadPlan:
    at: ReadAt = ReadAt.LAST
    pattern: Pattern | None = None  # of GATED, LAST_OF and EVERY
    num_objectives: int = 0  # of GATED: features are rewards [objectives, quantiles], then weights [objectives]
    num_quantiles: int = 1
    what: str = "pattern"  # the pattern's name, for errors


@dataclass(frozen=True, slots=True)
class Reading:
    """What one response's features come to."""

    score: float
    attributes: tuple[float, ...] = ()
    steps: tuple[float, ...] = ()
    std: float | None = None  # the model's own, where it has one


class NothingToRead(Exception):
    """The sequence lacks what the head reads."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.failure = ItemFailure(ItemCode.INVALID_ARGUMENT, message)


class Reader:
    """Finds the positions to read, and folds what was read there."""

    def __init__(self, plan: ReadPlan) -> None:
        self.plan = plan

    @property
    def is_plain(self) -> bool:
        """Nothing but a response's last token is ever read, unless the request names positions."""
        return self.plan.at in (ReadAt.LAST, ReadAt.MEAN)

    def kept_in_prompt(self, prompt: bytes, block_tokens: int) -> list[int]:
        """Positions of a prompt (little-endian int32 ids) whose features every stored block is to have, ascending."""
        plan = self.plan
        if plan.at is ReadAt.FIRST:
            return [0] if prompt else []
        if plan.pattern is None:
            return []
        tokens = np.frombuffer(prompt, "<i4")
        pattern, kept = plan.pattern, []
        for begin in range(0, len(tokens), block_tokens):
            before = max(0, begin - pattern.offset)  # a pattern may begin in the block before
            starts = pattern.starts(tokens[before : begin + block_tokens], cut_off=True)
            positions = starts + before + pattern.offset
            end = min(begin + block_tokens, len(tokens))
            kept += positions[(positions >= begin) & (positions < end)].tolist()
        return kept

    def positions(self, prompt: bytes, response: bytes, named: Sequence[int] = ()) -> tuple[int, ...]:
        """Of prompt + response, ascending; `named` by the request or found by the plan. Raises NothingToRead."""
        num_tokens = (len(prompt) + len(response)) // 4
        if named:
            return tuple(named)
        match self.plan.at:
            case ReadAt.LAST | ReadAt.MEAN:
                return (num_tokens - 1,)
            case ReadAt.FIRST:
                return (0,)
        assert self.plan.pattern is not None
        tokens = np.frombuffer(prompt + response, "<i4")
        found = self.plan.pattern.starts(tokens) + self.plan.pattern.offset
        if self.plan.at is not ReadAt.EVERY:
            found = found[-1:]  # an earlier one is not the last
        found = found[found < num_tokens]  # what lies after it is another's
        if not len(found):
            ids = ", ".join(map(str, self.plan.pattern.ids))
            raise NothingToRead(f"no {self.plan.what} (token ids {ids}) in prompt and response: nothing to read")
        if self.plan.at is ReadAt.EVERY:
            return tuple(found.tolist())
        if self.plan.at is ReadAt.LAST_OF:
            return (int(found[-1]),)
        return tuple(sorted({int(found[-1]), num_tokens - 1}))

    def fold(self, features: Sequence[Features], named: bool = False) -> Reading:
        """`features` in the order of `positions`; those of a gate come before the last token's, or are the same."""
        if named or self.plan.at is ReadAt.EVERY:
            steps = tuple(read[0] for read in features)
            # min() would pass a NaN over.
            return Reading(min(steps) if all(map(math.isfinite, steps)) else math.nan, steps=steps)
        if self.plan.at is not ReadAt.GATED:
            score, *attributes = features[0]
            return Reading(score, tuple(attributes))
        return _gated(features[0], features[-1], self.plan.num_objectives, self.plan.num_quantiles)


def _gated(gate: Features, last: Features, num_objectives: int, num_quantiles: int) -> Reading:
    """A mixture of objectives: sum over i of weight_i * mean over quantiles of reward_i (ArmoRM, arXiv:2406.12845,
    equations 4 to 6; with quantiles QRM, arXiv:2409.10164). The spread of the mixture's quantiles is its uncertainty.
    """
    rewards = np.array(last[: num_objectives * num_quantiles]).reshape(num_objectives, num_quantiles)
    weights = np.array(gate[num_objectives * num_quantiles :])
    mixture = weights @ rewards
    std = float(mixture.std()) if num_quantiles > 1 else None
    return Reading(float(mixture.mean()), tuple(rewards.mean(1).tolist()), std=std)
