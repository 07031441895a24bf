"""A request's prompts and responses -> token ids: templates, the border of prompt and response, truncation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewardserve.errors import InvalidRequest
from rewardserve.text.chat_template import TEMPLATE_ERRORS
from rewardserve.text.tokenizer import Ids, JoinedText, Tokenizer, common_length
from rewardserve.types import (
    Conversation,
    EncodedGroup,
    ItemCode,
    ItemFailure,
    Message,
    Overflow,
    PlainText,
    Prompt,
    PromptGroup,
    Response,
    ScoreRequest,
    TokenIds,
)


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


class _Groups:
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

    def build(self) -> tuple[EncodedGroup, ...]:
        return tuple(EncodedGroup(prompt, tuple(responses)) for prompt, responses in self._groups)


class Encoder:
    """One model's. Thread-safe."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_length: int,
        no_tokenizer_reason: str = "",
        bos_token_id: int | None = None,
    ) -> None:
        """`bos_token_id` is the model's; a tokenizer knows better."""
        self.tokenizer = tokenizer
        self._bos_token_id = bos_token_id if tokenizer is None else tokenizer.bos_token_id
        self._vocab_size = vocab_size
        self._max_length = max_length
        self._no_tokenizer_reason = no_tokenizer_reason

    def encode(self, request: ScoreRequest) -> EncodedRequest:
        """Raises InvalidRequest, naming the field, for ids or text that no model could take."""
        groups, items = _Groups(), []
        for number, group in enumerate(request.groups):
            groups.new_request_group()
            field = f"groups[{number}]"
            prompt, wholes = self._group_ids(group, field)
            items.append(self._split(prompt, wholes, request.overflow, groups))
        return EncodedRequest(groups.build(), tuple(items))

    def _group_ids(self, group: PromptGroup, field: str) -> tuple[Ids, list[Ids]]:
        """Ids of the prompt, and of prompt + response for each response."""
        responses = group.responses
        if isinstance(group.prompt, TokenIds):
            prompt = self._ids(group.prompt, f"{field}.prompt.token_ids")
            tails = [self._tail(response, f"{field}.responses[{i}]") for i, response in enumerate(responses)]
            return prompt, [np.concatenate([prompt, tail]) for tail in tails]
        texts = [response for response in responses if isinstance(response, str)]
        prompt, joined = self._tokenizer_for(f"{field}.prompt").encode_joined(self._join(group.prompt, texts, field))
        self._check_range(prompt, f"{field}.prompt")
        from_text = iter(joined)
        wholes = []
        for i, response in enumerate(responses):
            if isinstance(response, str):
                whole = next(from_text)
                self._check_range(whole, f"{field}.responses[{i}].text")
            else:
                whole = np.concatenate([prompt, self._ids(response, f"{field}.responses[{i}].token_ids")])
            wholes.append(whole)
        return prompt, wholes

    def _join(self, prompt: Prompt, texts: Sequence[str], field: str) -> JoinedText:
        assert self.tokenizer is not None and not isinstance(prompt, TokenIds)
        template = self.tokenizer.template
        if isinstance(prompt, Conversation) and template is None:
            raise InvalidRequest(
                f"{field}.prompt.conversation", "this checkpoint has no chat template; send text or token_ids"
            )
        if isinstance(prompt, PlainText) and template is not None:
            messages: tuple[Message, ...] = (Message("user", prompt.text),)
        elif isinstance(prompt, Conversation):
            messages = prompt.messages
        else:
            return JoinedText(prompt.text, tuple(prompt.text + text for text in texts))
        try:
            return self.tokenizer.render(messages, texts)
        except TEMPLATE_ERRORS as error:
            raise InvalidRequest(f"{field}.prompt", f"the checkpoint's chat template refuses it: {error}") from error

    def _tail(self, response: Response, field: str) -> Ids:
        """A response after prompt ids: verbatim."""
        if isinstance(response, TokenIds):
            return self._ids(response, f"{field}.token_ids")
        ids = self._tokenizer_for(f"{field}.text").encode([response])[0]
        self._check_range(ids, f"{field}.text")
        return ids

    def _tokenizer_for(self, field: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(field, f"this model scores token_ids only ({self._no_tokenizer_reason})")
        return self.tokenizer

    def _ids(self, ids: TokenIds, field: str) -> Ids:
        if len(ids.data) % 4:
            raise InvalidRequest(field, f"{len(ids.data)} bytes are not a whole number of little-endian int32 ids")
        array = np.frombuffer(ids.data, "<i4")
        self._check_range(array, field)
        return array

    def _check_range(self, ids: Ids, field: str) -> None:
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            wrong = int(np.nonzero((ids < 0) | (ids >= self._vocab_size))[0][0])
            raise InvalidRequest(
                field, f"id {int(ids[wrong])} at position {wrong} is outside the vocabulary of {self._vocab_size}"
            )

    def _split(
        self, prompt: Ids, wholes: Sequence[Ids], overflow: Overflow, groups: _Groups
    ) -> tuple[EncodedItem, ...]:
        borders = [common_length(prompt, whole) for whole in wholes]
        fitting = [b for b, whole in zip(borders, wholes, strict=True) if len(whole) <= self._max_length]
        shared = min(fitting, default=0)  # one prompt for all that are scored as they are
        items = []
        for whole, border in zip(wholes, borders, strict=True):
            if len(whole) <= border:
                items.append(
                    _failed(ItemCode.INVALID_ARGUMENT, "the response is empty: no token to score", whole, border)
                )
            elif len(whole) <= self._max_length:
                items.append(groups.add(_bytes(whole[:shared]), _bytes(whole[shared:]), border, truncated=False))
            else:
                items.append(self._truncate(whole, border, overflow, groups))
        return tuple(items)

    def _truncate(self, whole: Ids, border: int, overflow: Overflow, groups: _Groups) -> EncodedItem:
        """Each response by what itself needs: its score must not depend on its siblings."""
        excess = len(whole) - self._max_length
        too_long = f"prompt + response is {len(whole)} tokens, {excess} more than max_length {self._max_length}"
        if overflow is Overflow.TRUNCATE_PROMPT_LEFT:
            kept = 1 if self._begins_with_bos(whole) else 0
            if border - kept >= excess:
                whole = np.concatenate([whole[:kept], whole[kept + excess :]])
                border -= excess
                return groups.add(_bytes(whole[:border]), _bytes(whole[border:]), border, truncated=True)
            too_long += f", and the response alone is {len(whole) - border}"
        if overflow is Overflow.TRUNCATE_RESPONSE_RIGHT:
            if border < self._max_length:
                whole = whole[: self._max_length]
                return groups.add(_bytes(whole[:border]), _bytes(whole[border:]), border, truncated=True)
            too_long += f", and the prompt alone is {border}"
        return _failed(ItemCode.OUT_OF_RANGE, too_long, whole, border)

    def _begins_with_bos(self, ids: Ids) -> bool:
        return len(ids) > 0 and int(ids[0]) == self._bos_token_id


def _failed(code: ItemCode, message: str, whole: Ids, border: int) -> EncodedItem:
    return EncodedItem(-1, -1, border, len(whole) - border, failure=ItemFailure(code, message))


def _bytes(ids: Ids) -> bytes:
    return ids.astype("<i4", copy=False).tobytes()
