"""An engine without a model: deterministic scores from the token ids, for tests and load tests of what is above."""

import asyncio
import time
import zlib
from typing import Any

from rewardserve.engine.base import (
    BatchReport,
    EngineGroup,
    EngineInfo,
    EngineItem,
    EngineListener,
    EngineRequest,
    EngineResult,
)
from rewardserve.errors import LoadFailed, Unavailable


def fake_score(prompt: bytes, response: bytes) -> float:
    """A number in [-1, 1) that depends on every token."""
    return zlib.crc32(response, zlib.crc32(prompt)) / 2**31 - 1


def fake_info(**changes: Any) -> EngineInfo:
    """Of a model that is small and has nothing special, but for `changes`."""
    told: dict[str, Any] = {
        "version": "v1",
        "architecture": "FakeForSequenceClassification",
        "path": "packed",
        "path_reason": "",
        "dtype": "float32",
        "device": "cpu",
        "num_parameters": 7,
        "max_length": 100,
        "vocab_size": 1000,
        "canary_error": 0.0,
        "prefix_cache_tokens": 0,
    }
    return EngineInfo(**told | changes)


class FakeEngine:
    """Scores after `delay_s`; `info` is what it pretends to have loaded."""

    def __init__(self, info: EngineInfo, delay_s: float = 0.0) -> None:
        self._info = info
        self._delay_s = delay_s
        self._listener = EngineListener()
        self._running = False

    async def start(self, listener: EngineListener) -> EngineInfo:
        self._listener, self._running = listener, True
        return self._info

    async def score(self, request: EngineRequest) -> EngineResult:
        if not self._running:
            raise Unavailable("the engine is not running")
        started = time.monotonic()
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        groups = tuple(
            EngineGroup(tuple([EngineItem(fake_score(group.prompt, r)) for r in group.responses]), num_cached_tokens=0)
            for group in request.groups
        )
        compute_s = time.monotonic() - started
        num_pairs = sum(len(group.items) for group in groups)
        self._listener.on_batch(BatchReport(request.num_tokens, num_pairs, 0, 0, compute_s, 0, 0))
        return EngineResult(groups, queue_s=0.0, compute_s=compute_s)

    async def update_weights(self, source: str) -> EngineInfo:
        raise LoadFailed(f"{source}: an engine without a model has no weights")

    async def stop(self) -> None:
        self._running = False
