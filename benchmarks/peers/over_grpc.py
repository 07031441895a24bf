"""rewardserve as it is used: a `rewardserve serve` process, and the client with all groups in flight at once."""

import asyncio
import re
import subprocess
import sys
import threading
from array import array
from typing import TextIO

import rewardserve
import torch
from rewardserve.client import AsyncRewardClient, Group, TokenIds

from peers.protocol import CannotServe, Groups, Job, Scores, process_tree, serve

LISTENING = re.compile(r"listening on (\S+:\d+)")
LIMIT_S = 3600.0  # of one call; the benchmark itself has none


class RewardServeOverGrpc:
    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._server: subprocess.Popen[str] | None = None
        self._client: AsyncRewardClient | None = None

    def load(self, job: Job) -> dict[str, str]:
        self._server = subprocess.Popen(_command(job), stderr=subprocess.PIPE, text=True)
        assert self._server.stderr is not None
        endpoint = _wait_ready(self._server.stderr)
        threading.Thread(target=_forward, args=(self._server.stderr,), daemon=True).start()
        self._client = self._loop.run_until_complete(_connect(endpoint))
        return {"rewardserve": rewardserve.__version__, "torch": torch.__version__}

    def prepare(self, groups: Groups) -> list[Group]:
        return [
            Group(_ids(prompt), [_ids(response) for response in responses], id=str(number))
            for number, (prompt, responses) in enumerate(groups)
        ]

    def score(self, prepared: list[Group]) -> Scores:
        return self._loop.run_until_complete(self._stream(prepared))

    async def _stream(self, groups: list[Group]) -> Scores:
        scores: Scores = [[] for _ in groups]
        assert self._client is not None
        async for group, result in self._client.score_stream(groups, window=min(256, len(groups))):
            if isinstance(result, Exception):
                raise result
            scores[int(group.id)] = list(result.scores)
        return scores

    def processes(self) -> list[int]:
        """Front and engine, not the client."""
        return process_tree(self._server.pid) if self._server else []

    def close(self) -> None:
        if self._client:
            self._loop.run_until_complete(self._client.close())
        if self._server:
            self._server.terminate()
            self._server.wait(60)


def _command(job: Job) -> list[str]:
    flags = {
        "model": f"rm={job.model}",
        "device": job.device,
        "dtype": job.dtype,
        "threads": job.threads,
        "port": 0,
        "metrics-port": -1,
        "path": "packed",
        "prefix-cache-mb": job.cache_bytes >> 20,
    }
    return [sys.executable, "-m", "rewardserve", "serve", *(f"--{name}={value}" for name, value in flags.items())]


def _wait_ready(log: TextIO) -> str:
    endpoint, lines = "", []
    for line in log:
        lines.append(line)
        if match := LISTENING.search(line):
            endpoint = match[1]
        if line.endswith("ready\n"):
            return endpoint
    raise CannotServe("the server did not start: " + "".join(lines[-3:]).strip())


def _forward(log: TextIO) -> None:
    """A full pipe would stop the server."""
    for line in log:
        sys.stderr.write(line)


async def _connect(endpoint: str) -> AsyncRewardClient:
    return AsyncRewardClient(endpoint, timeout=LIMIT_S)


def _ids(ids: list[int]) -> TokenIds:
    return TokenIds(array("i", ids))


if __name__ == "__main__":
    serve(RewardServeOverGrpc())
