"""Ids of prompts and responses -> the groups an engine scores; what is too long fails, or is cut as was asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewardserve.text.tokenizer import Ids, Whole
from rewardserve.types import EncodedGroup, ItemCode, ItemFailure, Overflow

EMPTY = "the response is empty: no token to score"


@dataclass(frozen=True, slots=True)
class EncodedItem:
    """Where a response went: response `index` of the engine's group `group`. Nowhere, if it has a `failure`."""

    group: int
    index: int
    num_prompt_tokens: int
    num_response_tokens: int
    truncated: bool = False
    failure: ItemFailure | None = None


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    groups: tuple[EncodedGroup, ...]
    items: tuple[tuple[EncodedItem, ...], ...]  # [group][response] as in the request

    @property
    def num_tokens(self) -> int:
        return sum(len(g.prompt) + sum(map(len, g.responses)) for g in self.groups) // 4


class Groups:
    """Engine groups under construction. Responses with the same prompt ids come together, truncated ones apart."""

    def __init__(self) -> None:
        self._index: dict[bytes, int] = {}
        self._groups: list[tuple[bytes, list[bytes], list[tuple[int, ...]]]] = []

    def new_request_group(self) -> None:
        self._index.clear()

    def add(
        self, prompt: bytes, response: bytes, num_prompt: int, truncated: bool, steps: tuple[int, ...] = ()
    ) -> EncodedItem:
        group = self._index.setdefault(prompt, len(self._groups))
        if group == len(self._groups):
            self._groups.append((prompt, [], []))
        _, responses, all_steps = self._groups[group]
        responses.append(response)
        all_steps.append(steps)
        num_tokens = (len(prompt) + len(response)) // 4
        return EncodedItem(group, len(responses) - 1, num_prompt, num_tokens - num_prompt, truncated)

    def add_all(self, prompt: bytes, responses: list[bytes]) -> tuple[EncodedItem, ...]:
        """A whole group as it was sent."""
        group, num_prompt = len(self._groups), len(prompt) // 4
        self._groups.append((prompt, responses, []))
        return tuple([EncodedItem(group, i, num_prompt, len(r) // 4) for i, r in enumerate(responses)])

    def build(self) -> tuple[EncodedGroup, ...]:
        return tuple(
            EncodedGroup(prompt, tuple(responses), tuple(steps) if any(steps) else ())
            for prompt, responses, steps in self._groups
        )


class Placer:
    """Places the responses of one prompt. A piece of it is copied once, however many responses it stands before, and
    never where nothing is scored: a request may have one long prompt and thousands of responses.
    """

    def __init__(
        self,
        groups: Groups,
        prompt: Ids,
        overflow: Overflow,
        max_length: int,
        bos: int | None,
        appended: int | None = None,
        cache_response: bool = False,
    ) -> None:
        """`appended`: the id that every sequence is to end in. With `cache_response` all but a response's last token
        counts to its prompt, which the engine keeps.
        """
        self._appended = appended
        self._cache_response = cache_response
        self._groups = groups
        self._prompt = prompt
        self._overflow = overflow
        self._max_length = max_length
        self._num_bos = 1 if len(prompt) and int(prompt[0]) == bos else 0
        self._pieces: dict[tuple[int, int, int], bytes] = {}

    def place(self, wholes: Sequence[Whole | ItemFailure]) -> tuple[EncodedItem, ...]:
        fitting = [w.border for w in wholes if isinstance(w, Whole) and len(w) <= self._max_length]
        shared = min(fitting, default=0)  # one prompt for all that are scored as they are
        return tuple([self._place(whole, shared) for whole in wholes])

    def _place(self, whole: Whole | ItemFailure, shared: int) -> EncodedItem:
        if isinstance(whole, ItemFailure):  # its tokens were never counted
            return EncodedItem(-1, -1, 0, 0, failure=whole)
        if not len(whole.tail):
            return _failed(ItemCode.INVALID_ARGUMENT, EMPTY, whole)
        if self._appended is not None and whole.tail[-1] != self._appended:
            whole = Whole(whole.border, np.append(whole.tail, np.int32(self._appended)), whole.steps)
        if len(whole) <= self._max_length:
            response = self._piece(0, shared, whole.border) + _bytes(whole.tail)
            num_prompt = min(whole.border + whole.num_after, len(whole))
            return self._add(self._piece(0, 0, shared), response, num_prompt, False, whole.steps)
        return self._truncate(whole)

    def _add(
        self, prompt: bytes, response: bytes, num_prompt: int, truncated: bool, steps: tuple[int, ...]
    ) -> EncodedItem:
        if self._cache_response:
            prompt, response = prompt + response[:-4], response[-4:]
        return self._groups.add(prompt, response, num_prompt, truncated, steps)

    def _truncate(self, whole: Whole) -> EncodedItem:
        """Each response by what itself needs: its score must not depend on its siblings."""
        border, kept, excess = whole.border, self._num_bos, len(whole) - self._max_length
        message = too_long(str(len(whole)), excess, self._max_length)
        if self._overflow is Overflow.TRUNCATE_PROMPT_LEFT:
            if border - kept >= excess and all(position >= kept + excess for position in whole.steps):
                prompt = self._piece(kept, kept + excess, border)
                steps = tuple(position - excess for position in whole.steps)
                return self._add(prompt, _bytes(whole.tail), border - excess, True, steps)
            message += f", and the response alone is {len(whole.tail)}"
        if self._overflow is Overflow.TRUNCATE_RESPONSE_RIGHT:
            # What is appended says nothing of a response of which nothing is left: all to this prompt would be equal.
            room = self._max_length - border - (self._appended is not None)
            if room > 0:
                tail = whole.tail[:room]
                if self._appended is not None:
                    tail = np.append(tail, np.int32(self._appended))
                steps = tuple(position for position in whole.steps if position < self._max_length)
                if whole.steps and not steps:
                    return _failed(ItemCode.OUT_OF_RANGE, message + ", and no step ends in what is left", whole)
                return self._add(self._piece(0, 0, border), _bytes(tail), border, True, steps)
            message += f", and the prompt alone is {border}"
            message += "" if self._appended is None else f", before token {self._appended}, which is appended"
        return _failed(ItemCode.OUT_OF_RANGE, message, whole)

    def _piece(self, kept: int, start: int, end: int) -> bytes:
        """Of the prompt: the first `kept` ids, then those from `start` to `end`."""
        piece = self._pieces.get((kept, start, end))
        if piece is None:
            piece = self._pieces[kept, start, end] = _bytes(self._prompt[:kept]) + _bytes(self._prompt[start:end])
        return piece


def too_long(num_tokens: str, excess: int, max_length: int) -> str:
    return f"prompt + response is {num_tokens} tokens, {excess} more than max_length {max_length}"


def _failed(code: ItemCode, message: str, whole: Whole) -> EncodedItem:
    return EncodedItem(-1, -1, whole.border, len(whole.tail), failure=ItemFailure(code, message))


def _bytes(ids: Ids) -> bytes:
    return ids.astype("<i4", copy=False).tobytes()
