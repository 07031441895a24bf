"""A real grpc.aio server with a hand-written servicer, on a thread of its own and an unused port.

Scores are a function of prompt and response alone (`score_of`), so whichever server answers, the answer is known.
"""

import asyncio
import contextlib
import threading
import zlib
from collections import Counter

import grpc
import grpc.aio
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from rewardserve.client import Group, RetryPolicy
from rewardserve.v1 import models_pb2, models_pb2_grpc, scoring_pb2, scoring_pb2_grpc

Code = grpc.StatusCode
FAST = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.1)


def score_of(prompt: scoring_pb2.Prompt, response: scoring_pb2.Response) -> float:
    return zlib.crc32(prompt.SerializeToString() + b"|" + response.SerializeToString()) % 4096 / 8  # exact in fp32


def scored(prompt, response) -> scoring_pb2.ItemScore:
    if response.text == "too long":
        return scoring_pb2.ItemScore(status=status_pb2.Status(code=Code.OUT_OF_RANGE.value[0], message="too long"))
    ids = len(response.token_ids) // 4
    return scoring_pb2.ItemScore(
        status=status_pb2.Status(),
        score=score_of(prompt, response),
        kind=scoring_pb2.SCORE_KIND_RAW_LOGIT,
        num_response_tokens=ids,
    )


def rich(code: Code, message: str, *details) -> status_pb2.Status:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return status


def retry_info(delay_s: float) -> error_details_pb2.RetryInfo:
    return error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=int(delay_s * 1e9)))


class Servicer(scoring_pb2_grpc.ScoringServicer, models_pb2_grpc.ModelsServicer):
    def __init__(self) -> None:
        self.version = "v1"
        self.failures: list[status_pb2.Status] = []  # the next calls end with these, one each
        self.hang = False  # never answer
        self.delay_s = 0.0
        self.die_after: int | None = None  # close each stream after so many replies
        self.die_of = Code.UNAVAILABLE
        self.health = 1  # SERVING
        self.health_code: Code | None = None  # that Check fails with
        self.health_hangs = False
        self.requests: list = []
        self.prompts: Counter[str] = Counter()  # groups received, by the prompt's text
        self.metadata: list = []
        self.answered: Counter[str] = Counter()  # groups answered on streams
        self.num_in_flight = self.max_in_flight = 0
        self.num_streams = self.num_cancelled = self.num_checks = 0
        self.half_closed = 0
        self.change_reply = lambda reply: None

    async def _begin(self, request, context) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        try:
            await asyncio.sleep(3600 if self.hang else self.delay_s)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.failures:
            status = self.failures.pop(0)
            code = next(code for code in Code if code.value[0] == status.code)
            details = (("grpc-status-details-bin", status.SerializeToString()),)
            await context.abort(code, status.message, trailing_metadata=details)

    def _scored(self, request) -> scoring_pb2.ScoreResponse:
        reply = scoring_pb2.ScoreResponse(request_id=request.request_id, model=self.model(request.model))
        for group in request.groups:
            self.prompts[group.prompt.text] += 1
            reply.groups.add(id=group.id, items=[scored(group.prompt, r) for r in group.responses])
        reply.timings.total_s = 0.5
        self.change_reply(reply)
        return reply

    def model(self, name: str = "") -> scoring_pb2.ModelVersion:
        return scoring_pb2.ModelVersion(name=name or "toy", version=self.version)

    async def Score(self, request, context):
        await self._begin(request, context)
        return self._scored(request)

    async def ScoreStream(self, request_iterator, context):
        self.num_streams += 1
        replies: asyncio.Queue = asyncio.Queue()
        reader = asyncio.create_task(self._read_stream(request_iterator, replies))
        num_sent = 0
        try:
            while (reply := await replies.get()) is not None:
                if self.die_after is not None and num_sent >= self.die_after:
                    await context.abort(self.die_of, "killed")
                num_sent += 1
                self.answered.update(group.id for group in reply.groups)
                yield reply
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read_stream(self, request_iterator, replies) -> None:
        async with asyncio.TaskGroup() as tasks:
            async for request in request_iterator:
                self.requests.append(request)
                tasks.create_task(self._answer(request, replies))
        self.half_closed += 1
        replies.put_nowait(None)

    async def _answer(self, request, replies) -> None:
        self.num_in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.num_in_flight)
        try:
            await asyncio.sleep(3600 if self.hang else self.delay_s * (zlib.crc32(request.request_id.encode()) % 5))
        finally:
            self.num_in_flight -= 1
        if self.failures:
            replies.put_nowait(scoring_pb2.ScoreResponse(request_id=request.request_id, error=self.failures.pop(0)))
        else:
            replies.put_nowait(self._scored(request))

    async def Rank(self, request, context):
        await self._begin(request, context)
        items = [(index, scored(request.prompt, r)) for index, r in enumerate(request.responses)]
        reply = scoring_pb2.RankResponse(request_id=request.request_id, model=self.model(request.model))
        good = sorted((each for each in items if each[1].HasField("score")), key=lambda each: -each[1].score)
        for index, item in good[: request.top_k or None]:
            reply.ranked.add(index=index, item=item)
        for index, item in items:
            if not item.HasField("score"):
                reply.failed.add(index=index, item=item)
        self.change_reply(reply)
        return reply

    async def Compare(self, request, context):
        await self._begin(request, context)
        a, b = scored(request.prompt, request.response_a), scored(request.prompt, request.response_b)
        reply = scoring_pb2.CompareResponse(request_id=request.request_id, model=self.model(request.model), a=a, b=b)
        if a.HasField("score") and b.HasField("score"):
            reply.margin, reply.probability_a = a.score - b.score, 0.75
        return reply

    def _model(self, name: str) -> models_pb2.Model:
        return models_pb2.Model(
            name=name, version=self.version, state=models_pb2.MODEL_STATE_SERVING, max_length=4096, path=1
        )

    async def List(self, request, context):
        await self._begin(request, context)
        return models_pb2.ListModelsResponse(models=[self._model("toy"), self._model("other")])

    async def Get(self, request, context):
        await self._begin(request, context)
        return self._model(request.name)

    async def Load(self, request, context):
        await self._begin(request, context)
        return self._model(request.name)

    async def Unload(self, request, context):
        await self._begin(request, context)
        return models_pb2.UnloadModelResponse()

    async def Check(self, request: bytes, context) -> bytes:
        self.requests.append(request)
        self.num_checks += 1
        if self.health_hangs:
            await asyncio.sleep(3600)
        if self.health_code is not None:
            await context.abort(self.health_code, "no health here")
        return b"\x08" + bytes([self.health])  # HealthCheckResponse{status=1}, by hand: the client's own is under test


