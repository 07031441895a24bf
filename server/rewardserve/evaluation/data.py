"""The nouns of an evaluation: prompts with judged responses, then the same with scores, and the pairs in them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Prompt: TypeAlias = str | Sequence[Mapping[str, str]]  # one user turn, or a conversation of roles and contents

NO_DOMAIN = "unnamed"  # of rows that name none
ROUNDING = 1 + 1e-9  # times a gap: as floats 0.9 is above 0.7 by more than 0.2, and 0.3 above 0.1 by less


@dataclass(frozen=True, slots=True)
class Judged:
    """One prompt and what people, or a judge, think of the responses to it.

    A pair, of which only the order is known, has no ratings: its first response is the preferred one.
    """

    line: int  # of the file it was read from, from 1
    prompt: Prompt
    responses: tuple[str, ...]
    ratings: tuple[float, ...] | None  # one for each response, more is better
    domain: str = NO_DOMAIN
    gap: float | None = None  # of a pair: by how much the first is preferred, where that is known; 0 for a tie

    @property
    def prompt_key(self) -> str:
        """Rows with an equal key are of one prompt: what is found in them is not independent."""
        turns = [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt
        return json.dumps([dict(turn) for turn in turns])

    @property
    def best(self) -> int:
        """Index of the response that is known to be good: the preferred, or the best rated and of these the first."""
        return 0 if self.ratings is None else max(range(len(self.ratings)), key=self.ratings.__getitem__)

    @property
    def worst(self) -> int | None:
        """Index of the worst rated response, or the rejected one; None where all are as good."""
        if self.ratings is None:
            return 1
        lowest = min(self.ratings)
        return self.ratings.index(lowest) if lowest < max(self.ratings) else None


@dataclass(frozen=True, slots=True)
class Scored:
    """A response and its score."""

    score: float
    num_characters: int
    num_tokens: int
    rating: float | None = None  # None in a pair
    members: tuple[float, ...] | None = None  # each member's score, where the model is an ensemble


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """One row, scored. A response without a score is left out; of a pair then nothing is left."""

    prompt: str  # `Judged.prompt_key`
    domain: str
    responses: tuple[Scored, ...]
    gap: float | None = None  # as in `Judged`

    @property
    def is_rated(self) -> bool:
        return all(response.rating is not None for response in self.responses)

    @property
    def scores(self) -> Floats:
        return np.array([response.score for response in self.responses])

    @property
    def ratings(self) -> Floats:
        """Of a rated prompt."""
        return np.array([response.rating for response in self.responses], dtype=float)

    def preferences(self, min_gap: float) -> Iterator[tuple[Scored, Scored]]:
        """(preferred, other), for every two responses that are judged to differ by more than `min_gap`."""
        if not self.is_rated:
            if len(self.responses) == 2 and (self.gap is None or self.gap > min_gap):
                yield self.responses[0], self.responses[1]
            return
        gap = min_gap * ROUNDING
        for preferred in self.responses:
            for other in self.responses:
                if preferred.rating - other.rating > gap:  # type: ignore[operator]
                    yield preferred, other


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """All pairs as columns, each of shape [num_pairs]; the preferred response of a pair comes first."""

    prompt: NDArray[np.int64]  # number of the prompt
    domain: NDArray[np.str_]
    margin: Floats  # score of the preferred response less that of the other
    preferred_characters: Floats
    other_characters: Floats
    members: Floats | None  # [num_pairs, num_members], each member's margin, where the model is an ensemble

    def __len__(self) -> int:
        return len(self.margin)


def pairs_of(prompts: Sequence[ScoredPrompt], min_gap: float = 0.0) -> Pairs:
    """Responses judged to differ by at most `min_gap` make no pair."""
    numbers = number_prompts(prompts)
    found = [
        (number, prompt.domain, preferred, other)
        for number, prompt in zip(numbers, prompts, strict=True)
        for preferred, other in prompt.preferences(min_gap)
    ]
    members = [_margins(preferred, other) for _, _, preferred, other in found]
    return Pairs(
        np.array([number for number, *_ in found], dtype=np.int64),
        np.array([domain for _, domain, *_ in found], dtype=np.str_),
        np.array([preferred.score - other.score for *_, preferred, other in found], dtype=float),
        np.array([preferred.num_characters for *_, preferred, _ in found], dtype=float),
        np.array([other.num_characters for *_, other in found], dtype=float),
        None if None in members or not members else np.array(members, dtype=float),
    )


def number_prompts(prompts: Sequence[ScoredPrompt]) -> list[int]:
    """Rows of one prompt have one number."""
    known: dict[str, int] = {}
    return [known.setdefault(prompt.prompt, len(known)) for prompt in prompts]


def _margins(a: Scored, b: Scored) -> list[float] | None:
    """Each member's: an offset of one member's own scale is no disagreement."""
    if a.members is None or b.members is None:
        return None
    return [one - other for one, other in zip(a.members, b.members, strict=True)]
