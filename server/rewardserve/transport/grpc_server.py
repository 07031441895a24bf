"""The gRPC door: thin methods over ScoringService and Registry. No torch, no thinking.

Handlers are registered by hand instead of through the generated `add_..._to_server`, because a message that does not
parse (a string that is not UTF-8, say) should be answered INVALID_ARGUMENT, and grpc answers INTERNAL.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status

from rewardserve.errors import ControlDisabled, DeadlineExceeded, InternalError, InvalidRequest, RewardServeError
from rewardserve.metrics import ModelMetrics
from rewardserve.service.rank import compare, rank
from rewardserve.service.registry import Registry
from rewardserve.service.score import ScoringService
from rewardserve.service.swap import rollback, swap
from rewardserve.transport import convert
from rewardserve.transport.status import status_of
from rewardserve.v1 import models_pb2, scoring_pb2

log = logging.getLogger(__name__)

SCORING = "rewardserve.v1.Scoring"
MODELS = "rewardserve.v1.Models"
CLIENT_ID = "x-client-id"
GRPC_LOG = "grpc._cython.cygrpc"
CAUGHT_UP, CAUGHT_UP_S = 10, 0.1  # fewer calls in that time are not read from a backlog
QUIET_TIMES = 2  # in a row: on busy cores, gRPC's own thread may stand still for one
LONGEST_S = 1e9  # 30 years; the largest double, for some the word for no limit, cannot be counted in ticks

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DoorOptions:
    allow_model_control: bool = False
    max_stream_requests: int = 256  # under way per ScoreStream; beyond it the stream is not read
    unload_grace_s: float = 30.0
    log_requests: bool = False
    log_text: bool = False


class _NobodyListens(logging.Filter):
    """gRPC reports a reply to a caller whose deadline passes as it is sent like a bug of ours, with a traceback, if it
    hears of the caller later than of the reply. What became of the request is in the log already."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], grpc.aio.InternalError))


_NOBODY_LISTENS = _NobodyListens()  # one, for a logger keeps what it is given


@dataclass(slots=True)
class _Malformed:
    """Stands for a message that is none, with what every message has."""

    reason: str
    request_id: str = ""
    model: str = ""


def _parser(kind: type[Message]) -> Callable[[bytes], Message | _Malformed]:
    def parse(data: bytes) -> Message | _Malformed:
        try:
            return kind.FromString(data)
        except DecodeError as error:
            return _Malformed(f"not a valid {kind.DESCRIPTOR.full_name}: {error}")

    return parse


