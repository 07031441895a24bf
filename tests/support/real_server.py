"""The real thing: `rewardserve serve` as a process of its own, with tiny random checkpoints and real texts."""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import grpc
import numpy as np
import psutil
import pytest
import texts
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from rewardserve.v1 import models_pb2, models_pb2_grpc, scoring_pb2, scoring_pb2_grpc

ANTI_HANG_S = 150  # only a hang takes so long; several engines on busy cores have taken more than a minute
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class ServerProcess:
    """`rewardserve serve`, its log, and clients to it."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "rewardserve", "serve", "--port", "0", "--metrics-port", "0"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [*command, "--threads", "1", "--prefix-cache-mb", "16", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.front = psutil.Process(self.process.pid)
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        self._engines: set[psutil.Process] = set()
        self.port = self.metrics_port = 0
        self._channel: grpc.Channel | None = None

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())

    def wait_for_log(self, pattern: str) -> re.Match[str]:
        found: list[re.Match[str]] = []

        def look() -> bool:
            found.extend(match for line in list(self.log) if (match := re.search(pattern, line)))
            assert found or self.process.poll() is None, "\n".join(self.log)
            return bool(found)

        until(look)
        return found[0]

    def listen(self) -> "ServerProcess":
        match = self.wait_for_log(r"listening on 127\.0\.0\.1:(\d+), metrics on port (\d+)")
        self.port, self.metrics_port = int(match[1]), int(match[2])
        return self

    def ready(self) -> "ServerProcess":
        self.listen().wait_for_log(r"INFO ready$")
        self._engines.update(self.engines())
        return self

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def channel(self) -> grpc.Channel:
        if self._channel is None:
            self._channel = grpc.insecure_channel(self.target, options=[("grpc.enable_retries", 0)])
        return self._channel

    @property
    def scoring(self) -> scoring_pb2_grpc.ScoringStub:
        return scoring_pb2_grpc.ScoringStub(self.channel)

    @property
    def models(self) -> models_pb2_grpc.ModelsStub:
        return models_pb2_grpc.ModelsStub(self.channel)

    @property
    def health(self) -> health_pb2_grpc.HealthStub:
        return health_pb2_grpc.HealthStub(self.channel)

    def model(self, name: str = "") -> models_pb2.Model:
        return self.models.Get(models_pb2.GetModelRequest(name=name), timeout=ANTI_HANG_S)

    def is_serving(self, service: str = "") -> bool:
        return self.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20).status == SERVING

    def nursery(self) -> psutil.Process | None:
        """What engines on CPUs are forked from."""
        for child in self.front.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "rewardserve.engine.nursery" in child.cmdline():
                    return child
        return None

    def engines(self) -> list[psutil.Process]:
        """Those that have begun: forks lead sessions of their own by then, others have their command line."""
        found, nursery = [], self.nursery()
        for child in self.front.children():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                forks = child.children() if child == nursery else []
                found += [fork for fork in forks if os.getsid(fork.pid) == fork.pid]
                if "rewardserve.engine.child" in child.cmdline():
                    found.append(child)
        self._engines.update(found)
        return found

    def engine(self) -> psutil.Process:
        (engine,) = self.engines()
        return engine

    def scrape(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=20) as reply:
            return reply.read().decode()

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """(sample name, sorted labels without the model's) -> value, as Prometheus would scrape it."""
        return {
            (sample.name, tuple(sorted((k, v) for k, v in sample.labels.items() if k != "model"))): sample.value
            for family in text_string_to_metric_families(self.scrape())
            for sample in family.samples
        }

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics().get((f"rewardserve_{name}", tuple(sorted(labels.items()))), 0.0)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float | None = None) -> int:
        return self.process.wait(timeout_s or ANTI_HANG_S)

    def end(self) -> None:
        if self._channel is not None:
            self._channel.close()
        with contextlib.suppress(psutil.NoSuchProcess):
            self._engines.update(self.front.children(recursive=True))
        for process in (self.process, *self._engines):
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                process.kill()
        self.process.wait(20)
        self._reader.join(20)
        assert self.process.stderr is not None
        self.process.stderr.close()


def until(condition, within_s: float | None = None) -> None:
    deadline = time.monotonic() + (within_s or ANTI_HANG_S)
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


class Watch:
    """Collects what health Watch says of a service, on a thread."""

    def __init__(self, server: ServerProcess, service: str) -> None:
        self.statuses: list[int] = []
        self._call = server.health.Watch(health_pb2.HealthCheckRequest(service=service))
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        with contextlib.suppress(grpc.RpcError):
            for reply in self._call:
                self.statuses.append(reply.status)

    def end(self) -> None:
        self._call.cancel()
        self._thread.join(20)


def pack(ids: Sequence[int]) -> bytes:
    return np.array(ids, dtype="<i4").tobytes()


def ids_group(prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> scoring_pb2.Group:
    return scoring_pb2.Group(
        prompt=scoring_pb2.Prompt(token_ids=pack(prompt)),
        responses=[scoring_pb2.Response(token_ids=pack(response)) for response in responses],
    )


def ids_request(prompt: Sequence[int], responses: Sequence[Sequence[int]], **fields) -> scoring_pb2.ScoreRequest:
    return scoring_pb2.ScoreRequest(groups=[ids_group(prompt, responses)], **fields)


def random_ids(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, checkpoints.VOCAB_SIZE, length).tolist()


def scores_of(reply: scoring_pb2.ScoreResponse) -> list[float | None]:
    return [item.score if item.HasField("score") else None for group in reply.groups for item in group.items]


@pytest.fixture(scope="session")
def real_groups() -> list[texts.Group]:
    return texts.groups(12, 4, max_characters=300)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, real_groups) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    checkpoints.save_checkpoint(folder, texts=texts.all_texts(real_groups))
    return folder


@pytest.fixture(scope="session")
def bf16_checkpoint(tmp_path_factory) -> Path:
    """Scores in bf16 on a CPU are the same bits whatever runs beside them, so they can be compared exactly."""
    folder = tmp_path_factory.mktemp("tiny-bf16")
    checkpoints.save_checkpoint(folder, dtype=torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def start() -> Iterator:
    """A function that starts one more server; all are killed with the module."""
    with contextlib.ExitStack() as stack:

        def start_one(*arguments: str) -> ServerProcess:
            server = ServerProcess(*arguments)
            stack.callback(server.end)
            return server

        yield start_one


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    return SimpleNamespace(
        ANTI_HANG_S=ANTI_HANG_S,
        SERVING=SERVING,
        NOT_SERVING=NOT_SERVING,
        Watch=Watch,
        until=until,
        pack=pack,
        ids_group=ids_group,
        ids_request=ids_request,
        random_ids=random_ids,
        scores_of=scores_of,
        numbers=itertools.count(),
    )
