"""Waiting until servers are ready, by grpc.health.v1. Knows nothing of scoring."""

import asyncio
from collections.abc import Sequence

import grpc

from rewardserve.client import health
from rewardserve.client.calls import gather_or_cancel
from rewardserve.client.channels import CHECK, Channels
from rewardserve.client.errors import DeadlineExceeded, PermissionDenied, RewardClientError
from rewardserve.client.retry import Deadline

_POLL_S = 0.2
_CHECK_TIMEOUT_S = 5.0
# Waiting does not help against these. NOT_FOUND is not one of them: a model that is about to be loaded is unknown.
_HOPELESS = frozenset({grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INVALID_ARGUMENT})


class Readiness:
    """Polls Health/Check for one model, or for the server as a whole where `model` is empty."""

    def __init__(self, channels: Channels, model: str) -> None:
        self._channels = channels
        self._request = health.HealthCheckRequest(service=health.service_name(model))

    async def wait(self, endpoints: Sequence[str], deadline: Deadline) -> None:
        """Returns when all are serving. Raises DeadlineExceeded, or at once an error that waiting cannot cure."""
        late = [reason for reason in await gather_or_cancel(self._wait(e, deadline) for e in endpoints) if reason]
        if late:
            message = f"not ready in time: {'; '.join(late)}"
            raise DeadlineExceeded(message, code=grpc.StatusCode.DEADLINE_EXCEEDED)

    async def _wait(self, endpoint: str, deadline: Deadline) -> str:
        """Why the endpoint was not ready when time ran out; empty if it was."""
        reason = "nobody asked it"
        while deadline.remaining_s() > 0:
            reason = await self._check(endpoint, min(_CHECK_TIMEOUT_S, deadline.remaining_s()))
            if not reason:
                return ""
            await asyncio.sleep(max(0.0, min(_POLL_S, deadline.remaining_s())))
        return f"{endpoint} ({reason})"

    async def _check(self, endpoint: str, timeout_s: float) -> str:
        try:
            reply = await self._channels.call(CHECK, self._request, endpoint, timeout_s)
        except RewardClientError as error:
            if error.code is None or error.code in _HOPELESS or isinstance(error, PermissionDenied):
                raise
            return f"{error.code.name}: {error.message}"
        return "" if reply.status == health.SERVING else "not serving"
