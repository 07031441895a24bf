"""Ids of prompts and responses -> the groups an engine scores; what is too long fails, or is cut as was asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

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
        self._groups: list[tuple[bytes, list[bytes]]] = []

    def new_request_group(self) -> None:
        self._index.clear()

    def add(self, prompt: bytes, response: bytes, num_prompt: int, truncated: bool) -> EncodedItem:
        group = self._index.setdefault(prompt, len(self._groups))
        if group == len(self._groups):
            self._groups.append((prompt, []))
        responses = self._groups[group][1]
        responses.append(response)
        num_tokens = (len(prompt) + len(response)) // 4
        return EncodedItem(group, len(responses) - 1, num_prompt, num_tokens - num_prompt, truncated)

    def add_all(self, prompt: bytes, responses: list[bytes]) -> tuple[EncodedItem, ...]:
        """A whole group as it was sent."""
        group, num_prompt = len(self._groups), len(prompt) // 4
        self._groups.append((prompt, responses))
        return tuple([EncodedItem(group, i, num_prompt, len(r) // 4) for i, r in enumerate(responses)])

    def build(self) -> tuple[EncodedGroup, ...]:
        return tuple(EncodedGroup(prompt, tuple(responses)) for prompt, responses in self._groups)


class Placer:
    """Places the responses of one prompt. A piece of it is copied once, however many responses it stands before, and
    never where nothing is scored: a request may have one long prompt and thousands of responses.
    """

    def __init__(self, groups: Groups, prompt: Ids, overflow: Overflow, max_length: int, bos: int | None) -> None:
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
        if len(whole) <= self._max_length:
            response = self._piece(0, shared, whole.border) + _bytes(whole.tail)
            return self._groups.add(self._piece(0, 0, shared), response, whole.border, truncated=False)
        return self._truncate(whole)

    def _truncate(self, whole: Whole) -> EncodedItem:
        """Each response by what itself needs: its score must not depend on its siblings."""
        border, kept, excess = whole.border, self._num_bos, len(whole) - self._max_length
        message = too_long(str(len(whole)), excess, self._max_length)
        if self._overflow is Overflow.TRUNCATE_PROMPT_LEFT:
            if border - kept >= excess:
                prompt = self._piece(kept, kept + excess, border)
                return self._groups.add(prompt, _bytes(whole.tail), border - excess, truncated=True)
            message += f", and the response alone is {len(whole.tail)}"
        if self._overflow is Overflow.TRUNCATE_RESPONSE_RIGHT:
            if border < self._max_length:
                response = _bytes(whole.tail[: self._max_length - border])
                return self._groups.add(self._piece(0, 0, border), response, border, truncated=True)
            message += f", and the prompt alone is {border}"
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