class GrpcDoor:
    def __init__(self, service: ScoringService, registry: Registry, options: DoorOptions) -> None:
        self._service = service
        self._registry = registry
        self._options = options
        self._closing = asyncio.Event()
        self._num_read = 0  # calls
        logging.getLogger(GRPC_LOG).addFilter(_NOBODY_LISTENS)

    def close(self) -> None:
        """Streams end once what they have under way is answered."""
        self._closing.set()

    async def has_caught_up(self, within_s: float) -> None:
        """Returns when calls are read as they come. gRPC would cancel those that are unread when its server stops, and
        nobody would know that a retry is safe."""
        ends_at = time.monotonic() + within_s
        quiet = 0
        while quiet < QUIET_TIMES and time.monotonic() < ends_at:
            before = self._num_read
            await asyncio.sleep(CAUGHT_UP_S)
            quiet = quiet + 1 if self._num_read - before < CAUGHT_UP else 0

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        scoring = {
            "Score": self._unary(self._score, scoring_pb2.ScoreRequest),
            "Rank": self._unary(self._rank, scoring_pb2.RankRequest),
            "Compare": self._unary(self._compare, scoring_pb2.CompareRequest),
            "ScoreStream": grpc.stream_stream_rpc_method_handler(
                self._score_stream, _parser(scoring_pb2.ScoreRequest), scoring_pb2.ScoreResponse.SerializeToString
            ),
        }
        models = {
            "List": self._unary(self._list, models_pb2.ListModelsRequest),
            "Get": self._unary(self._get, models_pb2.GetModelRequest),
            "Load": self._unary(self._load, models_pb2.LoadModelRequest),
            "Unload": self._unary(self._unload, models_pb2.UnloadModelRequest),
            "Swap": self._unary(self._swap, models_pb2.SwapModelRequest),
            "Rollback": self._unary(self._rollback, models_pb2.RollbackModelRequest),
            "UpdateWeights": self._unary(self._update_weights, models_pb2.UpdateWeightsRequest),
        }
        return [
            grpc.method_handlers_generic_handler(SCORING, scoring),
            grpc.method_handlers_generic_handler(MODELS, models),
        ]

    def _unary(
        self, method: Callable[[Any, grpc.aio.ServicerContext], Awaitable[Message]], request: type[Message]
    ) -> grpc.RpcMethodHandler:
        async def handle(message: Message | _Malformed, context: grpc.aio.ServicerContext) -> Message:
            self._num_read += 1
            try:
                return await method(self._checked(message, context), context)
            except Exception as error:
                await context.abort_with_status(rpc_status.to_status(status_of(_foreseen(error))))
                raise AssertionError("abort raises") from error

        return grpc.unary_unary_rpc_method_handler(handle, _parser(request), lambda reply: reply.SerializeToString())

    # -- Scoring ---------------------------------------------------------------------------------------------------

    async def _score(
        self, message: scoring_pb2.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> scoring_pb2.ScoreResponse:
        with self._counted(message, context):
            request = convert.score_request(message, _deadline(context, message.timeout_s), _client(context))
            return convert.score_response(await self._service.score(request))

    async def _rank(
        self, message: scoring_pb2.RankRequest, context: grpc.aio.ServicerContext
    ) -> scoring_pb2.RankResponse:
        with self._counted(message, context):
            request = convert.rank_request(message, _deadline(context), _client(context))
            return convert.rank_response(await rank(self._service, request, message.top_k))

    async def _compare(
        self, message: scoring_pb2.CompareRequest, context: grpc.aio.ServicerContext
    ) -> scoring_pb2.CompareResponse:
        with self._counted(message, context):
            request = convert.compare_request(message, _deadline(context), _client(context))
            return convert.compare_response(await compare(self._service, request))

    async def _score_stream(
        self, messages: AsyncIterator[Any], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[scoring_pb2.ScoreResponse]:
        self._num_read += 1
        stream = _Stream(self, context, self._options.max_stream_requests)
        async for reply in stream.replies(messages, self._closing):
            yield reply
        if stream.cut_short:
            await context.abort(
                grpc.StatusCode.UNAVAILABLE, "the server is shutting down; send what is unanswered again"
            )

    async def score_in_stream(
        self, message: Any, seen: set[str], context: grpc.aio.ServicerContext, client: str
    ) -> scoring_pb2.ScoreResponse:
        """One request of a stream: its failure is its reply."""
        own_id = message.request_id
        try:
            self._checked(message, context)
            with self._counted(message, context):
                if own_id and own_id in seen:
                    raise InvalidRequest("request_id", f"{own_id!r} is under way on this stream already")
                seen.add(own_id)
                try:
                    request = convert.score_request(message, _deadline(context, message.timeout_s), client)
                    return convert.score_response(await self._service.score(request))
                finally:
                    seen.discard(own_id)
        except Exception as error:
            return scoring_pb2.ScoreResponse(request_id=message.request_id, error=status_of(_foreseen(error)))

    def _checked(self, message: Any, context: grpc.aio.ServicerContext) -> Any:
        """Raises InvalidRequest for what is no message; no method will see it, and hence none would count it."""
        if isinstance(message, _Malformed):
            with self._counted(message, context):
                raise InvalidRequest("(message)", message.reason)
        return message

    def _counted(self, message: Any, context: grpc.aio.ServicerContext) -> "_Counted":
        return _Counted(self._registry, message, context, self._options)

    # -- Models ----------------------------------------------------------------------------------------------------

    async def _list(
        self, message: models_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> models_pb2.ListModelsResponse:
        models = [convert.model(live) for live in self._registry.models]
        ensembles = [convert.ensemble(ensemble, self._registry) for ensemble in self._registry.ensembles]
        return models_pb2.ListModelsResponse(models=[*models, *ensembles])

    async def _get(self, message: models_pb2.GetModelRequest, context: grpc.aio.ServicerContext) -> models_pb2.Model:
        ensemble = self._registry.ensemble(message.name)
        if ensemble is not None:
            return convert.ensemble(ensemble, self._registry)
        return convert.model(self._registry.get(message.name))

    async def _load(self, message: models_pb2.LoadModelRequest, context: grpc.aio.ServicerContext) -> models_pb2.Model:
        self._check_control()
        if not message.source:
            raise InvalidRequest("source", "must name a local folder or a hub model")
        dtype = convert.checked_dtype(message.dtype)
        return convert.model(await _to_its_end(self._registry.load(message.name, message.source, dtype)))

    async def _unload(
        self, message: models_pb2.UnloadModelRequest, context: grpc.aio.ServicerContext
    ) -> models_pb2.UnloadModelResponse:
        self._check_control()
        await _to_its_end(self._registry.unload(message.name, self._options.unload_grace_s))
        return models_pb2.UnloadModelResponse()

    async def _swap(
        self, message: models_pb2.SwapModelRequest, context: grpc.aio.ServicerContext
    ) -> models_pb2.SwapModelResponse:
        self._check_control()
        plan = convert.swap_plan(message)
        report = await _to_its_end(swap(self._service, self._registry, plan, self._options.unload_grace_s))
        return convert.swap_response(report, len(plan.canaries))

    async def _rollback(
        self, message: models_pb2.RollbackModelRequest, context: grpc.aio.ServicerContext
    ) -> models_pb2.Model:
        self._check_control()
        return convert.model(await _to_its_end(rollback(self._registry, message.name, self._options.unload_grace_s)))

    async def _update_weights(
        self, message: models_pb2.UpdateWeightsRequest, context: grpc.aio.ServicerContext
    ) -> models_pb2.Model:
        self._check_control()
        if not message.source:
            raise InvalidRequest("source", "must name a local folder or a hub model")
        return convert.model(await _to_its_end(self._registry.update_weights(message.name, message.source)))

    def _check_control(self) -> None:
        if not self._options.allow_model_control:
            raise ControlDisabled("loading, unloading and swapping is off; start the server with --allow-model-control")


class _Stream:
    """One ScoreStream: reads no further than it may have under way, replies in the order of completion."""

    def __init__(self, door: GrpcDoor, context: grpc.aio.ServicerContext, max_requests: int) -> None:
        self._door = door
        self._context = context
        self._room = asyncio.Semaphore(max_requests)
        self._done: asyncio.Queue[scoring_pb2.ScoreResponse | None] = asyncio.Queue()
        self._seen: set[str] = set()
        self.cut_short = False

    async def replies(
        self, messages: AsyncIterator[Any], closing: asyncio.Event
    ) -> AsyncIterator[scoring_pb2.ScoreResponse]:
        reader = asyncio.create_task(self._read_until_closing(messages, closing))
        try:
            while (reply := await self._done.get()) is not None:
                yield reply
                self._room.release()
            await reader
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read_until_closing(self, messages: AsyncIterator[Any], closing: asyncio.Event) -> None:
        tasks: set[asyncio.Task[None]] = set()
        reading = asyncio.create_task(self._read(messages, tasks))
        closed = asyncio.create_task(closing.wait())
        try:
            await asyncio.wait((reading, closed), return_when=asyncio.FIRST_COMPLETED)
            self.cut_short = not reading.done()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await asyncio.gather(*tasks)
            await self._done.put(None)
        finally:
            for task in (reading, closed, *tasks):
                task.cancel()

    async def _read(self, messages: AsyncIterator[Any], tasks: set[asyncio.Task[None]]) -> None:
        client = _client(self._context)
        async for message in messages:
            await self._room.acquire()
            task = asyncio.create_task(self._answer(message, client))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _answer(self, message: Any, client: str) -> None:
        await self._done.put(await self._door.score_in_stream(message, self._seen, self._context, client))


class _Counted:
    """Counts a request by its status, and logs it with its id. A request without an id is given one."""

    def __init__(
        self, registry: Registry, message: Any, context: grpc.aio.ServicerContext, options: DoorOptions
    ) -> None:
        self._registry, self._message, self._options = registry, message, options
        self._started = time.monotonic()
        self._remaining_s = context.time_remaining()
        if not message.request_id:
            message.request_id = convert.new_request_id()
        self._name, self._metrics = _counted_as(registry, message)

    def __enter__(self) -> "_Counted":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        status = "OK" if error is None else self._status(error)
        if self._metrics is not None:
            self._metrics.count_request(status)
        else:  # no series for a name nobody serves: callers must not be able to make them up
            self._registry.metrics.count_request_of_no_model(status)
        if self._options.log_requests or status not in ("OK", "CANCELLED"):
            log.info("request", extra={"fields": self._fields(status, error)})

    def _status(self, error: BaseException) -> str:
        if isinstance(error, asyncio.CancelledError):
            return "DEADLINE_EXCEEDED" if self._deadline_passed() else "CANCELLED"
        return getattr(error, "grpc", "INTERNAL")

    def _deadline_passed(self) -> bool:
        """Or is about to: the caller's own passes first, for here it arrives late and rounded up by up to 2 %."""
        if self._remaining_s is None:
            return False
        remaining_s = self._remaining_s - (time.monotonic() - self._started)
        return remaining_s <= 0.02 + 0.02 * self._remaining_s

    def _fields(self, status: str, error: BaseException | None) -> dict[str, Any]:
        fields = {
            "request_id": self._message.request_id,
            "model": self._name,
            "status": status,
            "seconds": round(time.monotonic() - self._started, 6),
        }
        if error is not None:
            left = "the caller gave up" if status == "CANCELLED" else "the caller's deadline passed"
            fields["error"] = str(error) or left
        if self._options.log_text:
            fields["text"] = str(self._message)
        return fields


def _counted_as(registry: Registry, message: Any) -> tuple[str, ModelMetrics | None]:
    """Name and metrics of the model that is asked; no metrics if nobody serves it, or nobody can say which it is."""
    if isinstance(message, _Malformed):
        return message.model, None
    ensemble = registry.ensemble(message.model)
    if ensemble is not None:
        return ensemble.name, ensemble.metrics
    try:
        model = registry.get(message.model)
    except RewardServeError:
        return message.model, None
    return model.name, model.metrics


def _foreseen(error: Exception) -> RewardServeError:
    """A bug of ours is answered too, without its details; the log has them."""
    if isinstance(error, RewardServeError):
        return error
    log.error("a request failed unforeseen", exc_info=error)
    return InternalError("the server failed; its log says how")


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """A caller who leaves does not leave half a model behind; what it then fails in, the log says."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_log_failure)
        raise


def _log_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("what a caller asked for, who has left, failed: %s", error)


def _deadline(context: grpc.aio.ServicerContext, timeout_s: float = 0.0) -> float | None:
    """The call's deadline, or the request's own if that is earlier, on CLOCK_MONOTONIC, in seconds.

    Raises DeadlineExceeded if it has passed, InvalidRequest for a time that is none.
    """
    if not 0 <= timeout_s < math.inf:
        raise InvalidRequest("timeout_s", f"{timeout_s} is no number of seconds; 0 is no limit")
    remaining = context.time_remaining()
    if remaining is not None and remaining <= 0:
        raise DeadlineExceeded("the deadline passed before the request was read")
    limits = [seconds for seconds in (remaining, min(timeout_s, LONGEST_S) or None) if seconds is not None]
    return time.monotonic() + min(limits) if limits else None


def _client(context: grpc.aio.ServicerContext) -> str:
    """Whose fair share a request counts towards: what the caller says of itself, else its connection."""
    for key, value in context.invocation_metadata() or ():
        if key == CLIENT_ID:
            return str(value)
    return str(context.peer())
