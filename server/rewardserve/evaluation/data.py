"""The nouns of an evaluation: prompts with judged responses, then the same with scores, and the pairs in them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.int64]
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

    def preferences(self, min_gap: float) -> tuple[Indices, Indices]:
        """Indices of the preferred and of the other, for every two that are judged to differ by more than `min_gap`."""
        if not self.is_rated:
            is_pair = len(self.responses) == 2 and (self.gap is None or self.gap > min_gap)
            return np.arange(int(is_pair)), np.arange(int(is_pair)) + 1
        ratings = self.ratings
        preferred, other = np.nonzero(ratings[:, None] - ratings > min_gap * ROUNDING)
        return preferred, other


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
    """Responses judged to differ by at most `min_gap` make no pair.

    Of thousands of responses to one prompt there are millions, so no pair is an object of its own.
    """
    responses = [response for prompt in prompts for response in prompt.responses]
    found, first = [(np.arange(0), np.arange(0))], 0
    for prompt in prompts:
        preferred, other = prompt.preferences(min_gap)
        found.append((first + preferred, first + other))
        first += len(prompt.responses)
    preferred, other = (np.concatenate(side) for side in zip(*found, strict=True))
    rows = np.repeat(np.arange(len(prompts)), [len(side) for side, _ in found[1:]])
    scores = np.array([response.score for response in responses], dtype=float)
    characters = np.array([response.num_characters for response in responses], dtype=float)
    return Pairs(
        np.array(number_prompts(prompts), dtype=np.int64)[rows],
        np.array([prompt.domain for prompt in prompts], dtype=np.str_)[rows],
        scores[preferred] - scores[other],
        characters[preferred],
        characters[other],
        _member_margins(responses, preferred, other),
    )


def number_prompts(prompts: Sequence[ScoredPrompt]) -> list[int]:
    """Rows of one prompt have one number."""
    known: dict[str, int] = {}
    return [known.setdefault(prompt.prompt, len(known)) for prompt in prompts]


def _member_margins(responses: Sequence[Scored], preferred: Indices, other: Indices) -> Floats | None:
    """Each member's: an offset of one member's own scale is no disagreement. None where a pair has none."""
    if not any(response.members for response in responses):
        return None
    used = np.zeros(len(responses), dtype=bool)
    used[preferred] = used[other] = True
    members = [responses[index].members for index in np.flatnonzero(used)]
    if None in members or not members:
        return None
    values, places = np.array(members, dtype=float), np.cumsum(used) - 1
    return values[places[preferred]] - values[places[other]]
