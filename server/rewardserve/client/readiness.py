"""Waiting until servers are ready, by grpc.health.v1. Knows nothing of scoring."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from rewardserve.client import health
from rewardserve.client.calls import gather_or_cancel
from rewardserve.client.channels import CHECK, Channels
from rewardserve.client.errors import DeadlineExceeded, ModelNotFound, PermissionDenied, RewardClientError
from rewardserve.client.retry import Deadline

_POLL_S = 0.2
_CHECK_TIMEOUT_S = 5.0
# Waiting does not help against these. NOT_FOUND is not one of them: a model that is about to be loaded is unknown.
_HOPELESS = frozenset({grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INVALID_ARGUMENT})


@dataclass(frozen=True, slots=True)
class _Late:
    """An endpoint that is not ready, and why."""

    endpoint: str
    said: str
    code: grpc.StatusCode | None = None  # None where it answered


class Readiness:
    """Polls Health/Check for one model, or for the server as a whole where `model` is empty."""

    def __init__(self, channels: Channels, model: str) -> None:
        self._channels = channels
        self._model = model
        self._request = health.HealthCheckRequest(service=health.service_name(model))

    async def wait(self, endpoints: Sequence[str], deadline: Deadline) -> None:
        """Returns when all are serving. Raises DeadlineExceeded, or at once an error that waiting cannot cure.

        Raises ModelNotFound where the model is still unknown when time is up.
        """
        late = [reason for reason in await gather_or_cancel(self._wait(e, deadline) for e in endpoints) if reason]
        unknown = [reason.endpoint for reason in late if reason.code is grpc.StatusCode.NOT_FOUND]
        if unknown and self._model:
            message = f"no model '{self._model}' is served there: {', '.join(unknown)}"
            raise ModelNotFound(message, code=grpc.StatusCode.NOT_FOUND)
        if late:
            message = f"not ready in time: {'; '.join(f'{each.endpoint} ({each.said})' for each in late)}"
            raise DeadlineExceeded(message, code=grpc.StatusCode.DEADLINE_EXCEEDED)

    async def _wait(self, endpoint: str, deadline: Deadline) -> _Late | None:
        """Why the endpoint was not ready when time ran out; None if it was."""
        late: _Late | None = None
        while deadline.remaining_s() > 0:
            checked = await self._check(endpoint, min(_CHECK_TIMEOUT_S, deadline.remaining_s()))
            if checked is None:
                return None
            if late is None or checked.code is not grpc.StatusCode.DEADLINE_EXCEEDED:
                late = checked  # a last look cut short by the deadline says less than the one before
            await asyncio.sleep(max(0.0, min(_POLL_S, deadline.remaining_s())))
        return late or _Late(endpoint, "nobody asked it")

    async def _check(self, endpoint: str, timeout_s: float) -> _Late | None:
        try:
            reply = await self._channels.call(CHECK, self._request, endpoint, timeout_s)
        except RewardClientError as error:
            if error.code is None or error.code in _HOPELESS or isinstance(error, PermissionDenied):
                raise
            return _Late(endpoint, f"{error.code.name}: {error.message}", error.code)
        return None if reply.status == health.SERVING else _Late(endpoint, "not serving")
