"""BatchPlan -> raw scores: executes forwards. Knows nothing of requests, queues or caches."""

from dataclasses import dataclass
from typing import Protocol

import torch
from rewardserve_kernels.workspace import Workspace

from rewardserve.engine.native.batch import build_pack, build_rows
from rewardserve.engine.native.graphs import Graphs
from rewardserve.engine.native.sequence import BatchPlan, Move
from rewardserve.models.backbone import Pack, rope_switch
from rewardserve.models.kv_pool import HostBlocks, KVPool
from rewardserve.models.reward_model import RewardModel


class Launched(Protocol):
    """A forward that was handed to the device."""

    def ready(self) -> bool:
        """Whether `scores` would not wait."""

    def scores(self) -> list[float]:
        """Of the plan's scored chunks, in order. Raises what the forward ended in, where that shows only now."""


class Runner(Protocol):
    """Prepares a forward while others run, then launches it. The two are called from different threads."""

    num_blocks: int  # 0: it has no prefix cache, plans hold whole sequences
    num_host_slots: int  # blocks that host memory holds besides

    def prepare(self, plan: BatchPlan) -> object: ...

    def launch(self, prepared: object) -> Launched:
        """Forwards take effect in the order they were launched."""


class Done:
    """A forward that was computed as it was launched, as on a CPU."""

    def __init__(self, scores: list[float]) -> None:
        self._scores = scores

    def ready(self) -> bool:
        return True

    def scores(self) -> list[float]:
        return self._scores


class _OnGpu:
    """Its scores are on their way to the host; nobody waits for them but who asks."""

    def __init__(self, scores: torch.Tensor) -> None:
        self._scores = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True)
        self._scores.copy_(scores, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def ready(self) -> bool:
        return self._copied.query()

    def scores(self) -> list[float]:
        self._copied.synchronize()
        return self._scores.tolist()


@dataclass(frozen=True, slots=True)
class _Step:
    pack: Pack
    moves: tuple[Move, ...]


class PackedRunner:
    def __init__(
        self,
        model: RewardModel,
        pool: KVPool,
        num_blocks: int,
        graphs: Graphs | None = None,
        host: HostBlocks | None = None,
    ) -> None:
        """`num_blocks` of the pool are for plans; `graphs` take the forwards that are small enough for them."""
        self._model = model
        self._pool = pool
        self._graphs = graphs
        self._host = host
        self.num_blocks = num_blocks
        self.num_host_slots = 0 if host is None else host.num_slots

    def prepare(self, plan: BatchPlan) -> "_Step":
        backbone = self._model.backbone
        return _Step(build_pack(plan, backbone, for_gpu=backbone.device.type != "cpu"), plan.moves)

    def launch(self, prepared: object) -> Launched:
        assert isinstance(prepared, _Step)
        for move in prepared.moves:
            assert self._host is not None
            (self._host.copy_out if move.out else self._host.copy_back)(move.block, move.slot)
        scores = self._graphs.launch(prepared.pack) if self._graphs is not None else None
        if scores is None:
            scores = self._model.score_packed(prepared.pack, self._pool)
        return _OnGpu(scores) if scores.is_cuda else Done(scores.tolist())

    @property
    def workspace(self) -> Workspace:
        """What is kept for intermediate results."""
        return self._pool.workspace


class PaddedRunner:
    """The fallback: whole sequences sorted by length, padded within batches of `max_batch_tokens`."""

    num_blocks = num_host_slots = 0

    def __init__(self, model: RewardModel, max_batch_tokens: int) -> None:
        self._model = model
        self._max_batch_tokens = max_batch_tokens
        self._rope_switch = rope_switch(model.backbone.config)

    def prepare(self, plan: BatchPlan) -> list[torch.Tensor]:
        return build_rows(plan)

    def launch(self, prepared: object) -> Launched:
        assert isinstance(prepared, list)
        scores = [0.0] * len(prepared)
        order = sorted(range(len(prepared)), key=lambda i: -len(prepared[i]))
        while order:
            count = self._fitting([len(prepared[i]) for i in order])
            batch, order = order[:count], order[count:]
            for index, score in zip(
                batch, self._model.score_padded([prepared[i] for i in batch]).tolist(), strict=True
            ):
                scores[index] = score
        return Done(scores)

    def _fitting(self, lengths: list[int]) -> int:
        """How many of `lengths`, longest first, make one padded batch: at least one."""
        count = max(1, self._max_batch_tokens // lengths[0])
        if self._rope_switch is not None and lengths[0] > self._rope_switch:
            count = min(count, sum(length > self._rope_switch for length in lengths))
        return count
