"""AsyncRewardClient: every method of the client, over grpc.aio. The blocking client runs this one."""

import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Sequence
from typing import Self

import grpc

from rewardserve.client import channels as rpcs
from rewardserve.client import messages
from rewardserve.client.calls import Calls
from rewardserve.client.channels import ChannelOptions, Channels, Metadata
from rewardserve.client.endpoints import Endpoints
from rewardserve.client.errors import InvalidRequest
from rewardserve.client.readiness import Readiness
from rewardserve.client.retry import Deadline, RetryPolicy
from rewardserve.client.stream import Finished, StreamScorer, pump
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
from rewardserve.v1 import models_pb2, scoring_pb2

DEFAULT_TIMEOUT_S = 60.0
DEFAULT_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
DEFAULT_WINDOW = 64
DEFAULT_COOL_DOWN_S = 2.0


class AsyncRewardClient:
    """A client of one or several rewardserve servers that serve the same models.

    `endpoints` are gRPC targets ("host:port"). A prompt's groups stay on one endpoint, chosen by the prompt's content,
    so that its prefix cache is hit; an endpoint that is unavailable is avoided for `cool_down_s` seconds. One that owes
    answers and is silent for 5 s is asked for its health: if 5 s later it has said nothing at all, its host is taken
    for gone, and its calls move or are tried again. A slow server, which does answer that, is waited for.
    `timeout` is in seconds and covers a whole call, retries included; no call is without one. `metadata` travels with
    every call. `channel_options` are gRPC's own, for what has no argument here (keepalive, TLS names).

    Every method raises RewardClientError where the server or the way to it fails. Belongs to one event loop.
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
        Deadline.after(timeout)  # a timeout that is none is refused here, not at the first call
        self._timeout_s = timeout
        self._endpoints = Endpoints(endpoints, cool_down_s)
        self._channels = Channels(
            credentials, max_message_bytes, metadata, channel_options, on_gone=self._endpoints.unavailable
        )
        self._calls = Calls(self._channels, self._endpoints, retry or RetryPolicy())

    async def score(
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
        """Scores all groups, in the order given. A response that cannot be scored fails by itself, in its item.

        Over several endpoints the groups are split and merged again; `timings` is then the maximum of each field.
        `steps` asks for a score of each step as well, `cache_response` keeps responses for later ones that begin alike.
        Raises VersionMismatch if the endpoints serve different versions, and the error of the first part that failed.
        """
        deadline, request_id = self._deadline(timeout), _new_id()
        sent = [messages.group(group) for group in groups]
        if not sent:
            raise InvalidRequest("there is nothing to score", violations=[("groups", "at least one group is needed")])
        options = messages.options(overflow, priority, steps, cache_response)

        def build(indices: Sequence[int]) -> scoring_pb2.ScoreRequest:
            # Parts have their own ids, for after a failover two of them may be with the same endpoint.
            part_id = request_id if len(indices) == len(sent) else f"{request_id}.{indices[0]}"
            share = [sent[index] for index in indices]
            return scoring_pb2.ScoreRequest(request_id=part_id, model=model, groups=share, options=options)

        keys = [self._key(group.prompt) for group in sent]
        parts = await self._calls.split(keys, build, deadline)
        return messages.score_result(request_id, sent, parts)

    def score_stream(
        self,
        groups: Iterable[Group] | AsyncIterable[Group],
        *,
        window: int = DEFAULT_WINDOW,
        model: str = "",
        overflow: Overflow = "error",
        priority: int = 0,
        steps: StepOptions | None = None,
        cache_response: bool = False,
        timeout: float | None = None,
    ) -> AsyncGenerator[Finished, None]:
        """Yields (group, GroupScore or RewardClientError) as they finish, in any order, each group exactly once.

        At most `window` groups are taken from `groups` and not yet yielded. `timeout` is each group's own, from the
        moment it is taken; streams that break are opened again and their unanswered groups sent again. Raises
        VersionMismatch when an answer comes from another model version than the first one did. An iterable that is not
        asynchronous must not block.
        """
        scorer = self.open_stream(
            window=window,
            model=model,
            overflow=overflow,
            priority=priority,
            steps=steps,
            cache_response=cache_response,
            timeout=timeout,
        )
        return pump(scorer, groups)

    def open_stream(
        self,
        *,
        window: int,
        model: str,
        overflow: Overflow,
        priority: int,
        steps: StepOptions | None,
        cache_response: bool,
        timeout: float | None,
    ) -> StreamScorer:
        """What score_stream is made of; the blocking client drives it from another thread."""
        template = scoring_pb2.ScoreRequest(
            request_id=_new_id(), model=model, options=messages.options(overflow, priority, steps, cache_response)
        )
        return StreamScorer(self._channels, self._calls, template, self._timeout(timeout), window)

    async def rank(
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
        """The responses from best to worst; at most `top_k` of them, or all if it is 0."""
        deadline, group = self._deadline(timeout), messages.group(Group(prompt, responses))
        request = scoring_pb2.RankRequest(
            request_id=_new_id(),
            model=model,
            prompt=group.prompt,
            responses=group.responses,
            top_k=top_k,
            options=messages.options(overflow, priority, steps, cache_response),
        )
        key = self._key(group.prompt)
        endpoint, reply = await self._calls.unary(rpcs.RANK, request, key, deadline)
        return messages.rank_result(reply, len(group.responses), endpoint)

    async def compare(
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
        """Margin and Bradley-Terry probability of `a` over `b`."""
        deadline, request_prompt = self._deadline(timeout), messages.prompt(prompt)
        request = scoring_pb2.CompareRequest(
            request_id=_new_id(),
            model=model,
            prompt=request_prompt,
            response_a=messages.response(a),
            response_b=messages.response(b),
            options=messages.options(overflow, priority, steps, cache_response),
        )
        key = self._key(request_prompt)
        _, reply = await self._calls.unary(rpcs.COMPARE, request, key, deadline)
        return messages.compare_result(reply)

    async def list_models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """The models of every endpoint; each says by `endpoint` where it is. Raises if any endpoint does not answer."""
        request = models_pb2.ListModelsRequest()
        replies = await self._calls.everywhere(rpcs.LIST, request, self._deadline(timeout))
        return tuple(messages.model_info(model, endpoint) for endpoint, reply in replies for model in reply.models)

    async def get_model(self, name: str, *, timeout: float | None = None) -> ModelInfo:
        """One model, as the first endpoint that answers serves it. Raises ModelNotFound."""
        request = models_pb2.GetModelRequest(name=name)
        endpoint, reply = await self._calls.unary(rpcs.GET, request, name.encode(), self._deadline(timeout))
        return messages.model_info(reply, endpoint)

    async def load_model(
        self, name: str, source: str, dtype: str = "auto", *, timeout: float | None = None
    ) -> ModelInfo:
        """Loads a checkpoint on every endpoint and returns when all are ready; a large one needs a longer `timeout`.

        Sent once and never again: unlike scoring, loading twice is not the same as loading once. If an endpoint fails,
        its error is raised and the others keep what they loaded. Raises VersionMismatch if they loaded different files.
        """
        request = models_pb2.LoadModelRequest(name=name, source=source, dtype=dtype)
        replies = await self._calls.everywhere(rpcs.LOAD, request, self._deadline(timeout))
        messages.one_version([(endpoint, _version(model)) for endpoint, model in replies])
        endpoint, model = replies[0]
        return messages.model_info(model, endpoint)

    async def unload_model(self, name: str, *, timeout: float | None = None) -> None:
        """Unloads the model on every endpoint; sent once and never again."""
        request = models_pb2.UnloadModelRequest(name=name)
        await self._calls.everywhere(rpcs.UNLOAD, request, self._deadline(timeout))

    async def swap_model(
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
        """Puts another version in the place of the one that serves, on every endpoint; sent once and never again.

        No request fails or is scored by two versions meanwhile. Raises ServerError (FAILED_PRECONDITION), and that
        endpoint goes on with the old one, if the new one ranks too few `canaries` right, or the `shadow_share` of live
        requests too differently. Endpoints change one by one: a caller of several may see both versions for a while.
        """
        request = models_pb2.SwapModelRequest(
            name=name,
            source=source,
            dtype=dtype,
            canaries=[messages.canary_pair(pair) for pair in canaries],
            min_canary_accuracy=min_canary_accuracy,
            shadow_share=shadow_share,
            shadow_requests=shadow_requests,
            shadow_timeout_s=shadow_timeout_s,
            min_rank_correlation=min_rank_correlation,
            keep_previous=keep_previous,
        )
        replies = await self._calls.everywhere(rpcs.SWAP, request, self._deadline(timeout))
        return tuple(messages.swap_result(reply, endpoint) for endpoint, reply in replies)

    async def rollback_model(self, name: str, *, timeout: float | None = None) -> ModelInfo:
        """The version before the last swap serves again, on every endpoint; sent once and never again."""
        request = models_pb2.RollbackModelRequest(name=name)
        replies = await self._calls.everywhere(rpcs.ROLLBACK, request, self._deadline(timeout))
        endpoint, model = replies[0]
        return messages.model_info(model, endpoint)

    async def update_weights(self, name: str, source: str, *, timeout: float | None = None) -> ModelInfo:
        """The model takes over the weights of a checkpoint of the same shapes in place, on every endpoint.

        For a reward model that is refreshed during a run: requests wait meanwhile, and no second copy of the model is
        loaded. Sent once and never again. Raises VersionMismatch if the endpoints took over different files.
        """
        request = models_pb2.UpdateWeightsRequest(name=name, source=source)
        replies = await self._calls.everywhere(rpcs.UPDATE_WEIGHTS, request, self._deadline(timeout))
        messages.one_version([(endpoint, _version(model)) for endpoint, model in replies])
        endpoint, model = replies[0]
        return messages.model_info(model, endpoint)

    async def wait_ready(self, timeout: float, model: str = "") -> None:
        """Returns when every endpoint is ready to score with `model` (or is up, where no model is named).

        Raises DeadlineExceeded naming those that are not, ModelNotFound if one then still knows no such model, and at
        once what waiting cannot cure (PermissionDenied, a server without health service).
        """
        await Readiness(self._channels, model).wait(self._endpoints.names, Deadline.after(timeout))

    async def close(self) -> None:
        """Cancels what is in flight and closes the channels. May be called again."""
        await self._channels.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def _key(self, prompt: scoring_pb2.Prompt) -> bytes:
        return messages.prompt_key(prompt) if len(self._endpoints) > 1 else b""  # there is nothing to choose

    def _timeout(self, timeout: float | None) -> float:
        return self._timeout_s if timeout is None else timeout

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline.after(self._timeout(timeout))


def _new_id() -> str:
    return uuid.uuid4().hex


def _version(model: models_pb2.Model) -> scoring_pb2.ModelVersion:
    return scoring_pb2.ModelVersion(name=model.name, version=model.version)
