"""Several models over one backbone: one engine, loaded when the first of them starts, ended when the last one stops.

Adapters of one base differ in little: its weights are held once, and its prompts computed once for those that differ in
nothing but their heads. Each model keeps a door of its own, so that it may be swapped or unloaded by itself. Where the
backbone cannot be shared each model gets an engine of its own.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rewardserve.engine.base import (
    BatchReport,
    Engine,
    EngineInfo,
    EngineListener,
    EngineRequest,
    EngineResult,
    SeveralModels,
)
from rewardserve.errors import LoadFailed, Unavailable
from rewardserve.models.adapter_config import CONFIG, base_of, read_adapter_config

log = logging.getLogger(__name__)


def sharing(models: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Names of those whose sources (by name) are adapters of one base, as far as local folders say it: two at least."""
    of_base: dict[str, list[str]] = {}
    for name, source in models.items():
        folder = Path(source)
        if (folder / CONFIG).is_file():
            try:
                base = base_of(folder, read_adapter_config(folder))
            except LoadFailed:  # it will be said when it is loaded
                continue
            of_base.setdefault(base, []).append(name)
    return [tuple(names) for names in of_base.values() if len(names) > 1]


class SharedEngine:
    """What the members have in common."""

    def __init__(
        self, sources: Mapping[str, str], make: Callable[[Sequence[str]], SeveralModels], alone: Callable[[str], Engine]
    ) -> None:
        """`sources` by name; `make` one engine of all of them, `alone` one of a single name."""
        self._sources = list(sources.values())
        self._make, self.alone = make, alone
        self._lock = asyncio.Lock()
        self._engine: SeveralModels | None = None
        self._info: EngineInfo | None = None
        self._refusal = ""  # why the backbone cannot be shared
        self._listeners: dict[int, EngineListener] = {}  # of the members that run
        self._left: set[int] = set()  # members that have stopped: in their places others may be loaded
        self._has_failed = False  # for good
        self.members = {name: Member(self, name, variant) for variant, name in enumerate(sources)}

    async def join(self, variant: int, listener: EngineListener) -> EngineInfo:
        """Raises LoadFailed if the backbone cannot be shared.

        Nor can it by one that has left, for whom it was loaded may be another or older than what lies in its folder.
        """
        async with self._lock:
            if self._refusal or variant in self._left or self._has_failed:
                raise LoadFailed(self._refusal or "the shared engine is not what it was")
            if self._engine is None:
                await self._start()
            self._listeners[variant] = listener
            assert self._info is not None
            return self._info.of(variant)

    async def _start(self) -> None:
        engine = self._make(self._sources_to_load())
        try:
            self._info = await engine.start(
                EngineListener(
                    on_batch=self._on_batch,
                    on_down=lambda reason: self._tell(lambda listener: listener.on_down(reason)),
                    on_part_down=lambda reason: self._tell(lambda listener: listener.on_part_down(reason)),
                    on_failed=self._on_failed,
                    on_up=self._on_up,
                )
            )
        except BaseException as error:
            await engine.stop()
            if isinstance(error, LoadFailed):
                self._refusal = str(error)
                log.warning("models are loaded each by itself, for they cannot share a backbone: %s", error)
            raise
        self._engine = engine

    async def score(self, request: EngineRequest) -> EngineResult:
        if self._engine is None:
            raise Unavailable("the engine was stopped")
        return await self._engine.score(request)

    async def leave(self, variant: int) -> None:
        async with self._lock:
            self._listeners.pop(variant, None)
            self._left.add(variant)
            if self._listeners and self._engine is not None:
                self._engine.restart_with(self._sources_to_load())
            elif self._engine is not None:
                engine, self._engine = self._engine, None
                await engine.stop()

    @property
    def is_refused(self) -> bool:
        """Each of the members is loaded by itself."""
        return bool(self._refusal)

    def _sources_to_load(self) -> list[str]:
        """Of a member that has left, the folder may be gone: another takes its place, for nobody."""
        other = next((s for variant, s in enumerate(self._sources) if variant not in self._left), self._sources[0])
        return [other if variant in self._left else source for variant, source in enumerate(self._sources)]

    def _on_batch(self, report: BatchReport) -> None:
        if report.variant in self._listeners:
            self._listeners[report.variant].on_batch(report)

    def _on_up(self, info: EngineInfo) -> None:
        self._info = info
        for variant, listener in list(self._listeners.items()):
            listener.on_up(info.of(variant))

    def _on_failed(self, reason: str) -> None:
        self._has_failed = True
        self._tell(lambda listener: listener.on_failed(reason))

    def _tell(self, tell: Callable[[EngineListener], None]) -> None:
        for listener in list(self._listeners.values()):
            tell(listener)


class Member:
    """The Engine protocol for one of the models."""

    def __init__(self, shared: SharedEngine, name: str, variant: int) -> None:
        self._shared, self._name, self._variant = shared, name, variant
        self._own: Engine | None = None  # where the backbone cannot be shared
        self._calls: set[asyncio.Future[EngineResult]] = set()
        self.is_running = False

    async def start(self, listener: EngineListener) -> EngineInfo:
        self.is_running = True
        try:
            return await self._shared.join(self._variant, listener)
        except LoadFailed:
            self._own = self._shared.alone(self._name)
            return await self._own.start(listener)

    async def score(self, request: EngineRequest) -> EngineResult:
        if self._own is not None:
            return await self._own.score(request)
        if not self.is_running:
            raise Unavailable(f"model '{self._name}' was unloaded")
        # Ids are told apart by models that know nothing of each other.
        request = replace(request, variant=self._variant, request_id=f"{self._variant}/{request.request_id}")
        call = asyncio.ensure_future(self._shared.score(request))
        self._calls.add(call)
        try:
            return await call
        except asyncio.CancelledError:
            if self.is_running:
                raise
            raise Unavailable(f"model '{self._name}' was unloaded") from None
        finally:
            self._calls.discard(call)

    async def update_weights(self, source: str) -> EngineInfo:
        if self._own is not None:
            return await self._own.update_weights(source)
        raise LoadFailed(f"{source}: model '{self._name}' shares its backbone with others; use Swap")

    async def stop(self) -> None:
        self.is_running = False
        own, self._own = self._own, None
        if own is not None:
            await own.stop()
            return
        for call in list(self._calls):
            call.cancel()
        await self._shared.leave(self._variant)
