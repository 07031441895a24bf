"""One long-lived channel per endpoint. Sends a message once; knows nothing of retries or of what is in the message.

A channel is given up, and another opened, only where the host at its other end is gone (pulse.py).
"""

import asyncio
import os
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import Message

from rewardserve.client import health
from rewardserve.client.errors import DeadlineExceeded, InvalidRequest, RewardClientError, Unavailable
from rewardserve.client.pulse import Pulse
from rewardserve.client.translate import from_rpc_error
from rewardserve.v1 import models_pb2_grpc, scoring_pb2_grpc

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]
ChannelOptions: TypeAlias = Sequence[tuple[str, Any]]

# gRPC's own defaults suit a phone: 20 s to notice that a connection is not coming, and up to two minutes until a
# server that is back is tried again.
CONNECT_TIMEOUT_S = 5.0
_INITIAL_RECONNECT_MS = 200
_MAX_RECONNECT_MS = 3_000
_THIS_MACHINE = re.compile(r"((dns|ipv4|ipv6):/*)?(localhost|127(\.\d+){3}|\[?::1\]?)(:\d+)?")


@dataclass(frozen=True, slots=True)
class Wire:
    """What can be called on one endpoint."""

    channel: grpc.aio.Channel
    scoring: scoring_pb2_grpc.ScoringStub
    models: models_pb2_grpc.ModelsStub
    check: grpc.aio.UnaryUnaryMultiCallable
    pulse: Pulse


Rpc: TypeAlias = Callable[[Wire], grpc.aio.UnaryUnaryMultiCallable]
SCORE: Rpc = attrgetter("scoring.Score")
RANK: Rpc = attrgetter("scoring.Rank")
COMPARE: Rpc = attrgetter("scoring.Compare")
LIST: Rpc = attrgetter("models.List")
GET: Rpc = attrgetter("models.Get")
LOAD: Rpc = attrgetter("models.Load")
UNLOAD: Rpc = attrgetter("models.Unload")
SWAP: Rpc = attrgetter("models.Swap")
UPDATE_WEIGHTS: Rpc = attrgetter("models.UpdateWeights")
ROLLBACK: Rpc = attrgetter("models.Rollback")
CHECK: Rpc = attrgetter("check")


# gRPC's threads do not come along into a process that is forked while a channel is open: what is called there waits for
# them for ever, whatever its deadline, or crashes.
_open_channels: weakref.WeakSet[grpc.aio.Channel] = weakref.WeakSet()
_were_open_at_fork = False


