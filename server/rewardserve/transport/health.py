"""grpc.health.v1, fed by the states of the models: "" is the server, "rewardserve.v1.Scoring/<name>" one model."""

from grpc_health.v1 import health, health_pb2

from rewardserve.service.live_model import LiveModel, ModelState
from rewardserve.service.registry import Registry
from rewardserve.transport.grpc_server import MODELS, SCORING

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()
        self._draining = False
        self._started = False

    async def update(self, registry: Registry, model: LiveModel) -> None:
        """The server serves when it has models and all of them serve."""
        known = model in registry.models
        await self._set(f"{SCORING}/{model.name}", known and model.state is ModelState.SERVING)
        serving = {m.name for m in registry.models if m.state is ModelState.SERVING}
        for ensemble in registry.ensembles:
            await self._set(f"{SCORING}/{ensemble.name}", serving >= set(ensemble.members))
        await self.update_server(registry)

    async def update_server(self, registry: Registry) -> None:
        models = registry.models
        if self._started:  # one that comes or goes on demand does not take the others out of service
            models = [m for m in models if m.state not in (ModelState.LOADING, ModelState.DRAINING)]
        ready = bool(models) and all(m.state is ModelState.SERVING for m in models)
        for service in ("", SCORING):
            await self._set(service, ready)
        await self._set(MODELS, True)

    async def started(self, registry: Registry) -> None:
        """All models that were asked for at the start are there."""
        self._started = True
        await self.update_server(registry)

    async def drain(self) -> None:
        """NOT_SERVING from now on, whatever happens: load balancers should look elsewhere."""
        self._draining = True
        await self.servicer.enter_graceful_shutdown()

    async def _set(self, service: str, serving: bool) -> None:
        if not self._draining:
            await self.servicer.set(service, SERVING if serving else NOT_SERVING)
