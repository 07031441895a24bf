"""Who may come in: limits on what is under way, before any work is spent on a request."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from rewardserve.errors import InvalidRequest, Overloaded
from rewardserve.metrics import ModelMetrics
from rewardserve.types import Conversation, Prompt, PromptGroup, Response, ScoreRequest, StepIds, Steps, TokenIds

CHARACTERS_PER_TOKEN = 3.5  # of English and code, a little low on purpose: the estimate should rather be too large


@dataclass(frozen=True, slots=True)
class Limits:
    max_pairs_per_request: int = 8192
    max_queued_requests: int = 4096
    max_queued_tokens: int = 4_000_000


class Admission:
    """Counts what one model has under way. Lives on the event loop; not thread-safe."""

    def __init__(self, limits: Limits, metrics: ModelMetrics) -> None:
        self._limits = limits
        self._metrics = metrics
        self._num_requests = 0
        self._num_tokens = 0
        self._tokens_per_s = 0.0  # of finished work, a moving average
        self.max_length: int | None = None  # of prompt + response; set when the model is loaded
        metrics.watch_in_flight(lambda: self._num_requests, lambda: self._num_tokens)

    @property
    def num_requests(self) -> int:
        return self._num_requests

    @contextlib.contextmanager
    def admit(self, request: ScoreRequest) -> Iterator[None]:
        """Counts the request until the block is left. Raises InvalidRequest or Overloaded."""
        self._check_shape(request)
        tokens = estimate_tokens(request, self.max_length)
        self._check_room(tokens)
        self._count(+1, tokens)
        try:
            yield
        finally:
            self._count(-1, -tokens)

    def _check_shape(self, request: ScoreRequest) -> None:
        if not request.groups:
            raise InvalidRequest("groups", "must not be empty")
        for number, group in enumerate(request.groups):
            if not group.responses:
                raise InvalidRequest(f"groups[{number}].responses", "must not be empty")
            if _is_empty(group.prompt):
                raise InvalidRequest(f"groups[{number}].prompt", "must not be empty")
        limit = self._limits.max_pairs_per_request
        if request.num_pairs > limit:
            raise InvalidRequest(
                "groups", f"{request.num_pairs} responses in one request, the limit is {limit}; split it"
            )

    def _check_room(self, tokens: int) -> None:
        """One request is always let in when nothing is under way, however large: it could never come in otherwise."""
        if self._num_requests >= self._limits.max_queued_requests:
            self._refuse("requests", f"{self._num_requests} requests are under way, the limit is reached")
        if self._num_requests and self._num_tokens + tokens > self._limits.max_queued_tokens:
            self._refuse("tokens", f"{self._num_tokens} tokens are under way, {tokens} more exceed the limit")

    def _refuse(self, reason: str, message: str) -> None:
        self._metrics.count_rejection(reason)
        raise Overloaded(message, self._retry_after_s())

    def _retry_after_s(self) -> float:
        """Until half of what is under way should be done."""
        if not self._tokens_per_s:
            return 1.0
        return min(30.0, max(0.05, 0.5 * self._num_tokens / self._tokens_per_s))

    def observe_rate(self, num_tokens: int, seconds: float) -> None:
        """A forward took `seconds` for `num_tokens`."""
        rate = num_tokens / max(seconds, 1e-6)
        self._tokens_per_s = rate if not self._tokens_per_s else 0.9 * self._tokens_per_s + 0.1 * rate

    def _count(self, requests: int, tokens: int) -> None:
        self._num_requests += requests
        self._num_tokens += tokens


def estimate_tokens(request: ScoreRequest, max_length: int | None = None) -> int:
    """From lengths alone: exact for ids, a guess for text. What is longer than the model takes, no engine will see."""
    return sum([_group_size(group, max_length, request.cache_response) for group in request.groups])


def _group_size(group: PromptGroup, max_length: int | None, own_prompts: bool) -> int:
    num_prompts = len(group.responses) if own_prompts else 1
    size = num_prompts * _size(group.prompt) + sum(map(_size, group.responses))
    return size if max_length is None else min(size, len(group.responses) * max_length)


def _size(part: Prompt | Response) -> int:
    if isinstance(part, TokenIds | StepIds):  # before the others: a pattern costs three times as much
        return len(part.data) // 4
    match part:
        case Conversation(messages):
            return sum(int(len(m.content) / CHARACTERS_PER_TOKEN) + 4 for m in messages)
        case str():
            return int(len(part) / CHARACTERS_PER_TOKEN) + 1
        case Steps(texts):
            return sum(_size(text) for text in texts)
        case _:
            return int(len(part.text) / CHARACTERS_PER_TOKEN) + 1


def _is_empty(prompt: Prompt) -> bool:
    match prompt:
        case TokenIds(data):
            return not data
        case Conversation(messages):
            return not messages
        case _:
            return not prompt.text
