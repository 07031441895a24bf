"""The engine's door: token ids in, raw scores out. Knows nothing of text, gRPC or calibration; loads no torch.

Everything here is plain data, so that it may cross to another process (engine/process.py) as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rewardserve.types import EncodedGroup, ItemFailure, JudgeFormat, StepFormat, TextSpec

ADAPTED = "-adapted"  # ends a version whose adapter is added to products over a shared backbone, not to weights


@dataclass(frozen=True, slots=True)
class EngineRequest:
    request_id: str  # unique among the requests in flight
    groups: tuple[EncodedGroup, ...]
    priority: int = 0
    deadline: float | None = None  # CLOCK_MONOTONIC, seconds
    client: str = ""
    variant: int = 0  # of the models that share the engine's backbone

    @property
    def num_tokens(self) -> int:
        return sum(len(g.prompt) + sum(map(len, g.responses)) for g in self.groups) // 4


@dataclass(frozen=True, slots=True)
class EngineItem:
    """Exactly one of `score` and `failure` is set."""

    score: float | None
    failure: ItemFailure | None = None
    attributes: tuple[float, ...] = ()  # of models with several objectives; EngineInfo names them
    steps: tuple[float, ...] = ()  # one for each step; `score` is the smallest
    std: float | None = None  # the model's own uncertainty, where it has one


@dataclass(frozen=True, slots=True)
class EngineGroup:
    items: tuple[EngineItem, ...]
    num_cached_tokens: int  # prompt tokens found in the prefix cache


@dataclass(frozen=True, slots=True)
class EngineResult:
    groups: tuple[EngineGroup, ...]
    queue_s: float  # from the engine's receipt to the first computed token
    compute_s: float  # from the first computed token to the last score


@dataclass(frozen=True, slots=True)
class Outcome:
    """The one end of every request: a result, or None when it was dropped (expired or cancelled)."""

    request_id: str
    result: EngineResult | None
    expired: bool = False


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What was loaded."""

    version: str
    architecture: str
    path: str  # "packed" or "padded", both of the native engine, or "vllm"
    path_reason: str
    dtype: str
    device: str
    num_parameters: int
    max_length: int  # prompt + response, tokens
    vocab_size: int
    canary_error: float
    prefix_cache_tokens: int
    bos_token_id: int | None = None
    attributes: tuple[str, ...] = ()
    is_probability: bool = False  # scores are between 0 and 1 by construction
    shift: float = 0.0  # final score = (score - shift) / scale, where the checkpoint brings a normaliser
    scale: float = 1.0
    reads_single_states: bool = True  # so that a step's last token can be read as well as a response's
    pattern: tuple[int, ...] = ()  # token ids that a sequence must hold, for that is where it is read
    appended: int | None = None  # token id that every sequence must end in
    judge: JudgeFormat | None = None  # how a language model is asked, where it is one that judges
    steps: StepFormat | None = None  # how a process reward model is shown steps
    text: TextSpec | None = None  # None: the checkpoint has no tokenizer, only ids are scored
    text_missing_reason: str = ""
    beside: "tuple[EngineInfo, ...]" = ()  # of the other models that share the backbone: variants 1, 2, ...

    def saying(self, **facts: Any) -> "EngineInfo":
        """With these, of every model that shares the backbone."""
        return replace(self, beside=tuple(replace(info, **facts) for info in self.beside), **facts)

    def of(self, variant: int) -> "EngineInfo":
        """Of one of the models that share the backbone."""
        return replace(self, beside=()) if variant == 0 else self.beside[variant - 1]


@dataclass(frozen=True, slots=True)
class BatchReport:
    """One finished forward, for the metrics."""

    num_tokens: int  # computed
    num_pairs: int
    num_prompt_tokens: int  # of them, computed for prompts
    num_cached_tokens: int  # prompt tokens found in the prefix cache instead
    compute_s: float
    queued_requests: int  # waiting in the scheduler when the batch ended
    queued_tokens: int
    variant: int = 0


@dataclass(slots=True)
class EngineListener:
    """What an engine tells its owner besides results. Called on the owner's event loop."""

    on_batch: Callable[[BatchReport], None] = field(default=lambda report: None)
    on_down: Callable[[str], None] = field(default=lambda reason: None)  # it died, and is being restarted
    on_up: Callable[[EngineInfo], None] = field(default=lambda info: None)
    on_part_down: Callable[[str], None] = field(default=lambda reason: None)  # one of several; the others go on
    on_failed: Callable[[str], None] = field(default=lambda reason: None)  # it died for good


class Engine(Protocol):
    """Loads one model version and scores with it."""

    async def start(self, listener: EngineListener) -> EngineInfo:
        """Loads the model. Raises LoadFailed with what to do about it."""

    async def score(self, request: EngineRequest) -> EngineResult:
        """Scores every response, or raises DeadlineExceeded or Unavailable. Cancelling it drops the work not begun."""

    async def update_weights(self, source: str) -> EngineInfo:
        """Takes over the weights of a checkpoint of the same shapes, in place; nothing may be in flight.

        Raises LoadFailed, and nothing has changed; Unavailable if the engine died of it, and comes back as it was.
        """

    async def stop(self) -> None:
        """Ends at once. What is still in flight is failed with Unavailable."""


class SeveralModels(Engine, Protocol):
    """An engine of several models over one backbone: its info has others beside it, requests name a variant."""

    def restart_with(self, sources: Sequence[str]) -> None:
        """What is loaded if it dies, in the order of the variants."""
