"""Runs a real engine in this process and gives back plain numbers."""

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import torch
from rewardserve.engine.base import EngineInfo, EngineListener, EngineRequest, EngineResult
from rewardserve.engine.native.engine import NativeEngine
from rewardserve.engine.native.options import NativeOptions
from rewardserve.types import EncodedGroup

IdGroup = tuple[Sequence[int], Sequence[Sequence[int]]]  # prompt ids, ids of each response
_numbers = itertools.count()


class Scorer:
    def __init__(self, engine: NativeEngine, info: EngineInfo) -> None:
        self.engine, self.info = engine, info

    async def run(
        self, groups: Sequence[IdGroup], steps: Sequence[Sequence[tuple[int, ...]]] | None = None
    ) -> EngineResult:
        """`steps`: positions to read, of each response of each group."""
        encoded = tuple(
            EncodedGroup(pack(prompt), tuple(map(pack, responses)), () if steps is None else tuple(steps[i]))
            for i, (prompt, responses) in enumerate(groups)
        )
        return await self.engine.score(EngineRequest(f"test-{next(_numbers)}", encoded))

    async def scores(self, groups: Sequence[IdGroup]) -> torch.Tensor:
        """[pairs], in the order of the groups."""
        result = await self.run(groups)
        failures = [item.failure for group in result.groups for item in group.items if item.failure]
        assert not failures, failures
        return torch.tensor([item.score for group in result.groups for item in group.items])


@asynccontextmanager
async def native(folder: object, num_threads: int = 1, **options) -> AsyncIterator[Scorer]:
    engine = NativeEngine(NativeOptions(str(folder), num_threads=num_threads, prefix_cache_bytes=16 << 20, **options))
    try:
        yield Scorer(engine, await engine.start(EngineListener()))
    finally:
        await engine.stop()


def pack(ids: Sequence[int]) -> bytes:
    return np.array(ids, dtype="<i4").tobytes()


def joined(groups: Sequence[IdGroup]) -> list[list[int]]:
    return [[*prompt, *response] for prompt, responses in groups for response in responses]
