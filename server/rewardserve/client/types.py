"""What goes into the client and what comes out. Plain frozen values: no protobuf, no channels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import grpc

from rewardserve.client.errors import ItemFailed
from rewardserve.client.token_ids import TokenIds

Overflow: TypeAlias = Literal["error", "truncate_prompt_left", "truncate_response_right"]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str  # as the checkpoint's chat template knows them
    content: str


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt already rendered by the caller (template, BOS and all); tokenized exactly as it stands."""

    text: str


# Plain text (one user turn), a conversation, token ids, or rendered text.
Prompt: TypeAlias = str | Sequence[ChatMessage | Mapping[str, str]] | TokenIds | Rendered


@dataclass(frozen=True, slots=True)
class Steps:
    """A response cut into steps: texts, or token ids with the number of tokens up to each step's end."""

    texts: Sequence[str] = ()
    token_ids: TokenIds | None = None
    ends: Sequence[int] = ()

    def __post_init__(self) -> None:
        if isinstance(self.texts, str):
            raise TypeError("texts is a sequence of steps; a whole text is a response as it is")
        if bool(self.texts) == (self.token_ids is not None) or bool(self.ends) != (self.token_ids is not None):
            raise ValueError("steps are either texts, or token_ids with ends")


Response: TypeAlias = str | TokenIds | Steps


@dataclass(frozen=True, slots=True)
class StepOptions:
    """A score for each step of a response, and how they become the response's."""

    reduction: Literal["min", "mean", "product", "last"] = "min"  # a product only of steps that are probabilities
    separator: str = ""  # what whole texts are cut at; empty: what the model's authors use, else a blank line


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and the responses to it. `id` is returned as it is."""

    prompt: Prompt
    responses: Sequence[Response]
    id: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.responses, str | bytes | TokenIds):  # a str is a sequence of str: one item for each letter
            raise TypeError("responses is a sequence of responses; put a single one into a list")


@dataclass(frozen=True, slots=True)
class Status:
    code: grpc.StatusCode
    message: str = ""


@dataclass(frozen=True, slots=True)
class ItemScore:
    """What became of one response. A failed one has no number: reading its `score` raises ItemFailed."""

    status: Status
    score_or_none: float | None  # None exactly where the item failed
    kind: str  # what the number means: "raw_logit" is the head's fp32 output, not squashed
    num_prompt_tokens: int = 0
    num_response_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    truncated: bool = False
    raw_or_none: float | None = None  # what the model gave, before any normaliser, calibration or penalty
    steps: tuple[float, ...] = ()  # of process reward models, or where steps were asked for
    attributes: Mapping[str, float] = field(default_factory=dict)  # of models with several objectives
    std: float | None = None  # uncertainty: the model's own, or an ensemble's
    members: Mapping[str, float] = field(default_factory=dict)  # of an ensemble: every member's score, by its name

    @property
    def ok(self) -> bool:
        return self.status.code is grpc.StatusCode.OK

    @property
    def score(self) -> float:
        if self.score_or_none is None:
            raise ItemFailed(self.status.message, code=self.status.code)
        return self.score_or_none


@dataclass(frozen=True, slots=True)
class GroupScore:
    """The items of one group, in the order its responses were sent."""

    id: str
    items: tuple[ItemScore, ...]
    model_version: str

    @property
    def scores(self) -> tuple[float, ...]:
        """Every score; raises ItemFailed if any response has none."""
        return tuple(item.score for item in self.items)


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the server's time went, in seconds. Of a call split over endpoints: the maximum of each field."""

    admission_s: float = 0.0
    tokenization_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """Groups in the order sent, all scored by one model version."""

    request_id: str
    model_name: str
    model_version: str
    groups: tuple[GroupScore, ...]
    timings: Timings


@dataclass(frozen=True, slots=True)
class RankedResponse:
    index: int  # position in the responses sent
    item: ItemScore


@dataclass(frozen=True, slots=True)
class RankResult:
    """`ranked` goes from best to worst; `failed` holds the responses that have no score and hence no rank."""

    request_id: str
    model_name: str
    model_version: str
    ranked: tuple[RankedResponse, ...]
    failed: tuple[RankedResponse, ...]
    timings: Timings

    @property
    def best(self) -> RankedResponse:
        """The best response; raises ItemFailed if none could be scored."""
        if not self.ranked:
            status = self.failed[0].item.status if self.failed else Status(grpc.StatusCode.UNKNOWN)
            raise ItemFailed(f"no response could be ranked; the first failed with: {status.message}", code=status.code)
        return self.ranked[0]


@dataclass(frozen=True, slots=True)
class CompareResult:
    """Two responses to one prompt. If either failed there is no margin: reading it raises that item's ItemFailed."""

    request_id: str
    model_name: str
    model_version: str
    a: ItemScore
    b: ItemScore
    margin_or_none: float | None
    probability_a_or_none: float | None
    timings: Timings

    @property
    def margin(self) -> float:
        """score_a - score_b"""
        return self._unless_failed(self.margin_or_none)

    @property
    def probability_a(self) -> float:
        """Bradley-Terry: the probability that `a` is preferred."""
        return self._unless_failed(self.probability_a_or_none)

    def _unless_failed(self, value: float | None) -> float:
        if value is None:
            failed = self.b if self.a.ok else self.a
            raise ItemFailed(failed.status.message, code=failed.status.code)
        return value


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model as one endpoint serves it."""

    name: str
    version: str
    state: str  # "loading", "serving", "restarting", "draining" or "failed"
    endpoint: str  # set by the client
    message: str = ""
    source: str = ""
    architecture: str = ""
    path: str = "unspecified"  # "packed", "padded" or "vllm"; `path_reason` says why not packed
    path_reason: str = ""
    dtype: str = ""
    device: str = ""
    num_parameters: int = 0
    max_length: int = 0  # prompt + response, in tokens
    vocab_size: int = 0
    has_tokenizer: bool = False
    has_chat_template: bool = False
    prompt_tokenized_once: bool = False
    canary_error: float = 0.0  # relative, against the padded Hugging Face forward
    num_restarts: int = 0
    prefix_cache_tokens: int = 0  # capacity
    attributes: tuple[str, ...] = ()  # that a model with several objectives gives besides its score
    scores_steps: bool = False  # a process reward model
    members: tuple[str, ...] = ()  # of an ensemble
    aggregate: str = ""  # how they become one score


@dataclass(frozen=True, slots=True)
class CanaryPair:
    """Two responses of which a new version must score the first higher."""

    prompt: Prompt
    better: Response
    worse: Response


@dataclass(frozen=True, slots=True)
class SwapResult:
    """What took the place of what, and how it was tried before."""

    model: ModelInfo
    previous_version: str
    num_canaries: int
    num_canaries_right: int
    num_shadow_requests: int
    rank_correlation: float | None  # Spearman's, between the versions' scores of the shadowed requests
