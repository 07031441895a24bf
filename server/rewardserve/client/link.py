"""One open ScoreStream: who waits for which reply, and what becomes of them when it ends. Knows nothing of retries."""

import asyncio
import copy
from collections.abc import AsyncIterator

import grpc

from rewardserve.client.channels import Channels
from rewardserve.client.errors import DeadlineExceeded, RewardClientError, Unavailable
from rewardserve.client.translate import Code, from_rpc_error, from_status
from rewardserve.v1 import scoring_pb2


class StreamRefused(Exception):
    """The stream ended over one of the groups that were under way, and nobody knows which; the message says why."""


class Link:
    """One ScoreStream call to one endpoint: requests in, each one's own reply out.

    When the call ends, for whatever reason, every request still waiting fails with that reason; none waits forever.
    """

    def __init__(self, channels: Channels, endpoint: str) -> None:
        self._endpoint = endpoint
        self._outbox: asyncio.Queue[scoring_pb2.ScoreRequest | None] = asyncio.Queue()
        self._waiting: dict[str, asyncio.Future[scoring_pb2.ScoreResponse]] = {}
        self.ended = False
        wire = channels.wire(endpoint)
        self._pulse = wire.pulse
        self._call = wire.scoring.ScoreStream(self._requests(), metadata=channels.metadata)
        self._reader = asyncio.create_task(self._read())

    async def ask(self, request: scoring_pb2.ScoreRequest, timeout_s: float) -> scoring_pb2.ScoreResponse:
        """Raises RewardClientError or StreamRefused. `request.request_id` must be new to this stream."""
        future: asyncio.Future[scoring_pb2.ScoreResponse] = asyncio.get_running_loop().create_future()
        self._waiting[request.request_id] = future
        self._outbox.put_nowait(request)
        with self._pulse:
            try:
                async with asyncio.timeout(timeout_s):
                    return await future
            except TimeoutError:
                message = "the group was not answered in time"
                raise DeadlineExceeded(message, code=Code.DEADLINE_EXCEEDED, endpoint=self._endpoint) from None
            finally:
                self._waiting.pop(request.request_id, None)

    async def close(self, farewell_s: float) -> None:
        """Half-closes, so that the server sees an end and not a cancellation; cancels if it has not ended by then."""
        self._outbox.put_nowait(None)
        await asyncio.wait([self._reader], timeout=farewell_s)
        self._end(Unavailable("the stream was closed", code=Code.UNAVAILABLE))
        await asyncio.wait([self._reader])

    async def _requests(self) -> AsyncIterator[scoring_pb2.ScoreRequest]:
        while (request := await self._outbox.get()) is not None:
            if self.ended:
                return
            if request.request_id in self._waiting:  # do not send what nobody waits for any more
                yield request

    async def _read(self) -> None:
        error: Exception = Unavailable("the stream ended", code=Code.UNAVAILABLE, endpoint=self._endpoint)
        try:
            async for reply in self._call:
                self._deliver(reply)
        except grpc.RpcError as failure:
            error = _broken(from_rpc_error(failure, self._endpoint))
            if error.code is Code.RESOURCE_EXHAUSTED and error.retry_after_s is None:  # a message was too large
                error = StreamRefused(str(error))
        except asyncio.CancelledError:
            pass  # the call was cancelled, by _end or by the channel's closing; this task is never cancelled
        finally:
            self._end(error)

    def _deliver(self, reply: scoring_pb2.ScoreResponse) -> None:
        future = self._waiting.get(reply.request_id)
        if future is None or future.done():
            return  # an answer to a request that was given up
        if reply.HasField("error"):
            future.set_exception(from_status(reply.error, self._endpoint))
        else:
            future.set_result(reply)

    def _end(self, error: Exception) -> None:
        self.ended = True
        self._outbox.put_nowait(None)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(copy.copy(error))  # each group counts its own attempts
        self._call.cancel()


def _broken(error: RewardClientError) -> RewardClientError:
    """How a stream's own end counts for the groups that it leaves unanswered.

    A fault in one group is a reply with `error` set. If the stream as a whole ends by one of these, it broke: grpc.aio
    says INTERNAL where a write meets a connection just lost (masking the real status), a dying server CANCELLED.
    """
    if error.code not in (Code.INTERNAL, Code.UNKNOWN, Code.CANCELLED):
        return error
    return Unavailable(
        f"the stream broke ({error.code.name}: {error.message})", code=Code.UNAVAILABLE, endpoint=error.endpoint
    )
