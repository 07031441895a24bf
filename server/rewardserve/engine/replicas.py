"""Several engines of one model, a device each, behind the door of one.

A group goes where it is expected to be done first: to the engine with the least work under way, where one that has seen
the prompt before is spared computing it again. So groups stay with the device that holds their prompt until it has more
to do than that is worth.

What an engine had in flight when it died goes to those that are up, for scoring is a pure function; but once only: what
was in flight at two deaths may be what kills.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from rewardserve.engine.base import (
    BatchReport,
    Engine,
    EngineInfo,
    EngineListener,
    EngineRequest,
    EngineResult,
    SeveralModels,
)
from rewardserve.errors import BACK_SOON_S, EngineDied, LoadFailed, Unavailable
from rewardserve.types import EncodedGroup

log = logging.getLogger(__name__)

MAX_PROMPTS = 100_000  # remembered, of all engines together


@dataclass(slots=True, eq=False)
class _Replica:
    engine: Engine
    number: int
    info: EngineInfo | None = None
    up: bool = False
    failed: bool = False  # for good
    num_tokens: int = 0  # sent to it and not answered
    queued: tuple[int, int] = (0, 0)  # requests and tokens, by its last report


@dataclass(slots=True, eq=False)
class _Part:
    """What one engine gets of a request."""

    replica: _Replica
    request: EngineRequest
    num_tokens: int  # that are counted as sent

    def end(self) -> None:
        """May be called again."""
        self.replica.num_tokens -= self.num_tokens
        self.num_tokens = 0


async def _updated(replicas: Sequence[_Replica], source: str) -> list[EngineInfo | BaseException]:
    """What became of each of them."""
    return await asyncio.gather(*(r.engine.update_weights(source) for r in replicas), return_exceptions=True)


def _versions_in(outcomes: Sequence[EngineInfo | BaseException]) -> list[str]:
    return sorted({outcome.version for outcome in outcomes if isinstance(outcome, EngineInfo)})


class Replicas:
    """The Engine protocol over several engines. It is up while one of them is."""

    def __init__(self, engines: Sequence[Engine], source: str = "") -> None:
        """`source` is what they load."""
        self._source = source
        self._updating = False
        self._came_back: list[tuple[_Replica, EngineInfo]] = []  # while the others were taking weights over
        self._catching_up: set[asyncio.Task[None]] = set()
        self._wanted: EngineInfo | None = None  # whose versions all of them are to have
        self._replicas = [_Replica(engine, number) for number, engine in enumerate(engines)]
        self._seen: OrderedDict[int, int] = OrderedDict()  # hash of a prompt -> number of the engine it went to last
        self._listener = EngineListener()
        self._sources: Sequence[str] = ()  # where they are of several models: what was loaded at first
        self._replaced: set[int] = set()  # models in whose places others are loaded now, for nobody
        self._stopped = False
        self._news = asyncio.Event()  # for those who wait for an engine to come up

    async def start(self, listener: EngineListener) -> EngineInfo:
        """Loads all at a time. Raises what the first failure raises; nothing is running then."""
        starts = [asyncio.ensure_future(self._start(replica)) for replica in self._replicas]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self.stop()
            raise
        self._listener = listener  # what became of those that were up before the others is nobody's business
        return self._info()

    async def _start(self, replica: _Replica) -> None:
        info = await replica.engine.start(self._listener_of(replica))
        self._wanted = self._wanted or info
        if not self._is_wanted(info):
            versions = f"{self._wanted.version} and {info.version}"
            raise LoadFailed(f"{self._source}: its engines loaded {versions}; was it changed meanwhile? load it again")
        replica.info, replica.up = info, True

    async def score(self, request: EngineRequest) -> EngineResult:
        return await self._share_out(request, has_moved=False)

    async def update_weights(self, source: str) -> EngineInfo:
        """All of them, or none: where one cannot, the others take back what they had."""
        taking = [replica for replica in self._replicas if not replica.failed]
        if not all(replica.up for replica in taking):
            raise Unavailable("an engine of the model is restarting; try again in a few seconds", BACK_SOON_S)
        self._updating = True
        try:
            await self._update_all(taking, source)
        finally:
            self._updating = False
            came_back, self._came_back = self._came_back, []
            for replica, info in came_back:
                self._on_up(replica, info)
        return self._info()

    async def _update_all(self, taking: Sequence[_Replica], source: str) -> None:
        """Once more where a trainer wrote another checkpoint there before all had read the one before."""
        outcomes = await _updated(taking, source)
        changed = [r for r, o in zip(taking, outcomes, strict=True) if isinstance(o, EngineInfo)]
        if len(changed) == len(taking) and len(_versions_in(outcomes)) > 1:
            outcomes = await _updated(taking, source)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if not errors and len(versions := _versions_in(outcomes)) > 1:
            told = " and ".join(versions)
            errors = [LoadFailed(f"{source}: its engines took over {told}; it is being written, try again")]
        if errors:
            await self._take_back(changed)
            raise errors[0]
        for replica, info in zip(taking, outcomes, strict=True):
            assert isinstance(info, EngineInfo)
            replica.info = self._wanted = info
        self._source = source
        self._seen.clear()

    async def _take_back(self, replicas: Sequence[_Replica]) -> None:
        before = self._source
        outcomes = await _updated(replicas, before)
        for replica, outcome in zip(replicas, outcomes, strict=True):
            assert replica.info is not None
            if isinstance(outcome, EngineInfo) and outcome.version == replica.info.version:
                continue
            if isinstance(outcome, EngineInfo | LoadFailed):  # it lives, with weights that the others do not have
                why = "it is not what it was" if isinstance(outcome, EngineInfo) else outcome
                self._leave_out(replica, f"it cannot go back to {before}: {why}")
            else:
                log.error("engine %d died on its way back to %s: %s", replica.number, before, outcome)

    def restart_with(self, sources: Sequence[str]) -> None:
        """Its engines must be of several models each."""
        self._sources = self._sources or sources
        self._replaced = {variant for variant, source in enumerate(sources) if source != self._sources[variant]}
        for replica in self._replicas:
            cast(SeveralModels, replica.engine).restart_with(sources)

    async def stop(self) -> None:
        self._stopped = True
        self._news.set()
        for task in self._catching_up:
            task.cancel()
        await asyncio.gather(*(replica.engine.stop() for replica in self._replicas))

    # -- where the work goes -----------------------------------------------------------------------------------------

    async def _share_out(self, request: EngineRequest, has_moved: bool) -> EngineResult:
        placed = [self._place(group) for group in request.groups]
        parts: dict[int, list[EncodedGroup]] = {}
        for number, group in zip(placed, request.groups, strict=True):
            parts.setdefault(number, []).append(group)
        calls = [
            self._call(self._replicas[number], replace(request, groups=tuple(groups)), has_moved)
            for number, groups in parts.items()
        ]
        try:
            results = await asyncio.gather(*calls)
        except BaseException:  # cancelled, or one of them failed: the others are for nobody
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            raise
        groups_of = {number: iter(result.groups) for number, result in zip(parts, results, strict=True)}
        return EngineResult(
            tuple(next(groups_of[number]) for number in placed),
            queue_s=max((result.queue_s for result in results), default=0.0),
            compute_s=max((result.compute_s for result in results), default=0.0),
        )

    def _call(self, replica: _Replica, request: EngineRequest, has_moved: bool) -> asyncio.Task[EngineResult]:
        part = _Part(replica, request, request.num_tokens)
        call = asyncio.create_task(self._score(part, has_moved))
        call.add_done_callback(lambda _: part.end())  # one that is cancelled right away never begins
        return call

    async def _score(self, part: _Part, has_moved: bool) -> EngineResult:
        try:
            return await part.replica.engine.score(part.request)
        except Unavailable as death:
            if not isinstance(death, EngineDied) and (part.replica.up or self._stopped):
                raise  # else it has died since it was chosen
            part.end()
            if has_moved:
                raise EngineDied(f"{death}: the second one with this request in flight") from death
            return await self._move(part, death)

    async def _move(self, part: _Part, death: Unavailable) -> EngineResult:
        """Where no engine is up, to the first that comes back."""
        request, wanted = part.request, self._wanted
        assert wanted is not None
        while not any(replica.up for replica in self._replicas):
            if self._stopped or all(replica.failed for replica in self._replicas):
                raise death
            self._news.clear()
            await self._news.wait()
        if self._wanted.of(request.variant).version != wanted.of(request.variant).version:
            raise EngineDied(f"{death}, and its checkpoint has changed since the request came")
        # Another engine may have another part of the request already, and ids are of one in flight each.
        request_id = f"{request.request_id} of {part.replica.number}"
        return await self._share_out(replace(request, request_id=request_id), has_moved=True)

    def _place(self, group: EncodedGroup) -> int:
        """The number of the engine that will have computed the group first; it counts as sent. Raises Unavailable."""
        up = [replica for replica in self._replicas if replica.up]
        if not up:
            raise Unavailable("the model's engines are restarting; try again in a few seconds", BACK_SOON_S)
        prompt = hash(group.prompt)
        holder = self._seen.get(prompt)
        prompt_tokens, own_tokens = len(group.prompt) // 4, sum(map(len, group.responses)) // 4

        def work(replica: _Replica) -> int:
            return replica.num_tokens + (0 if replica.number == holder else prompt_tokens)

        best = min(up, key=work)
        best.num_tokens += prompt_tokens + own_tokens
        self._seen[prompt] = best.number
        self._seen.move_to_end(prompt)
        if len(self._seen) > MAX_PROMPTS:
            self._seen.popitem(last=False)
        return best.number

    # -- what the engines tell ---------------------------------------------------------------------------------------

    def _listener_of(self, replica: _Replica) -> EngineListener:
        return EngineListener(
            on_batch=lambda report: self._on_batch(replica, report),
            on_down=lambda reason: self._on_down(replica, reason),
            on_up=lambda info: self._on_up(replica, info),
            on_failed=lambda reason: self._on_failed(replica, reason),
        )

    def _on_batch(self, replica: _Replica, report: BatchReport) -> None:
        """As of one engine: with n of them at work a forward takes an nth of the model's time."""
        replica.queued = (report.queued_requests, report.queued_tokens)
        num_up = max(1, sum(r.up for r in self._replicas))
        requests, tokens = (sum(r.queued[i] for r in self._replicas) for i in range(2))
        compute_s = report.compute_s / num_up
        self._listener.on_batch(replace(report, compute_s=compute_s, queued_requests=requests, queued_tokens=tokens))

    def _on_down(self, replica: _Replica, reason: str) -> None:
        replica.up, replica.queued = False, (0, 0)
        num_up = sum(r.up for r in self._replicas)
        if num_up:
            going_on = f"{num_up} of {len(self._replicas)} go on"
            log.warning("engine %d: %s; %s, also with what it had in flight", replica.number, reason, going_on)
            self._listener.on_part_down(f"engine {replica.number}: {reason}")
        else:
            self._listener.on_down(reason)

    def _on_up(self, replica: _Replica, info: EngineInfo) -> None:
        if self._updating:
            self._came_back.append((replica, info))
            return
        if self._is_wanted(info):
            self._take_part(replica, info)
        else:
            task = asyncio.create_task(self._catch_up(replica, info))
            self._catching_up.add(task)
            task.add_done_callback(self._catching_up.discard)

    def _is_wanted(self, info: EngineInfo) -> bool:
        assert self._wanted is not None
        return self._versions(info) == self._versions(self._wanted)

    def _take_part(self, replica: _Replica, info: EngineInfo) -> None:
        replica.info, replica.up, replica.failed = info, True, False
        self._news.set()
        self._listener.on_up(self._info())

    async def _catch_up(self, replica: _Replica, info: EngineInfo) -> None:
        """For one that died on its way back to older weights, and so came back with newer ones.

        Where nobody else is up, what it comes to is what the others are to have: the checkpoint has changed.
        """
        log.warning("engine %d came back with another version; it is to take over %s", replica.number, self._source)
        reason = "its weights are not those that the others have"
        try:
            info = await replica.engine.update_weights(self._source)
        except Unavailable as error:  # it died over it: it comes back once more
            log.error("engine %d cannot take over %s: %s", replica.number, self._source, error)
            return
        except LoadFailed as error:
            reason = str(error)
        if not self._is_wanted(info) and any(r.up for r in self._replicas):
            self._leave_out(replica, reason)
            return
        self._wanted = info
        self._take_part(replica, info)

    def _leave_out(self, replica: _Replica, reason: str) -> None:
        log.error("engine %d is left out until the model is reloaded: %s", replica.number, reason)
        replica.up, replica.failed = False, True
        if all(r.failed for r in self._replicas):
            self._news.set()
            self._listener.on_failed(reason)

    def _versions(self, info: EngineInfo) -> list[str]:
        """Of the models that somebody may ask for."""
        return [info.of(i).version for i in range(1 + len(info.beside)) if i not in self._replaced]

    def _on_failed(self, replica: _Replica, reason: str) -> None:
        replica.up, replica.failed = False, True
        self._news.set()
        if all(r.failed for r in self._replicas):
            self._listener.on_failed(reason)
        else:
            log.critical("engine %d is given up: %s", replica.number, reason)

    def _info(self) -> EngineInfo:
        """Of those that are up: what one of them says, with what all of them have.

        Where all died just now, of those that come back.
        """
        infos = [r.info for r in self._replicas if r.up and r.info is not None]
        infos = infos or [r.info for r in self._replicas if not r.failed and r.info is not None]
        together = {
            "device": ",".join(info.device for info in infos),
            "max_length": min(info.max_length for info in infos),
            "prefix_cache_tokens": sum(info.prefix_cache_tokens for info in infos),
        }
        return infos[0].saying(**together)
