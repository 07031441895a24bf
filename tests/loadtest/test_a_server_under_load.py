"""The generator's own sender against a real server with a fake engine."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator

import pytest
from rewardserve.app import App
from rewardserve.client import Group, TokenIds
from rewardserve.config import ServeConfig
from rewardserve.engine.base import EngineRequest, EngineResult
from rewardserve.engine.fake import FakeEngine, fake_info
from rewardserve.loadtest.loadgen import (
    Bounds,
    ClientSender,
    ClosedLoop,
    OpenLoop,
    Progress,
    Requests,
    arrivals,
    measure,
)
from rewardserve.loadtest.workloads import Workload

INFO = fake_info(max_length=64, vocab_size=400)


class HeldEngine(FakeEngine):
    """Keeps its work until the gate opens; with `hold_s`, that is so long after the first request."""

    def __init__(self) -> None:
        super().__init__(INFO)
        self.gate = asyncio.Event()
        self.gate.set()
        self.hold_s = 0.0

    async def score(self, request: EngineRequest) -> EngineResult:
        if self.hold_s:
            self.gate.clear()
            asyncio.get_running_loop().call_later(self.hold_s, self.gate.set)
            self.hold_s = 0.0
        await self.gate.wait()
        return await super().score(request)


def group(prompt: int, *responses: int) -> Group:
    return Group(TokenIds([5] * prompt), [TokenIds([6] * count) for count in responses])


def requests(*groups: Group) -> Requests:
    return Requests(Workload("made", "made here", groups))


@contextlib.asynccontextmanager
async def serving(**options: object) -> AsyncIterator[tuple[HeldEngine, ClientSender]]:
    engine = HeldEngine()
    app = App(ServeConfig(model=["m=/x"], port=0, metrics_port=-1, **options), lambda *_: engine)
    try:
        await app.start()
        sender = ClientSender(f"127.0.0.1:{app.port}", "m", "error", timeout_s=20.0)
        try:
            yield engine, sender
        finally:
            engine.gate.set()
            await sender.close()
    finally:
        await app.stop()


async def test_pairs_and_tokens_are_counted_prompts_once():
    async with serving() as (_, sender):
        run = await measure(requests(group(10, 3, 4)), sender, ClosedLoop(2), Bounds(20.0, max_requests=20))
    assert run.num_answered == 20 and not run.failures
    assert run.num_pairs == 40 and run.num_prompt_tokens == 200
    assert run.tokens_per_s / run.requests_per_s == pytest.approx(17)


async def test_a_server_that_holds_its_work_shows_in_the_latencies():
    async with serving() as (engine, sender):
        await measure(requests(group(4, 4)), sender, ClosedLoop(1), Bounds(20.0, max_requests=1))  # connects
        engine.hold_s = 0.4
        run = await measure(requests(group(4, 4)), sender, OpenLoop(100.0), Bounds(0.6))
    assert run.num_answered > 30 and not run.failures
    assert run.latencies_s[-1] > 0.3
    assert sum(latency > 0.1 for latency in run.latencies_s) > 15


async def test_a_full_server_refuses_and_each_refusal_is_counted_once():
    load = OpenLoop(100.0, seed=2)
    num_arrivals = sum(1 for _ in itertools.takewhile(lambda due_s: due_s < 0.5, arrivals(load)))
    async with serving(max_queued_requests=2) as (engine, sender):
        engine.gate.clear()

        def open_at_the_end(progress: Progress) -> None:
            if progress.num_failed == num_arrivals - 2:
                engine.gate.set()

        run = await measure(requests(group(4, 4)), sender, load, Bounds(0.5), on_progress=open_at_the_end)
    refused = run.failures["RESOURCE_EXHAUSTED"]
    assert run.num_answered == 2  # nothing was tried again when there was room
    assert refused.count == run.num_failed == num_arrivals - 2
    assert "RESOURCE_EXHAUSTED" in refused.example


async def test_a_request_with_a_failed_item_has_failed():
    async with serving() as (_, sender):
        run = await measure(
            requests(group(4, 4), group(4, 4, 100)), sender, ClosedLoop(1), Bounds(20.0, max_requests=10)
        )
    assert run.num_answered == 5 and run.failures["OUT_OF_RANGE"].count == 5


async def test_a_server_that_is_not_there_is_counted_too():
    sender = ClientSender("127.0.0.1:1", "m", "error", timeout_s=2.0)
    try:
        run = await measure(requests(group(4, 4)), sender, ClosedLoop(1), Bounds(20.0, max_requests=2))
    finally:
        await sender.close()
    assert run.failures["UNAVAILABLE"].count == 2 and not run.latencies_s
