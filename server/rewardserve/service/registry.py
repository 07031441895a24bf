"""Names -> live models: loading, swapping, unloading, ensembles of them. Knows engines only by their protocol."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor

from prometheus_client import CollectorRegistry

from rewardserve.engine.base import Engine
from rewardserve.errors import (
    BACK_SOON_S,
    Draining,
    InvalidRequest,
    LoadFailed,
    ModelExists,
    ModelNotFound,
    RewardServeError,
    SwapRefused,
    Unavailable,
    Unloaded,
)
from rewardserve.metrics import Metrics, ModelMetrics
from rewardserve.models.source import behind_links
from rewardserve.service.admission import Limits
from rewardserve.service.ensemble import Ensemble
from rewardserve.service.finish import Finishing
from rewardserve.service.live_model import LiveModel, ModelState, Previous
from rewardserve.types import Aggregate, is_model_name

log = logging.getLogger(__name__)


class Registry:
    """All models of this server. Lives on the event loop."""

    def __init__(
        self,
        make_engine: Callable[[str, str, str], Engine],
        metrics: Metrics,
        limits: Limits,
        executor: Executor,
        on_change: Callable[[LiveModel], None] = lambda model: None,
        finishings: Mapping[str, Finishing] | None = None,
        finishing: Finishing = Finishing(),  # noqa: B008, it is frozen
    ) -> None:
        """`make_engine(name, source, dtype)`; `on_change` hears of every change of a model's state.

        `finishings`: how the scores of the models, and ensembles, of these names are finished; `finishing`: of others.
        """
        self._finishings, self._finishing = finishings or {}, finishing
        self._make_engine = make_engine
        self.metrics = metrics
        self._limits = limits
        self._executor = executor
        self._on_change = on_change
        self._models: dict[str, LiveModel] = {}
        self._ensembles: dict[str, Ensemble] = {}
        self._swapping: set[str] = set()
        self._retiring: set[LiveModel] = set()  # swapped out, with something left to finish
        self._draining = False

    @property
    def models(self) -> list[LiveModel]:
        return list(self._models.values())

    def get(self, name: str) -> LiveModel:
        """An empty name means the only model. Raises ModelNotFound, or SwapRefused for an ensemble."""
        if not name and len(self._models) == 1 and not self._ensembles:
            return next(iter(self._models.values()))
        if name in self._models:
            return self._models[name]
        if name in self._ensembles:
            members = ", ".join(self._ensembles[name].members)
            raise SwapRefused(f"'{name}' is an ensemble of {members}; change its members")
        served = ", ".join(sorted([*self._models, *self._ensembles])) or "none"
        wanted = f"no model '{name}' here" if name else "name a model: there is not exactly one here"
        raise ModelNotFound(f"{wanted}; served are: {served}")

    def serving(self, name: str) -> LiveModel:
        """The model, if it can score now. Raises Draining, ModelNotFound or Unavailable."""
        if self._draining:
            raise Draining("the server is shutting down", BACK_SOON_S)  # another will be in its place
        model = self.get(name)
        model.check_serving()
        return model

    @property
    def ensembles(self) -> list[Ensemble]:
        return list(self._ensembles.values())

    def ensemble(self, name: str) -> Ensemble | None:
        """An empty name means none: a server with an ensemble has several models."""
        return self._ensembles.get(name)

    def add_ensemble(self, name: str, members: Sequence[str], aggregate: Aggregate) -> None:
        """Raises InvalidRequest or ModelExists. While a member is away the ensemble cannot score."""
        self._check_new(name)
        if len(set(members)) < max(2, len(members)):
            raise InvalidRequest("members", "an ensemble has two members at least")
        metrics, finishing = ModelMetrics(self.metrics, name), self._finishings.get(name, Finishing())
        metrics.up.set_function(lambda: all(map(self._is_serving, members)))  # asked when it is scraped
        self._ensembles[name] = Ensemble(name, tuple(members), aggregate, metrics, finishing)

    def check_members(self, ensemble: Ensemble) -> None:
        """Raises Unavailable if one was unloaded: the ensemble is served, and cannot score until it is back."""
        for name in ensemble.members:
            if name not in self._models:
                raise Unavailable(f"'{ensemble.name}' cannot score without its member '{name}', which is not served")

    def _is_serving(self, name: str) -> bool:
        model = self._models.get(name)
        return model is not None and model.state is ModelState.SERVING

    def _check_new(self, name: str) -> None:
        if not is_model_name(name):
            raise InvalidRequest("name", f"{name!r} must be letters, digits, '-', '_' and '.'")
        if name in self._models or name in self._ensembles:
            raise ModelExists(f"a model '{name}' is served already; unload it first")

    def metrics_of(self, name: str) -> ModelMetrics:
        """Raises ModelNotFound."""
        ensemble = self.ensemble(name)
        return self.get(name).metrics if ensemble is None else ensemble.metrics

    async def load_beside(self, old: LiveModel, source: str, dtype: str) -> LiveModel:
        """A model for the name of `old`, warm, that nobody reaches yet. Raises LoadFailed."""
        source = behind_links(source)
        engine = self._make_engine(old.name, source, dtype)
        unseen = ModelMetrics(Metrics(CollectorRegistry()), old.name)
        new = LiveModel(old.name, source, engine, unseen, self._limits)
        new.dtype, new.configured = dtype, old.configured
        try:
            await new.start(self._executor, self._changed)
        except BaseException as error:
            await engine.stop()
            _raise_if_own(error)
            raise
        return new

    @contextlib.contextmanager
    def swapping(self, name: str) -> Iterator[None]:
        """One at a time. Raises SwapRefused."""
        if name in self._swapping:
            raise SwapRefused(f"model '{name}' is being swapped already")
        self._swapping.add(name)
        try:
            yield
        finally:
            self._swapping.discard(name)

    async def update_weights(self, name: str, source: str) -> LiveModel:
        """The model takes over a checkpoint's weights in place. Requests wait meanwhile.

        Raises LoadFailed, and nothing has changed; Unavailable if the engine died of it, and comes back as it was.
        """
        model, source = self.serving(name), behind_links(source)
        model.configured.beside(source)  # for its error, while nothing has changed
        with model.closed():
            await _idle(model, grace_s=None)
            assert model.info is not None
            before = model.source, model.info.version
            info = await model.engine.update_weights(source)
            try:
                model.use_weights(info, source)
                no_number = await model.warm_up()
                model.check_numbers(no_number)
            except LoadFailed:  # nobody is to be scored by these
                await self._go_back(model, *before)
                raise
            model.no_number = no_number
        log.info("%s has new weights: %s, version %s", name, source, model.version)
        return model

    async def _go_back(self, model: LiveModel, source: str, version: str) -> None:
        """To the weights it had; where these are not there any more it has failed."""
        try:
            info = await model.engine.update_weights(source)
            if info.version != version:
                raise LoadFailed(f"{source} is not what it was: version {info.version}, not {version}")
            model.use_weights(info, source)
        except LoadFailed as error:
            model.fail(f"cannot go back to the weights it had: {error}; unload it, and load it anew")
            self._changed(model)

    async def flip(self, old: LiveModel, new: LiveModel, grace_s: float, keep_previous: bool) -> None:
        """Requests that come from here on go to `new`; `old` finishes what it has, and goes away or is kept.

        Raises SwapRefused if `old` does not serve any more, for it was unloaded or swapped meanwhile, or if `new` does
        not: its engine may have died while it was tried.
        """
        refusal = ""
        if self._models.get(old.name) is not old or old.state is ModelState.DRAINING:
            refusal = f"model '{old.name}' was changed while its new version was loading; try again"
        elif new.state is not ModelState.SERVING:
            refusal = f"the new version is {new.state.value}: {new.message}; the old one goes on serving"
        if refusal:
            await new.engine.stop()
            raise SwapRefused(refusal)
        new.take_over(old)
        self._models[old.name] = new
        assert old.info is not None
        new.previous = Previous(old.source, old.dtype, old.info.version, old if keep_previous else None)
        before, old.previous = old.previous, None
        self._changed(new)
        self._retiring.add(old)
        try:
            await old.opened()
            await _idle(old, grace_s)
            if not keep_previous:
                await old.engine.stop()
            if before is not None and before.kept is not None and before.kept is not new:
                await before.kept.engine.stop()
        finally:
            self._retiring.discard(old)

    def _changed(self, model: LiveModel) -> None:
        """Of a version that is not served, nobody needs to hear."""
        if self._models.get(model.name) is model:
            self._on_change(model)

    async def load(self, name: str, source: str, dtype: str = "auto") -> LiveModel:
        """Loads, checks and warms a model; it is served when this returns. Raises ModelExists or LoadFailed."""
        return await self.start(self.enter(name, source, dtype))

    def enter(self, name: str, source: str, dtype: str = "auto") -> LiveModel:
        """A model that `start` is to load: away until then, and not unknown. Raises ModelExists or LoadFailed."""
        self._check_new(name)
        source = behind_links(source)
        engine = self._make_engine(name, source, dtype)
        model = LiveModel(name, source, engine, ModelMetrics(self.metrics, name), self._limits)
        model.dtype, model.configured = dtype, self._finishings.get(name, self._finishing)
        self._models[name] = model
        self._on_change(model)
        return model

    async def start(self, model: LiveModel) -> LiveModel:
        """Loads, checks and warms what was entered; it is served when this returns. Raises LoadFailed, or Unloaded."""
        try:
            await model.start(self._executor, self._changed)
            if self._models.get(model.name) is not model:
                raise Unloaded(f"model '{model.name}' was unloaded while it was loading")
        except BaseException as error:
            is_unloaded = self._models.get(model.name) is not model or model.state is ModelState.DRAINING
            self._forget(model)
            model.state = ModelState.FAILED
            self._on_change(model)
            await model.engine.stop()
            if is_unloaded and isinstance(error, RewardServeError):  # whatever its engine ended in over that
                raise Unloaded(f"model '{model.name}' was unloaded while it was loading") from error
            _raise_if_own(error)
            raise
        assert model.info is not None
        log.info("serving %s: %s, version %s, %s", model.name, model.source, model.version, model.info.path)
        return model

    async def unload(self, name: str, grace_s: float) -> None:
        """Stops admitting, waits for what is in flight as long as `grace_s`, and frees the memory.

        Raises ModelNotFound, or SwapRefused for an ensemble.
        """
        model = self.get(name) if name in self._ensembles else self._models.get(name)
        if model is None:
            raise ModelNotFound(f"no model '{name}' here")
        model.state = ModelState.DRAINING
        model.metrics.up.set(0)
        self._on_change(model)
        await model.opened()
        await _idle(model, grace_s)
        await model.engine.stop()
        if model.previous is not None and model.previous.kept is not None:
            await model.previous.kept.engine.stop()
        self._forget(model)
        self._on_change(model)

    def _forget(self, model: LiveModel) -> None:
        """Unless another has its name by now, or it was forgotten already."""
        if self._models.get(model.name) is model:
            del self._models[model.name]
            model.metrics.forget()

    def stop_admitting(self) -> None:
        self._draining = True

    async def drain(self, grace_s: float) -> None:
        """Waits for what is in flight, or admitted and waiting for other weights, as long as `grace_s`."""
        await asyncio.gather(*(_idle(model, grace_s, admitted=True) for model in [*self.models, *self._retiring]))

    async def stop(self) -> None:
        kept = [model.previous.kept for model in self.models if model.previous is not None and model.previous.kept]
        await asyncio.gather(*(model.engine.stop() for model in [*self.models, *kept, *self._retiring]))


async def _idle(model: LiveModel, grace_s: float | None, admitted: bool = False) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(grace_s):
            while model.num_users or (admitted and model.admission.num_requests):
                await asyncio.sleep(0.02)


def _raise_if_own(error: BaseException) -> None:
    """What of the project's own errors ends a load is LoadFailed to who asked for it."""
    if isinstance(error, RewardServeError) and not isinstance(error, LoadFailed):
        raise LoadFailed(str(error)) from error
