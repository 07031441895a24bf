"""Calls that are tried again and that move to another endpoint. Knows which endpoint said what, not what it meant."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from rewardserve.client.channels import SCORE, Channels, Rpc
from rewardserve.client.endpoints import Endpoints
from rewardserve.client.errors import DeadlineExceeded, InvalidRequest, RewardClientError
from rewardserve.client.messages import Part, renumber
from rewardserve.client.retry import Deadline, RetryPolicy, retry_delay_s
from rewardserve.v1 import scoring_pb2

Reply = TypeVar("Reply")
Send = Callable[[str, float], Awaitable[Reply]]  # (endpoint, timeout_s) -> reply; raises RewardClientError
BuildRequest = Callable[[Sequence[int]], scoring_pb2.ScoreRequest]  # of the groups at these indices


@dataclass(frozen=True, slots=True)
class Attempt:
    number: int = 1
    tried: frozenset[str] = frozenset()  # the endpoints found unavailable in this attempt
    failed_before: str = ""  # of what


class Calls:
    """Sends through `channels`, chooses by `endpoints`, tries again as `policy` says."""

    def __init__(self, channels: Channels, endpoints: Endpoints, policy: RetryPolicy) -> None:
        self._channels = channels
        self._endpoints = endpoints
        self._policy = policy

    async def unary(self, rpc: Rpc, request: Message, key: bytes, deadline: Deadline) -> tuple[str, Any]:
        """(endpoint, reply) of one message that belongs to one key."""
        return await self.one(partial(self._channels.call, rpc, request), key, deadline)

    async def one(self, send: Send[Reply], key: bytes, deadline: Deadline) -> tuple[str, Reply]:
        """(endpoint, reply) of `send`, on the key's endpoint or the next one that answers."""
        attempt = Attempt()
        while True:
            endpoint = self._endpoints.choose(key, attempt.tried)
            try:
                return endpoint, await self._send(send, endpoint, deadline)
            except RewardClientError as error:
                attempt = await self._next_attempt(error, endpoint, attempt, deadline)

    async def split(self, keys: Sequence[bytes], build: BuildRequest, deadline: Deadline) -> list[Part]:
        """Every key's group scored on its own endpoint, one message per endpoint, all at the same time."""
        return await self._split(range(len(keys)), keys, build, Attempt(), deadline)

    async def _split(
        self, indices: Iterable[int], keys: Sequence[bytes], build: BuildRequest, attempt: Attempt, deadline: Deadline
    ) -> list[Part]:
        shares: dict[str, list[int]] = {}
        for index in indices:
            shares.setdefault(self._endpoints.choose(keys[index], attempt.tried), []).append(index)
        parts = [self._part(name, share, keys, build, attempt, deadline) for name, share in shares.items()]
        return [part for nested in await gather_or_cancel(parts) for part in nested]

    async def _part(
        self,
        endpoint: str,
        indices: Sequence[int],
        keys: Sequence[bytes],
        build: BuildRequest,
        attempt: Attempt,
        deadline: Deadline,
    ) -> list[Part]:
        send = partial(self._channels.call, SCORE, build(indices))
        try:
            return [Part(endpoint, tuple(indices), await self._send(send, endpoint, deadline))]
        except RewardClientError as error:
            if isinstance(error, InvalidRequest):
                renumber(error, indices)
            attempt = await self._next_attempt(error, endpoint, attempt, deadline)
        # Split anew: the groups of an endpoint that went away have different second choices.
        return await self._split(indices, keys, build, attempt, deadline)

    async def everywhere(self, rpc: Rpc, request: Message, deadline: Deadline) -> list[tuple[str, Any]]:
        """(endpoint, reply) of every endpoint, each asked once. If any fails, the first failure is raised after all
        have answered: what loads a model is not stopped half-way because another endpoint refused."""
        names = self._endpoints.names
        sent = (self._channels.call(rpc, request, name, deadline.remaining_s()) for name in names)
        replies = await asyncio.gather(*sent, return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException):
                raise reply
        return list(zip(names, replies, strict=True))

    async def _send(self, send: Send[Reply], endpoint: str, deadline: Deadline) -> Reply:
        reply = await send(endpoint, deadline.remaining_s())
        self._endpoints.answered(endpoint)
        return reply

    async def _next_attempt(
        self, error: RewardClientError, endpoint: str, attempt: Attempt, deadline: Deadline
    ) -> Attempt:
        """Returns when it is time to try again; raises `error` if it is not to be."""
        if error.code is grpc.StatusCode.UNAVAILABLE:
            self._endpoints.unavailable(endpoint)
            tried = attempt.tried | {endpoint}
            if len(tried) < len(self._endpoints):
                return replace(attempt, tried=tried, failed_before=str(error))
        known, left_s = self._endpoints.has_answered(endpoint), deadline.remaining_s()
        delay_s = retry_delay_s(self._policy, error, attempt.number, left_s, random.random(), known)
        if delay_s is None:
            error.attempts = attempt.number
            if isinstance(error, DeadlineExceeded):
                error.before = attempt.failed_before
            raise error
        await asyncio.sleep(delay_s)
        return Attempt(attempt.number + 1, failed_before=str(error))


async def gather_or_cancel(coroutines: Iterable[Awaitable[Reply]]) -> list[Reply]:
    """All results, or the first exception once every other task has been cancelled and has ended."""
    coroutines = list(coroutines)
    if len(coroutines) == 1:  # nearly every call; a task of its own would be 3 % of it
        return [await coroutines[0]]
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
