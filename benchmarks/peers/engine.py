"""rewardserve without its front: the engine in this process; every group is a request, all in flight at once."""

import asyncio
from array import array
from itertools import count

import rewardserve
import torch
from rewardserve.engine.base import EngineListener, EngineRequest, EngineResult
from rewardserve.engine.native.engine import NativeEngine
from rewardserve.engine.native.options import NativeOptions
from rewardserve.types import EncodedGroup

from peers.protocol import Groups, Job, OneProcess, Scores, serve


class RewardServeEngine(OneProcess):
    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._engine: NativeEngine | None = None
        self._numbers = count()

    def load(self, job: Job) -> dict[str, str]:
        options = NativeOptions(
            job.model,
            dtype=job.dtype,
            device=job.device,
            path="packed",
            num_threads=job.threads,
            prefix_cache_bytes=job.cache_bytes,
        )
        engine = NativeEngine(options)
        self._loop.run_until_complete(engine.start(EngineListener()))
        self._engine = engine
        return {"rewardserve": rewardserve.__version__, "torch": torch.__version__}

    def prepare(self, groups: Groups) -> list[EncodedGroup]:
        return [EncodedGroup(_bytes(prompt), tuple(map(_bytes, responses))) for prompt, responses in groups]

    def score(self, prepared: list[EncodedGroup]) -> Scores:
        results = self._loop.run_until_complete(self._all(prepared))
        return [[item.score for item in group.items] for result in results for group in result.groups]

    async def _all(self, groups: list[EncodedGroup]) -> list[EngineResult]:
        assert self._engine is not None
        requests = [EngineRequest(str(next(self._numbers)), (group,)) for group in groups]
        return await asyncio.gather(*map(self._engine.score, requests))

    def close(self) -> None:
        if self._engine:
            self._loop.run_until_complete(self._engine.stop())


def _bytes(ids: list[int]) -> bytes:
    return array("i", ids).tobytes()


if __name__ == "__main__":
    serve(RewardServeEngine())
