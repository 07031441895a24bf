"""Composition root: config -> every object wired; start, drain, stop. The only place that names concrete engines."""

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

import grpc
import prometheus_client
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from rewardserve.config import ServeConfig
from rewardserve.engine.base import Engine
from rewardserve.engine.cgroups import num_cores
from rewardserve.engine.choice import Wish, choose, reason_for_vllm
from rewardserve.engine.environment import engine_environment
from rewardserve.engine.launch import Launcher, Program
from rewardserve.engine.native.options import NativeOptions
from rewardserve.engine.nursery_process import Nursery, is_on_cpu
from rewardserve.engine.process import EngineProcess
from rewardserve.engine.replicas import Replicas
from rewardserve.engine.shared import SharedEngine, sharing
from rewardserve.engine.vllm_options import VllmOptions
from rewardserve.errors import Unloaded
from rewardserve.metrics import Metrics
from rewardserve.models.source import behind_links, check_source
from rewardserve.service.admission import Limits
from rewardserve.service.drift import Drift, read_reference
from rewardserve.service.finish import Finishing, read_calibration
from rewardserve.service.registry import Registry
from rewardserve.service.score import ScoringService
from rewardserve.transport.grpc_server import MODELS, SCORING, DoorOptions, GrpcDoor
from rewardserve.transport.health import Health

log = logging.getLogger(__name__)

MAX_BACKLOG_S = 5.0  # of calls that are yet to hear that the server shuts down
METRICS_TIMEOUT_S = 20.0  # for a scrape to be asked and to be read
TEXT_THREADS = "tokenizer"  # how the names of those begin that render and tokenize
NO_LIMIT = 1 << 30  # for gRPC, which has no word for it

MakeEngine = Callable[[str, str, str], Engine]  # name, source, dtype


def native_options(config: ServeConfig, source: str, dtype: str) -> NativeOptions:
    return NativeOptions(
        source=source,
        dtype=config.dtype if dtype == "auto" else dtype,
        device=config.device,
        max_length=config.max_length,
        max_batch_tokens=config.max_batch_tokens,
        max_batch_sequences=config.max_batch_sequences,
        prefix_cache_bytes=config.prefix_cache_mb << 20,
        host_cache_bytes=config.host_cache_mb << 20,
        compile=config.compile,
        batch_invariant=config.batch_invariant,
        cuda_graphs=config.cuda_graphs,
        own_kernels=config.own_kernels,
        quantize=config.quantize,
        path=config.path,
        num_threads=config.threads,
    )


def vllm_options(config: ServeConfig, source: str, dtype: str, reason: str) -> VllmOptions:
    return VllmOptions(
        source=source,
        reason=reason,
        dtype=config.dtype if dtype == "auto" else dtype,
        device=config.device,
        max_length=config.max_length,
        max_batch_tokens=config.max_batch_tokens,
        max_batch_sequences=config.max_batch_sequences,
        prefix_cache_bytes=config.prefix_cache_mb << 20,
        compile=config.compile,
        quantization=config.vllm_quantization,
        tensor_parallel=config.tensor_parallel,
        num_threads=config.threads,
    )


def finishings(config: ServeConfig) -> dict[str, Finishing]:
    """How scores of models and ensembles are finished, by name. Raises LoadFailed for a calibration that is none."""
    made, calibrations = {}, config.calibrations
    for name in [*config.models, *config.ensembles]:
        file = calibrations.get(name)
        calibration, origin = (None, None) if file is None else read_calibration(file)
        penalty, weights = config.length_penalties.get(name, 0.0), config.weights_of_attributes.get(name, {})
        looks_beside = name not in calibrations or file is not None  # unless it is "none"
        made[name] = Finishing(calibration, origin, penalty, weights, looks_beside)
    return made


