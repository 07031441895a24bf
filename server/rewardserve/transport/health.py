"""grpc.health.v1, fed by the states of the models: "" is the server, "rewardserve.v1.Scoring/<name>" one model.

Not by grpcio-health-checking's servicer, of which all that watch a service hear nothing more when one of them leaves.
"""

import asyncio
from collections.abc import AsyncIterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rewardserve.service.live_model import LiveModel, ModelState
from rewardserve.service.registry import Registry
from rewardserve.transport.grpc_server import MODELS, SCORING

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

Request = health_pb2.HealthCheckRequest
Response = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):
    """Lives on the event loop."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._changed = asyncio.Event()  # set with the next change, and another takes its place
        self._draining = False
        self._started = False

    async def Check(self, request: Request, context: grpc.aio.ServicerContext) -> Response:
        if request.service not in self._statuses:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return Response(status=self._statuses[request.service])

    async def Watch(self, request: Request, context: grpc.aio.ServicerContext) -> AsyncIterator[Response]:
        """Now, and at every change that the caller has not missed for a newer one."""
        told = None
        while True:
            changed, status = self._changed, self._statuses.get(request.service, SERVICE_UNKNOWN)
            if status != told:
                yield Response(status=status)
                told = status
            await changed.wait()

    def update(self, registry: Registry, model: LiveModel) -> None:
        """The server serves when it has models and all of them serve."""
        known = model in registry.models
        self._set(f"{SCORING}/{model.name}", known and model.state is ModelState.SERVING)
        serving = {m.name for m in registry.models if m.state is ModelState.SERVING}
        for ensemble in registry.ensembles:
            self._set(f"{SCORING}/{ensemble.name}", serving >= set(ensemble.members))
        self.update_server(registry)

    def update_server(self, registry: Registry) -> None:
        models = registry.models
        if self._started:  # one that comes or goes on demand does not take the others out of service
            models = [m for m in models if m.state not in (ModelState.LOADING, ModelState.DRAINING)]
        ready = bool(models) and all(m.state is ModelState.SERVING for m in models)
        for service in ("", SCORING):
            self._set(service, ready)
        self._set(MODELS, True)

    def started(self, registry: Registry) -> None:
        """All models that were asked for at the start are there."""
        self._started = True
        self.update_server(registry)

    def drain(self) -> None:
        """NOT_SERVING from now on, whatever happens: load balancers should look elsewhere."""
        for service in self._statuses:
            self._set(service, False)
        self._draining = True

    def _set(self, service: str, serving: bool) -> None:
        status = SERVING if serving else NOT_SERVING
        if self._draining or self._statuses.get(service) == status:
            return
        self._statuses[service] = status
        self._changed.set()
        self._changed = asyncio.Event()
