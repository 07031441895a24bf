"""The nouns of one request's journey. Standard library only; nothing here knows protobuf, torch or text."""

import enum
from dataclasses import dataclass


def is_model_name(name: str) -> bool:
    """Letters, digits, '-', '_' and '.': what a metric's label, a health service and a command line take as it is."""
    return any(map(str.isalnum, name)) and all(letter.isalnum() or letter in "-_." for letter in name)


class Overflow(enum.IntEnum):
    """What to do with prompt + response longer than the model's max_length."""

    ERROR = 0
    TRUNCATE_PROMPT_LEFT = 1
    TRUNCATE_RESPONSE_RIGHT = 2


class ItemCode(enum.IntEnum):
    """Why one response has no score; the numbers are google.rpc.Code."""

    INVALID_ARGUMENT = 3
    RESOURCE_EXHAUSTED = 8
    OUT_OF_RANGE = 11
    INTERNAL = 13


@dataclass(frozen=True, slots=True)
class ItemFailure:
    code: ItemCode
    message: str

    @property
    def is_of_the_score(self) -> bool:
        """Whether the model was computed, and what it gave is NaN or infinite. Engines say so at the message's end."""
        return self.code is ItemCode.INTERNAL and self.message.endswith("not a number")


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class PlainText:
    """One user turn; verbatim where the model has no chat template."""

    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text that already carries the template, tokenized exactly as it stands."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Little-endian int32, used exactly as they stand."""

    data: bytes


Prompt = PlainText | Conversation | Rendered | TokenIds
Response = str | TokenIds


@dataclass(frozen=True, slots=True)
class PromptGroup:
    id: str
    prompt: Prompt
    responses: tuple[Response, ...]


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    request_id: str
    model: str
    groups: tuple[PromptGroup, ...]
    overflow: Overflow = Overflow.ERROR
    priority: int = 0  # higher first
    deadline: float | None = None  # CLOCK_MONOTONIC, seconds
    client: str = ""  # whose fair share this counts towards
    received_at: float = 0.0  # CLOCK_MONOTONIC, seconds

    @property
    def num_pairs(self) -> int:
        return sum(len(group.responses) for group in self.groups)


@dataclass(frozen=True, slots=True)
class EncodedGroup:
    """One prompt and its responses as little-endian int32 token ids. No response is empty; the prompt may be."""

    prompt: bytes
    responses: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class ItemScore:
    """Exactly one of `score` and `failure` is set."""

    score: float | None
    failure: ItemFailure | None
    num_prompt_tokens: int
    num_response_tokens: int
    num_cached_tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class GroupScore:
    id: str
    items: tuple[ItemScore, ...]


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent at each station."""

    admission_s: float
    tokenization_s: float
    queue_s: float
    compute_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class ScoreResult:
    request_id: str
    model: str
    version: str
    groups: tuple[GroupScore, ...]
    timings: Timings


@dataclass(frozen=True, slots=True)
class Probe:
    """How the checkpoint's own tokenizer class renders one conversation: what the front's text code must reproduce."""

    messages: tuple[tuple[str, str], ...]  # (role, content)
    add_generation_prompt: bool
    text: str
    token_ids: tuple[int, ...]
    rendered_at: float = 0.0  # seconds since the epoch: some templates state the date


@dataclass(frozen=True, slots=True)
class TextSpec:
    """All the front needs to turn text into token ids, without the libraries that made it."""

    tokenizer_json: str
    chat_template: str | None
    special_tokens: dict[str, str]  # what templates call them: bos_token, eos_token, ...
    bos_token_id: int | None
    probes: tuple[Probe, ...] = ()