def threads_of(config: ServeConfig, name: str, shared: Sequence[tuple[str, ...]] = ()) -> int:
    """Torch threads of a model's engine on a CPU; 0: as many as there are cores. `shared`: names of one engine each.

    Members of an ensemble compute at the same time, so they share the cores: with more threads than cores those of one
    engine wait for those of another in the middle of every operation (seen: twenty times as slow).
    """
    own = {name: number for number, names in enumerate(shared) for name in names}
    num_members = max(
        (
            len({own.get(member, member) for member in members})
            for _, members in config.ensembles.values()
            if name in members
        ),
        default=1,
    )
    if config.threads or num_members == 1:
        return config.threads
    return max(1, num_cores() // num_members)


class App:
    """One server. `start` returns when every model is ready; `drain` finishes what is in flight; `stop` ends."""

    def __init__(self, config: ServeConfig, make_engine: MakeEngine | None = None) -> None:
        self._config = config
        self._sources = {name: behind_links(source) for name, source in config.models.items()}
        self._executor = ThreadPoolExecutor(config.tokenizer_threads, thread_name_prefix=TEXT_THREADS)
        self._health = Health()
        self.metrics = Metrics(prometheus_client.CollectorRegistry())
        beside_others = len(config.models) > 1 or config.allow_model_control or "," in config.device
        self._environment = partial(engine_environment, beside_others=beside_others, environ=os.environ)
        self._nursery = Nursery(self._environment("native"))
        self._shared = [] if make_engine else self._share_backbones()
        limits = Limits(config.max_pairs_per_request, config.max_queued_requests, config.max_queued_tokens)
        self.registry = Registry(
            make_engine or self._make_engine,
            self.metrics,
            limits,
            self._executor,
            lambda model: self._health.update(self.registry, model),
            finishings(config),
            Finishing(looks_beside=True),
        )
        drifts = {name: Drift(name, read_reference(file)) for name, file in config.drift_references.items()}
        service = ScoringService(self.registry, self._executor, drifts)
        for name, drift in drifts.items():
            self.metrics.watch_drift(name, drift.value)
        options = DoorOptions(
            config.allow_model_control, config.max_stream_requests, config.grace_s, config.log_requests, config.log_text
        )
        self._door = GrpcDoor(service, self.registry, options)
        self._server: grpc.aio.Server | None = None
        self._metrics_server: Any = None
        self.port = 0
        self.metrics_port = 0

    async def start(self) -> None:
        """Opens the ports, NOT_SERVING at first, and loads the models. Raises LoadFailed, OSError for a taken port."""
        self._health.update_server(self.registry)
        self._server = grpc.aio.server(options=self._channel_options())
        self._server.add_generic_rpc_handlers(self._door.handlers())
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SCORING, MODELS, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), self._server)
        self.port = self._listen(self._server)
        if self._config.metrics_port >= 0:
            self._serve_metrics()
        for name, (aggregate, members) in self._config.ensembles.items():
            self.registry.add_ensemble(name, members, aggregate)
        # All before the first is loaded, which takes minutes: who asks for another is to come again, not to give up.
        models = [self.registry.enter(name, source) for name, source in self._sources.items()]
        await self._server.start()
        log.info("listening on %s, metrics on port %s", _address(self._host, self.port), self.metrics_port or "none")
        for model in models:
            if model in self.registry.models:  # or it was unloaded before its turn came
                with contextlib.suppress(Unloaded):
                    await self.registry.start(model)
        self._health.started(self.registry)

    async def drain(self) -> None:
        """Stops admitting and finishes what is in flight within the grace period."""
        if self._server is None:
            return
        in_flight = sum(model.admission.num_requests for model in self.registry.models)
        log.info("draining: %d requests in flight, %.0f s of grace", in_flight, self._config.grace_s)
        self._health.drain()
        self.registry.stop_admitting()
        self._door.close()
        await self.registry.drain(self._config.grace_s)
        await self._door.has_caught_up(MAX_BACKLOG_S)
        await self._server.stop(grace=1.0)  # what is answered by now still has to leave

    async def stop(self) -> None:
        """Ends everything; calls still open are cancelled."""
        if self._server is not None:
            await self._server.stop(grace=None)
        await self.registry.stop()
        await self._nursery.stop()
        if self._metrics_server is not None:
            self._metrics_server.shutdown()
            self._metrics_server.server_close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _listen(self, server: grpc.aio.Server) -> int:
        address = _address(self._host, self._config.port)
        with contextlib.suppress(RuntimeError):
            if port := server.add_insecure_port(address):
                return port
        raise OSError(f"cannot listen on {address}: {_why_not(self._host, self._config.port)}")

    def _serve_metrics(self) -> None:
        port, host = self._config.metrics_port, self._host
        try:
            self._metrics_server, _ = prometheus_client.start_http_server(port, host, self.metrics.registry)
        except OSError as error:
            raise OSError(
                f"cannot serve metrics on {_address(host, port)} ({error}); choose another with --metrics-port"
            ) from error
        self._metrics_server.RequestHandlerClass = _Scrape
        self.metrics_port = self._metrics_server.server_port

    @property
    def _host(self) -> str:
        """An IPv6 address without its brackets, which gRPC needs and nobody else takes."""
        return self._config.host.removeprefix("[").removesuffix("]")

    @property
    def _wish(self) -> Wish:
        config = self._config
        return Wish(config.engine, config.tensor_parallel, config.vllm_quantization, config.means_native)

    def _share_backbones(self) -> list[SharedEngine]:
        config = self._config
        if not config.share_backbone or reason_for_vllm(self._wish):
            return []

        def make(names: Sequence[str], sources: Sequence[str]) -> EngineProcess | Replicas:
            options = replace(native_options(config, sources[0], "auto"), beside=tuple(sources[1:]))
            return self._on_devices(options, *names)

        return [
            SharedEngine(
                {name: self._sources[name] for name in names},
                make=partial(make, names),
                alone=lambda name: self._engine_alone(name, self._sources[name], "auto"),
            )
            for names in sharing(self._sources)
        ]

    def _make_engine(self, name: str, source: str, dtype: str) -> Engine:
        """Over the shared backbone, where the model is what it was at the start; a new version has its own.

        Raises LoadFailed for a source that cannot be one.
        """
        check_source(source)
        if source == self._sources.get(name) and dtype == "auto":
            for shared in self._shared:
                if name in shared.members and not shared.members[name].is_running:
                    return shared.members[name]
        return self._engine_alone(name, source, dtype)

    def _engine_alone(self, name: str, source: str, dtype: str) -> Engine:
        config = self._config
        return choose(
            self._wish,
            native=lambda: self._on_devices(native_options(config, source, dtype), name),
            vllm=lambda reason: self._on_devices(vllm_options(config, source, dtype, reason), name),
        )

    def _on_devices(self, options: NativeOptions | VllmOptions, *names: str) -> EngineProcess | Replicas:
        """`names` of the models that it is of."""
        config, name = self._config, "+".join(names)
        devices = config.device.split(",")
        if len(devices) == 1:
            together = [tuple(shared.members) for shared in self._shared if not shared.is_refused]
            if len(names) == 1:  # not over a shared backbone, or not any more
                together = [members for members in together if name not in members]
            return self._engine_process(replace(options, num_threads=threads_of(config, names[0], together)), name)
        threads = config.threads or max(1, num_cores() // len(devices))
        return Replicas(
            [
                self._engine_process(
                    replace(options, device=device, num_threads=threads), f"{name}/{number}", resubmit=False
                )
                for number, device in enumerate(devices)
            ],
            options.source,
        )

    def _engine_process(self, options: NativeOptions | VllmOptions, name: str, resubmit: bool = True) -> EngineProcess:
        config = self._config
        launcher: Launcher = self._nursery
        if isinstance(options, VllmOptions) or not is_on_cpu(options.device):
            launcher = Program(self._environment(options.engine))
        return EngineProcess(
            options, name, launcher, config.stall_timeout_s, config.log_format, config.log_level, resubmit
        )

    def _channel_options(self) -> list[tuple[str, int]]:
        size = self._config.max_message_mb << 20
        return [
            ("grpc.max_receive_message_length", size),
            ("grpc.max_send_message_length", size),
            # gRPC cancels calls that wait to be read: from the thousandth on at random, and all after 30 s. But who may
            # come in, and who is told to come again, is for admission to say.
            ("grpc.server.max_pending_requests", NO_LIMIT),
            ("grpc.server.max_pending_requests_hard_limit", NO_LIMIT),
            ("grpc.server_max_unrequested_time_in_server", NO_LIMIT),
            ("grpc.so_reuseport", 0),  # a taken port is an error, not a silent share of its traffic
            # Rollout workers keep connections open for hours and ping them; the default is to hang up on them.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ]


class _Scrape(WSGIRequestHandler):
    """Each has a thread, which one that is never asked for, as of a scraper whose host is gone, would keep for ever."""

    timeout = METRICS_TIMEOUT_S

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # it came to nothing, and the log is not for that
            super().handle()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nor for each of those that did come."""


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _why_not(host: str, port: int) -> str:
    """gRPC does not say why it cannot listen; the system does."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
            tried.listen()
    except (socket.gaierror, UnicodeError) as error:  # the latter of a name with a part of more than 63 letters
        return f"--host {host!r} does not resolve ({getattr(error, 'strerror', error)})"
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return "is another server there? choose another with --port"
        if error.errno == errno.EADDRNOTAVAIL:
            return f"--host {host!r} is no address of this machine"
        return f"{error.strerror}; choose another with --port"
    return "gRPC refused, though the port is free"
