"""RewardClient: AsyncRewardClient for code that is not asynchronous. Adds a thread and nothing else."""

import asyncio
import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Self

import grpc

from rewardserve.client.aio import (
    DEFAULT_COOL_DOWN_S,
    DEFAULT_MAX_MESSAGE_BYTES,
    DEFAULT_TIMEOUT_S,
    DEFAULT_WINDOW,
    AsyncRewardClient,
)
from rewardserve.client.channels import ChannelOptions, Metadata
from rewardserve.client.loop_thread import LoopThread
from rewardserve.client.retry import RetryPolicy
from rewardserve.client.stream import Finished, StreamScorer, outcome_of
from rewardserve.client.types import (
    CanaryPair,
    CompareResult,
    Group,
    ModelInfo,
    Overflow,
    Prompt,
    RankResult,
    Response,
    ScoreResult,
    StepOptions,
    SwapResult,
)

_LINGER_S = 0.05  # grpc delivers the last events of cancelled calls; a closed loop would log them as errors
_CLOSE_S = 5.0  # for calls in flight to be cancelled; nothing waits longer, not even the interpreter's exit


class RewardClient:
    """The blocking client. Its methods do what those of AsyncRewardClient say, and raise the same errors.

    May be shared by threads, and called where an event loop is running (Jupyter). Not to be taken through a fork, nor
    made after one that took an open client along: there a call raises RuntimeError.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str],
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        retry: RetryPolicy | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Metadata = (),
        cool_down_s: float = DEFAULT_COOL_DOWN_S,
        channel_options: ChannelOptions = (),
    ) -> None:
        self._async = AsyncRewardClient(
            endpoints,
            timeout=timeout,
            retry=retry,
            max_message_bytes=max_message_bytes,
            credentials=credentials,
            metadata=metadata,
            cool_down_s=cool_down_s,
            channel_options=channel_options,
        )
        self._loop = LoopThread("rewardserve-client")
        # Runs once: at close(), when the client is forgotten, or at the interpreter's exit.
        self._finalize = weakref.finalize(self, _shut_down, self._loop, self._async)

    def score(
        self,
        groups: Iterable[Group],
        *,
        model: str = "",
        overflow: Overflow = "error",
        priority: int = 0,
        steps: StepOptions | None = None,
        cache_response: bool = False,
        timeout: float | None = None,
    ) -> ScoreResult:
        """See AsyncRewardClient.score."""
        groups = tuple(groups)  # the caller's iterable runs in the caller's thread
        return self._loop.run(
            self._async.score(
                groups,
                model=model,
                overflow=overflow,
                priority=priority,
                steps=steps,
                cache_response=cache_response,
                timeout=timeout,
            )
        )

    def score_stream(
        self,
        groups: Iterable[Group],
        *,
        window: int = DEFAULT_WINDOW,
        model: str = "",
        overflow: Overflow = "error",
        priority: int = 0,
        steps: StepOptions | None = None,
        cache_response: bool = False,
        timeout: float | None = None,
    ) -> Iterator[Finished]:
        """See AsyncRewardClient.score_stream. `groups` is iterated in the caller's thread, between results."""
        scorer = self._async.open_stream(
            window=window,
            model=model,
            overflow=overflow,
            priority=priority,
            steps=steps,
            cache_response=cache_response,
            timeout=timeout,
        )
        try:
            for group in groups:
                while scorer.is_full:
                    yield self._loop.run(scorer.take())
                for finished, outcome in self._loop.run(scorer.exchange(group)):
                    yield finished, outcome_of(outcome)
            while scorer.num_open:
                yield self._loop.run(scorer.take())
        finally:
            self._end_stream(scorer)

    def rank(
        self,
        prompt: Prompt,
        responses: Sequence[Response],
        *,
        top_k: int = 0,
        model: str = "",
        overflow: Overflow = "error",
        priority: int = 0,
        steps: StepOptions | None = None,
        cache_response: bool = False,
        timeout: float | None = None,
    ) -> RankResult:
        """See AsyncRewardClient.rank."""
        return self._loop.run(
            self._async.rank(
                prompt,
                responses,
                top_k=top_k,
                model=model,
                overflow=overflow,
                priority=priority,
                steps=steps,
                cache_response=cache_response,
                timeout=timeout,
            )
        )

    def compare(
        self,
        prompt: Prompt,
        a: Response,
        b: Response,
        *,
        model: str = "",
        overflow: Overflow = "error",
        priority: int = 0,
        steps: StepOptions | None = None,
        cache_response: bool = False,
        timeout: float | None = None,
    ) -> CompareResult:
        """See AsyncRewardClient.compare."""
        return self._loop.run(
            self._async.compare(
                prompt,
                a,
                b,
                model=model,
                overflow=overflow,
                priority=priority,
                steps=steps,
                cache_response=cache_response,
                timeout=timeout,
            )
        )

    def list_models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """See AsyncRewardClient.list_models."""
        return self._loop.run(self._async.list_models(timeout=timeout))

    def get_model(self, name: str, *, timeout: float | None = None) -> ModelInfo:
        """See AsyncRewardClient.get_model."""
        return self._loop.run(self._async.get_model(name, timeout=timeout))

    def load_model(self, name: str, source: str, dtype: str = "auto", *, timeout: float | None = None) -> ModelInfo:
        """See AsyncRewardClient.load_model."""
        return self._loop.run(self._async.load_model(name, source, dtype, timeout=timeout))

    def unload_model(self, name: str, *, timeout: float | None = None) -> None:
        """See AsyncRewardClient.unload_model."""
        self._loop.run(self._async.unload_model(name, timeout=timeout))

    def swap_model(
        self,
        name: str,
        source: str,
        dtype: str = "auto",
        *,
        canaries: Iterable[CanaryPair] = (),
        min_canary_accuracy: float = 1.0,
        shadow_share: float = 0.0,
        shadow_requests: int = 100,
        shadow_timeout_s: float = 60.0,
        min_rank_correlation: float | None = None,
        keep_previous: bool = False,
        timeout: float | None = None,
    ) -> tuple[SwapResult, ...]:
        """See AsyncRewardClient.swap_model."""
        return self._loop.run(
            self._async.swap_model(
                name,
                source,
                dtype,
                canaries=tuple(canaries),
                min_canary_accuracy=min_canary_accuracy,
                shadow_share=shadow_share,
                shadow_requests=shadow_requests,
                shadow_timeout_s=shadow_timeout_s,
                min_rank_correlation=min_rank_correlation,
                keep_previous=keep_previous,
                timeout=timeout,
            )
        )

    def rollback_model(self, name: str, *, timeout: float | None = None) -> ModelInfo:
        """See AsyncRewardClient.rollback_model."""
        return self._loop.run(self._async.rollback_model(name, timeout=timeout))

    def update_weights(self, name: str, source: str, *, timeout: float | None = None) -> ModelInfo:
        """See AsyncRewardClient.update_weights."""
        return self._loop.run(self._async.update_weights(name, source, timeout=timeout))

    def wait_ready(self, timeout: float, model: str = "") -> None:
        """See AsyncRewardClient.wait_ready."""
        self._loop.run(self._async.wait_ready(timeout, model))

    def close(self) -> None:
        """Cancels what is in flight, closes the channels and ends the thread. May be called again."""
        self._finalize()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _end_stream(self, scorer: StreamScorer) -> None:
        with contextlib.suppress(RuntimeError):  # the client was closed first, and the stream with it
            self._loop.run(scorer.close())


def _shut_down(loop: LoopThread, client: AsyncRewardClient) -> None:
    with contextlib.suppress(Exception):  # whatever is wrong with the channels, the thread must end
        loop.run(_close(client), timeout_s=_CLOSE_S)
    loop.stop(_CLOSE_S)


async def _close(client: AsyncRewardClient) -> None:
    await client.close()
    await asyncio.sleep(_LINGER_S)