class FakeServer:
    """`servicer` is what it does; `stop` and `start` again take the same port."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.servicer = Servicer()
        self._credentials = credentials
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: grpc.aio.Server | None = None
        self.start()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self._run(self._start())

    def stop(self, grace_s: float | None = None) -> None:
        server, self._server = self._server, None
        if server is not None:
            self._run(server.stop(grace_s))

    def end(self) -> None:
        self.stop()
        self._run(self._cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _start(self) -> None:
        self._server = grpc.aio.server()
        scoring_pb2_grpc.add_ScoringServicer_to_server(self.servicer, self._server)
        models_pb2_grpc.add_ModelsServicer_to_server(self.servicer, self._server)
        check = grpc.unary_unary_rpc_method_handler(self.servicer.Check)
        health = grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})
        self._server.add_generic_rpc_handlers((health,))
        if self._credentials is None:
            self.port = self._server.add_insecure_port(self.target)
        else:
            self.port = self._server.add_secure_port(self.target, self._credentials)
        await self._server.start()

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.02)  # for grpc's last events, which a closed loop would log as errors

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)


class Proxy:
    """The way to a server whose host can lose power: connections stay open, and nothing comes through them any more.

    New ones are taken as well, and led nowhere. When it is back, it knows none of the old ones and resets them.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._has_power = True
        self._writers: list[asyncio.StreamWriter] = []
        self.num_connections = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def lose_power(self) -> None:
        self._has_power = False

    def come_back(self) -> None:
        self._run(self._hang_up())
        self._has_power = True

    def end(self) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._writers.append(writer)
        if self._has_power:
            there, onward = await asyncio.open_connection("127.0.0.1", self._port)
            self._writers.append(onward)
            await asyncio.gather(self._pipe(reader, onward), self._pipe(there, writer))

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self._has_power:
                    writer.write(data)
                    await writer.drain()
            if self._has_power:
                writer.close()

    async def _hang_up(self) -> None:
        writers, self._writers = self._writers, []
        for writer in writers:
            writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()
        while True:
            await self._hang_up()
            await asyncio.sleep(0.02)  # for what was accepted just now, and for what was aborted to be closed
            if asyncio.all_tasks() == {asyncio.current_task()} and not self._writers:
                return

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)


@pytest.fixture
def proxy():
    """A function that puts one more Proxy before a FakeServer; all are ended with the test."""
    with contextlib.ExitStack() as stack:

        def start(server: FakeServer) -> Proxy:
            made = Proxy(server.port)
            stack.callback(made.end)
            return made

        yield start


@pytest.fixture
def serve():
    """A function that starts one more FakeServer; all are ended with the test."""
    with contextlib.ExitStack() as stack:

        def start(credentials: grpc.ServerCredentials | None = None) -> FakeServer:
            server = FakeServer(credentials)
            stack.callback(server.end)
            return server

        yield start


@pytest.fixture
def server(serve) -> FakeServer:
    return serve()


@pytest.fixture
def expected():
    """The scores a group must get."""

    def scores(group: Group) -> tuple[float, ...]:
        prompt = scoring_pb2.Prompt(text=group.prompt)
        return tuple(score_of(prompt, scoring_pb2.Response(text=text)) for text in group.responses)

    return scores


@pytest.fixture
def fast() -> RetryPolicy:
    return FAST


@pytest.fixture
def failure():
    """rich(code, message, *details): what a Servicer's `failures` are made of."""
    return rich


@pytest.fixture
def come_back_in():
    return retry_info
