"""The whole server but the model: `App` over a fake engine, real sockets, in the test's own event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace

import grpc
import grpc.aio
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from rewardserve.app import App
from rewardserve.config import ServeConfig
from rewardserve.engine.base import EngineGroup, EngineInfo, EngineItem, EngineRequest, EngineResult
from rewardserve.engine.fake import FakeEngine, fake_info
from rewardserve.errors import RewardServeError
from rewardserve.types import ItemCode, ItemFailure, TextSpec
from rewardserve.v1 import models_pb2_grpc, scoring_pb2, scoring_pb2_grpc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

MAX_LENGTH = 64
SPECIALS = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'nobody' %}{{ raise_exception('unknown role') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token for each byte, so that a test can count them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def text_spec(template: str | None = TEMPLATE) -> TextSpec:
    return TextSpec(byte_tokenizer().to_str(), template, {}, None)


def engine_info(text: TextSpec | None, **changes) -> EngineInfo:
    values = {"max_length": MAX_LENGTH, "vocab_size": 256 + len(SPECIALS), "text": text}
    return fake_info(**(values | {"text_missing_reason": "" if text else "this fake has none"} | changes))


class WatchedEngine(FakeEngine):
    """Says what it has seen; `hold` keeps the work in it, `fail_tokens` fails responses that begin with one of them."""

    def __init__(self, info: EngineInfo) -> None:
        super().__init__(info)
        self.gate = asyncio.Event()
        self.gate.set()
        self.start_gate = asyncio.Event()
        self.start_gate.set()
        self.seen: list[EngineRequest] = []
        self.num_in_flight = self.num_cancelled = self.num_stopped = 0
        self.fail_tokens: set[int] = set()
        self.raises: Exception | None = None
        self.refuses_to_load: RewardServeError | None = None

    def hold(self) -> None:
        self.gate.clear()

    def release(self) -> None:
        self.gate.set()

    async def start(self, listener):
        await self.start_gate.wait()
        if self.refuses_to_load is not None:
            raise self.refuses_to_load
        return await super().start(listener)

    async def score(self, request: EngineRequest) -> EngineResult:
        if request.request_id == "warm-up":
            return await super().score(request)
        self.seen.append(request)
        self.num_in_flight += 1
        try:
            await self.gate.wait()
            if self.raises is not None:
                raise self.raises
            result = await super().score(request)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_in_flight -= 1
        groups = tuple(
            EngineGroup(tuple(map(self._maybe_failed, group.responses, scored.items)), scored.num_cached_tokens)
            for group, scored in zip(request.groups, result.groups, strict=True)
        )
        return EngineResult(groups, result.queue_s, result.compute_s)

    def _maybe_failed(self, response: bytes, item: EngineItem) -> EngineItem:
        if int.from_bytes(response[:4], "little") in self.fail_tokens:
            return EngineItem(None, ItemFailure(ItemCode.INTERNAL, "the model's score is nan, not a number", True))
        return item

    async def stop(self) -> None:
        self.num_stopped += 1
        await super().stop()


class Served:
    """An App that runs, with clients to it."""

    def __init__(self, app: App, engines: dict[str, WatchedEngine]) -> None:
        self.app, self.engines = app, engines
        self.target = f"127.0.0.1:{app.port}"
        self.channel = grpc.aio.insecure_channel(self.target)
        self.scoring = scoring_pb2_grpc.ScoringStub(self.channel)
        self.models = models_pb2_grpc.ModelsStub(self.channel)

    @property
    def engine(self) -> WatchedEngine:
        return next(iter(self.engines.values()))

    async def raw(self, method: str, data: bytes, timeout: float = 30) -> bytes:
        """Calls with bytes as they are: what a broken client may send."""
        return await self.channel.unary_unary(f"/rewardserve.v1.{method}")(data, timeout=timeout)

    async def good(self) -> None:
        """A good request is answered: the server lives."""
        reply = await self.scoring.Score(ids_request([1, 2, 3], [[4], [5, 6]], model="m"), timeout=30)
        assert [len(group.items) for group in reply.groups] == [2]
        assert all(item.HasField("score") and item.status.code == 0 for item in reply.groups[0].items)


def pack(ids) -> bytes:
    return np.array(ids, dtype="<i4").tobytes()


def ids_group(prompt, responses, id="") -> scoring_pb2.Group:
    return scoring_pb2.Group(
        id=id,
        prompt=scoring_pb2.Prompt(token_ids=pack(prompt)),
        responses=[scoring_pb2.Response(token_ids=pack(response)) for response in responses],
    )


def ids_request(prompt, responses, **fields) -> scoring_pb2.ScoreRequest:
    return scoring_pb2.ScoreRequest(groups=[ids_group(prompt, responses)], **fields)


def text_request(prompt: scoring_pb2.Prompt, *responses: str, **fields) -> scoring_pb2.ScoreRequest:
    group = scoring_pb2.Group(prompt=prompt, responses=[scoring_pb2.Response(text=text) for text in responses])
    return scoring_pb2.ScoreRequest(groups=[group], **fields)


@contextlib.asynccontextmanager
async def serving(
    text: TextSpec | None = None, info: dict | None = None, models: tuple[str, ...] = ("m",), **config
) -> AsyncIterator[Served]:
    engines: dict[str, WatchedEngine] = {}

    def make_engine(name: str, source: str, dtype: str) -> WatchedEngine:
        engines[name] = WatchedEngine(engine_info(text, **(info or {})))
        if source.startswith("/broken"):
            engines[name].refuses_to_load = config_errors[source]
        if source.startswith("/slow"):
            engines[name].start_gate.clear()
        return engines[name]

    config_errors: dict[str, RewardServeError] = config.pop("broken", {})
    options = {"port": 0, "metrics_port": -1, "grace_s": 5.0, **config}
    app = App(ServeConfig(model=[f"{name}=/nowhere/{name}" for name in models], **options), make_engine)
    served = None
    try:
        await app.start()
        served = Served(app, engines)
        yield served
    finally:
        for engine in engines.values():
            engine.release()
            engine.start_gate.set()
        if served is not None:
            await served.channel.close()
        await app.stop()


@pytest.fixture(scope="session")
def serve():
    """`async with serve(...) as served`: an App on an unused port."""
    return serving


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """One model "m" with a tokenizer of bytes and a chat template, max_length 64."""
    async with serving(text_spec()) as it:
        yield it


def explain(error: grpc.RpcError) -> SimpleNamespace:
    """code, message, fields (of BadRequest), retry_after_s (of RetryInfo)."""
    status = rpc_status.from_call(error)
    found = SimpleNamespace(code=error.code(), message=error.details(), fields=[], retry_after_s=None)
    for detail in status.details if status is not None else ():
        bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(bad):
            found.fields += [violation.field for violation in bad.field_violations]
        elif detail.Unpack(retry):
            found.retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return found


async def refused_with(call) -> SimpleNamespace:
    """Awaits a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return explain(caught.value)


async def eventually(condition: Callable[[], object], within_s: float = 20) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """What tests build requests from and look at errors with."""
    return SimpleNamespace(
        MAX_LENGTH=MAX_LENGTH,
        text_spec=text_spec,
        pack=pack,
        ids_group=ids_group,
        ids_request=ids_request,
        text_request=text_request,
        refused=refused_with,
        explain=explain,
        eventually=eventually,
    )