def _after_fork() -> None:
    global _were_open_at_fork
    _were_open_at_fork = _were_open_at_fork or bool(_open_channels)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Channels:
    """Channels open at their first use, in the event loop that uses them."""

    def __init__(
        self,
        credentials: grpc.ChannelCredentials | None,
        max_message_bytes: int,
        metadata: Metadata,
        options: ChannelOptions,
        on_gone: Callable[[str, float], None],
    ) -> None:
        """`on_gone(endpoint, for_s)`: its host is gone; it takes so long to see whether there is one again."""
        self._credentials = credentials
        self._max_message_bytes = max_message_bytes
        self.metadata = _checked(metadata)
        self._options = (*_defaults(max_message_bytes), *options)  # the caller's come last and win
        self._on_gone = on_gone
        self._wires: dict[str, Wire] = {}
        self.closed = False

    async def call(self, rpc: Rpc, request: Message, endpoint: str, timeout_s: float) -> Any:
        """One attempt. Raises RewardClientError and nothing else, but for RuntimeError if closed or after a fork."""
        self.check_size(request)
        if timeout_s <= 0:
            message = "no time was left to send the request"
            raise DeadlineExceeded(message, code=grpc.StatusCode.DEADLINE_EXCEEDED, endpoint=endpoint)
        wire = self.wire(endpoint)
        with wire.pulse:
            try:
                return await rpc(wire)(request, timeout=timeout_s, metadata=self.metadata)
            except grpc.RpcError as error:
                raise from_rpc_error(error, endpoint) from error
            except asyncio.CancelledError:
                if _is_cancelling():
                    raise
                if wire.pulse.is_gone:
                    message = "the server is silent, and does not say how it is"
                    raise Unavailable(message, code=grpc.StatusCode.UNAVAILABLE, endpoint=endpoint) from None
                if self.closed:  # close() cancelled the call, not the caller's task
                    raise RewardClientError("the client was closed during the call", endpoint=endpoint) from None
                raise

    def wire(self, endpoint: str) -> Wire:
        if self.closed:
            raise RuntimeError("the client is closed")
        if _were_open_at_fork:
            raise RuntimeError(
                "this process was forked while a client was in use, and gRPC cannot be used in it; start processes by "
                "'spawn' or 'forkserver', or close every client before the fork and make new ones after it"
            )
        if endpoint not in self._wires:
            self._wires[endpoint] = self._open(endpoint)
        return self._wires[endpoint]

    def check_size(self, request: Message) -> None:
        """Raises InvalidRequest where gRPC would refuse to send; on a stream its refusal would hit every group."""
        size = request.ByteSize()
        if size > self._max_message_bytes:
            raise InvalidRequest(f"a message of {size} bytes exceeds max_message_bytes={self._max_message_bytes}")

    async def close(self) -> None:
        """Cancels what is in flight."""
        self.closed = True
        wires, self._wires = self._wires, {}
        for wire in wires.values():
            wire.pulse.stop()
            await _close(wire.channel)

    def _open(self, endpoint: str) -> Wire:
        options = self._options
        if _THIS_MACHINE.fullmatch(endpoint):  # a proxy, as http_proxy may name one, has a 127.0.0.1 of its own
            options = (("grpc.enable_http_proxy", 0), *options)
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(endpoint, options=options)
        else:
            channel = grpc.aio.secure_channel(endpoint, self._credentials, options=options)
        _open_channels.add(channel)
        check = channel.unary_unary(
            health.CHECK,
            request_serializer=health.HealthCheckRequest.SerializeToString,
            response_deserializer=health.HealthCheckResponse.FromString,
        )
        pulse = Pulse(partial(self._is_there, check), partial(self._give_up, endpoint))
        return Wire(channel, scoring_pb2_grpc.ScoringStub(channel), models_pb2_grpc.ModelsStub(channel), check, pulse)

    async def _is_there(self, check: grpc.aio.UnaryUnaryMultiCallable, timeout_s: float) -> bool:
        """Whether there is any answer. That the connection broke is one: gRPC knows then what to do."""
        try:
            await check(health.HealthCheckRequest(), timeout=timeout_s, metadata=self.metadata)
        except grpc.RpcError as error:
            return error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
        return True

    async def _give_up(self, endpoint: str) -> None:
        """Ends what is in flight there, and connects anew."""
        wire = self._wires.pop(endpoint, None)
        if wire is None:  # closed meanwhile
            return
        self._on_gone(endpoint, CONNECT_TIMEOUT_S)
        await _close(wire.channel)
        if not self.closed:
            self.wire(endpoint).channel.get_state(try_to_connect=True)


async def _close(channel: grpc.aio.Channel) -> None:
    await channel.close()
    _open_channels.discard(channel)


def _checked(metadata: Metadata) -> Metadata:
    """Raises ValueError for what gRPC would fail every call over, in words of its own."""
    for key, value in metadata:
        if not re.fullmatch(r"[0-9a-z_.-]+", key):
            raise ValueError(f"a key of metadata has lower-case letters, digits, '-', '_' and '.', unlike {key!r}")
        is_text = isinstance(value, str) and re.fullmatch(r"[ -~]*", value)
        if not (key.endswith("-bin") and isinstance(value, bytes)) and not is_text:
            raise ValueError(f"metadata {key!r} is neither printable ASCII nor, with a key that ends in -bin, bytes")
    return tuple(metadata)


def _defaults(max_message_bytes: int) -> ChannelOptions:
    return (
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.min_reconnect_backoff_ms", int(1000 * CONNECT_TIMEOUT_S)),
        ("grpc.initial_reconnect_backoff_ms", _INITIAL_RECONNECT_MS),
        ("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_MS),
        # Or a process has one connection to an endpoint, and a new channel finds the one that was given up.
        ("grpc.use_local_subchannel_pool", 1),
    )


def _is_cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
