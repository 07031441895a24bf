"""The nouns of one request's journey. Standard library only; nothing here knows protobuf, torch or text."""

import enum
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass


def is_model_name(name: str) -> bool:
    """Letters, digits, '-', '_' and '.': what a metric's label, a health service and a command line take as it is."""
    return any(map(str.isalnum, name)) and all(letter.isalnum() or letter in "-_." for letter in name)


FINISHED = "-finished-"  # in a version whose scores are finished otherwise than the checkpoint says; a digest follows


class Overflow(enum.IntEnum):
    """What to do with prompt + response longer than the model's max_length."""

    ERROR = 0
    TRUNCATE_PROMPT_LEFT = 1
    TRUNCATE_RESPONSE_RIGHT = 2


class StepReduction(enum.IntEnum):
    """How the scores of a response's steps become its score."""

    MIN = 0
    MEAN = 1
    PRODUCT = 2
    LAST = 3


class How(enum.Enum):
    MEAN = "mean"
    MIN = "min"
    MEDIAN = "median"
    MEAN_LESS_STD = "mean-std"  # mean - k std: cautious where members disagree (Coste et al. 2023, arXiv:2310.02743)


@dataclass(frozen=True, slots=True)
class Aggregate:
    how: How
    num_stds: float = 0.0  # k of MEAN_LESS_STD

    @classmethod
    def parse(cls, text: str) -> "Aggregate | None":
        """`mean`, `min`, `median`, or `mean-0.5std`; None for anything else."""
        if match := re.fullmatch(r"mean-(\d+(?:\.\d+)?)?std", text):
            return cls(How.MEAN_LESS_STD, float(match[1] or 1))
        try:
            return cls(How(text))
        except ValueError:
            return None

    def __str__(self) -> str:
        return f"mean-{self.num_stds:g}std" if self.how is How.MEAN_LESS_STD else self.how.value


class ItemCode(enum.IntEnum):
    """Why one response has no score; the numbers are google.rpc.Code."""

    INVALID_ARGUMENT = 3
    RESOURCE_EXHAUSTED = 8
    OUT_OF_RANGE = 11
    INTERNAL = 13


class ScoreKind(enum.IntEnum):
    """What a score means."""

    RAW_LOGIT = 1
    PROBABILITY = 2
    NORMALIZED = 3
    RATING = 4


@dataclass(frozen=True, slots=True)
class ItemFailure:
    code: ItemCode
    message: str
    is_of_the_score: bool = False  # the model was computed; what it gave is NaN or infinite, or says nothing


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


@dataclass(frozen=True, slots=True)
class Steps:
    """A response cut into steps by the caller."""

    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepIds:
    """A response's token ids, and where its steps end: numbers of tokens up to and including each step's last."""

    data: bytes
    ends: tuple[int, ...]


Prompt = PlainText | Conversation | Rendered | TokenIds
Response = str | TokenIds | Steps | StepIds


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
    by_step: bool = False  # a score for each step, also from models that were not made for it
    step_reduction: StepReduction = StepReduction.MIN
    step_separator: str = ""  # empty: the model's own
    cache_response: bool = False
    priority: int = 0  # higher first
    deadline: float | None = None  # CLOCK_MONOTONIC, seconds
    client: str = ""  # whose fair share this counts towards
    received_at: float = 0.0  # CLOCK_MONOTONIC, seconds

    @property
    def num_pairs(self) -> int:
        return sum(len(group.responses) for group in self.groups)


@dataclass(frozen=True, slots=True)
class EncodedGroup:
    """One prompt and its responses as little-endian int32 token ids. No response is empty; the prompt may be.

    `steps`, if there are any, are the positions in prompt + response where each response's steps end.
    """

    prompt: bytes
    responses: tuple[bytes, ...]
    steps: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class EnsembleScore:
    """What an ensemble's score is made of; members in the order of ScoreResult.members."""

    mean: float
    min: float
    scores: tuple[float, ...]
    raw_scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ItemScore:
    """Exactly one of `score` and `failure` is set."""

    score: float | None
    failure: ItemFailure | None
    num_prompt_tokens: int
    num_response_tokens: int
    num_cached_tokens: int
    truncated: bool
    raw: float | None = None  # what the model gave, before any normaliser, calibration or penalty
    kind: ScoreKind = ScoreKind.RAW_LOGIT
    steps: tuple[float, ...] = ()
    attributes: tuple[float, ...] = ()  # named by ScoreResult.attributes
    std: float | None = None  # the model's own uncertainty, or the spread of an ensemble's members
    members: EnsembleScore | None = None


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
    attributes: tuple[str, ...] = ()
    members: tuple[tuple[str, str], ...] = ()  # of an ensemble: name and version of each
    # From the margin of two scores to the probability that the first is preferred, where one was fitted to this version
    curve: Callable[[float], float] | None = None


class StepStyle(enum.Enum):
    """How a model is shown the steps of a response."""

    ENDS = "ends"  # the response as it stands; the last token of each step is read
    APART = (
        "apart"  # after the bare prompt and a tag, each step tokenized by itself and closed by the tag, which is read
    )
    TAGGED = "tagged"  # a tag after each, which is read
    TURNS = "turns"  # each is a user's turn that the assistant answers with the tag; read is where the answer begins


@dataclass(frozen=True, slots=True)
class StepFormat:
    style: StepStyle = StepStyle.ENDS
    separator: str = "\n\n"  # what a response is split at if the caller does not give its steps
    tag: str = ""  # what follows each step; of TURNS, the answer
    joint: str = ""  # between a step's tag and the next step


@dataclass(frozen=True, slots=True)
class VerdictFormat:
    """What a judge that writes must end in: a number for each criterion. The score is their weighted sum."""

    criteria: tuple[str, ...]
    weights: tuple[float, ...]  # of the criteria
    lowest: float  # that a criterion's number may be
    highest: float
    max_tokens: int  # that it may write, the verdict among them
    pattern: str = ""  # regular expression with a group by each criterion's name; empty: a JSON object
    words: tuple[tuple[str, float], ...] = ()  # that may stand for numbers


def as_answered(score: float) -> float:
    """In fp32, as the reply holds it: what is equal there is equal here, however it was finished or averaged."""
    return float(struct.unpack("f", struct.pack("f", score))[0])


def at_the_end(pattern: str) -> str:
    """A regular expression of a text that ends in what `pattern` matches."""
    return rf"(?:{pattern})\Z"


@dataclass(frozen=True, slots=True)
class JudgeFormat:
    """How a language model is asked to judge; it is read where its answer would begin, or writes it."""

    template: str  # of the user's turn, with {prompt} and {response}
    verdict: VerdictFormat | None = None  # of one that writes


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
    in_parts: bool = False  # the template takes what is said in a message as a list of parts


def content_of(text: str, in_parts: bool) -> str | list[dict[str, str]]:
    """What is said in a message, as a chat template takes it."""
    return [{"type": "text", "text": text}] if in_parts else text
