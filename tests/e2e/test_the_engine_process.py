"""The supervisor alone, with deaths at the worst moments: between two lines of it."""

import asyncio
import dataclasses
import os
import signal
import time

import pytest
from rewardserve.engine.base import EngineListener, EngineRequest
from rewardserve.engine.native.options import NativeOptions
from rewardserve.engine.nursery_process import Nursery
from rewardserve.engine.process import EngineProcess
from rewardserve.errors import LoadFailed, OptionsDoNotFit, Unavailable
from rewardserve.types import EncodedGroup


@pytest.fixture
async def nursery():
    nursery = Nursery({})
    yield nursery
    await nursery.stop()


@pytest.fixture
def options(bf16_checkpoint):
    return NativeOptions(str(bf16_checkpoint), prefix_cache_bytes=16 << 20, num_threads=2)


@pytest.fixture
def engine(options, nursery):
    return EngineProcess(options, "tiny", nursery)


def request(name: str) -> EngineRequest:
    return EngineRequest(name, (EncodedGroup(bytes(40), (bytes(8),)),))


async def ends(work, within_s: float = 120):
    async with asyncio.timeout(within_s):
        return await asyncio.gather(*work, return_exceptions=True)


async def test_what_comes_between_a_death_and_its_discovery_is_scored_or_unavailable(engine):
    """The event loop is held for a moment, so that the sockets know of the death before the supervisor does."""
    await engine.start(EngineListener())
    try:
        wanted = await engine.score(request("before"))
        os.kill(engine.pid, signal.SIGKILL)
        time.sleep(0.3)
        for end in await ends([asyncio.ensure_future(engine.score(request(f"r{i}"))) for i in range(3)]):
            assert isinstance(end, Unavailable) or end.groups[0].items == wanted.groups[0].items
    finally:
        async with asyncio.timeout(60):
            await engine.stop()


async def test_an_engine_that_dies_as_it_comes_up_is_restarted_again(engine):
    """Its second death falls between its Ready and the moment it is handed what was in flight."""
    times_up = 0

    def on_up(info):
        nonlocal times_up
        times_up += 1
        if times_up == 1:
            os.kill(engine.pid, signal.SIGKILL)
            time.sleep(0.5)

    await engine.start(EngineListener(on_up=on_up))
    try:
        os.kill(engine.pid, signal.SIGSTOP)
        work = asyncio.ensure_future(engine.score(request("r")))
        await asyncio.sleep(0.1)
        os.kill(engine.pid, signal.SIGKILL)
        (end,) = await ends([work])
        assert isinstance(end, Unavailable) or end.groups
        async with asyncio.timeout(100):
            while times_up < 2:
                await asyncio.sleep(0.05)
        assert (await engine.score(request("after"))).groups
    finally:
        async with asyncio.timeout(60):
            await engine.stop()


async def test_whether_the_checkpoint_is_refused_or_the_options_is_told_apart(options, nursery):
    """Another engine is given the one (engine/choice.py), and not the other."""
    refused = {"prefix_cache_bytes": 1, "source": options.source + "-that-is-not-there"}
    ends = []
    for name, value in refused.items():
        engine = EngineProcess(dataclasses.replace(options, **{name: value}), "tiny", nursery)
        with pytest.raises(LoadFailed) as caught:
            await engine.start(EngineListener())
        await engine.stop()
        ends.append(caught.type)
    assert ends == [OptionsDoNotFit, LoadFailed]
