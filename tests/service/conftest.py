"""The service over fake engines: no model, no text unless asked for, and metrics in a registry of their own."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from rewardserve.engine.base import EngineGroup, EngineInfo, EngineItem, EngineListener, EngineRequest, EngineResult
from rewardserve.engine.fake import FakeEngine, fake_info
from rewardserve.errors import Unavailable
from rewardserve.metrics import Metrics
from rewardserve.service.admission import Limits
from rewardserve.service.live_model import LiveModel, ModelState
from rewardserve.service.registry import Registry
from rewardserve.service.score import ScoringService
from rewardserve.types import ItemCode, ItemFailure, Overflow, PromptGroup, ScoreRequest, TokenIds

VOCAB_SIZE = 1000
INFO = fake_info(architecture="Toy", vocab_size=VOCAB_SIZE)


class Engine(FakeEngine):
    """A fake whose listener, stops and delays a test can reach. Scores are the responses' first ids, unless told."""

    def __init__(self, info: EngineInfo = INFO) -> None:
        super().__init__(info)
        self.fails_to_start: BaseException | None = None
        self.fails_to_score: BaseException | None = None
        self.may_start = asyncio.Event()
        self.may_score = asyncio.Event()
        self.may_start.set()
        self.may_score.set()
        self.num_stops = 0
        self.seen: list[EngineRequest] = []
        self.scores: list[float | ItemFailure] | None = None
        self.warm_up_failure: ItemFailure | None = None
        self.weights: dict[str, str] = {}  # version by source

    @property
    def listener(self) -> EngineListener:
        return self._listener

    async def start(self, listener: EngineListener) -> EngineInfo:
        await self.may_start.wait()
        if self.fails_to_start is not None:
            raise self.fails_to_start
        if self.num_stops:
            raise Unavailable("stopped while loading")
        return await super().start(listener)

    async def score(self, request: EngineRequest) -> EngineResult:
        if not self._running:
            raise Unavailable("the engine is not running")
        if request.request_id == "warm-up":
            if self.warm_up_failure is not None:
                return EngineResult((EngineGroup((EngineItem(None, self.warm_up_failure),), 0),), 0.0, 0.0)
            return await super().score(request)
        self.seen.append(request)
        await self.may_score.wait()
        if self.fails_to_score is not None:
            raise self.fails_to_score
        given = iter(self.scores or [])
        groups = []
        for group in request.groups:
            values = [next(given) if self.scores else float(np.frombuffer(r, "<i4")[0]) for r in group.responses]
            items = [EngineItem(None, v) if isinstance(v, ItemFailure) else EngineItem(v) for v in values]
            groups.append(EngineGroup(tuple(items), num_cached_tokens=0))
        return EngineResult(tuple(groups), queue_s=0.25, compute_s=0.5)

    async def update_weights(self, source: str) -> EngineInfo:
        self._info = replace(self._info, version=self.weights[source])
        return self._info

    async def stop(self) -> None:
        self.num_stops += 1
        await super().stop()


@dataclass
class House:
    """Everything between the door and the engines."""

    metrics: Metrics
    executor: Executor
    limits: Limits = field(default_factory=Limits)
    engines: dict[str, Engine] = field(default_factory=dict)
    states: list[tuple[str, ModelState]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.registry = Registry(self._make, self.metrics, self.limits, self.executor, self._note)
        self.service = ScoringService(self.registry, self.executor)

    def _make(self, name: str, source: str, dtype: str) -> Engine:
        return self.engines.setdefault(name, Engine())

    def _note(self, model: LiveModel) -> None:
        self.states.append((model.name, model.state))

    async def serve(self, name: str = "m") -> LiveModel:
        return await self.registry.load(name, f"/models/{name}")

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"rewardserve_{name}", {"model": "m", **labels})


def pack(*ids: int) -> TokenIds:
    return TokenIds(np.array(ids, dtype="<i4").tobytes())


def request(*responses: TokenIds | str, prompt: TokenIds | None = None, **options) -> ScoreRequest:
    """One group after a prompt of three ids."""
    group = PromptGroup("g", prompt or pack(1, 2, 3), responses or (pack(4, 5),))
    return ScoreRequest("r", options.pop("model", ""), (group,), **options)


def failure(message: str = "too long") -> ItemFailure:
    return ItemFailure(ItemCode.OUT_OF_RANGE, message)


class Tools:
    """What tests need by name; this folder is no package."""

    INFO, Engine, House, Overflow = INFO, Engine, House, Overflow
    pack, request, failure = staticmethod(pack), staticmethod(request), staticmethod(failure)


@pytest.fixture(scope="session")
def tools() -> type[Tools]:
    return Tools


@pytest.fixture(scope="session")
def executor() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


MakeHouse = Callable[..., House]


@pytest.fixture(scope="session")
def make_house(executor: Executor) -> MakeHouse:
    return lambda **limits: House(Metrics(CollectorRegistry()), executor, Limits(**limits))


@pytest.fixture
def house(make_house: MakeHouse) -> House:
    return make_house()
