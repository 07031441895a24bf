"""BatchPlan -> raw scores: executes forwards. Knows nothing of requests, queues or caches."""

from dataclasses import dataclass
from typing import Protocol

import torch
from rewardserve_kernels.workspace import Workspace

from rewardserve.engine.native.batch import build_pack, build_rows, lay_end_to_end
from rewardserve.engine.native.gpu import use_device
from rewardserve.engine.native.graphs import Graphs, Replay
from rewardserve.engine.native.sequence import BatchPlan, Move
from rewardserve.models.kv_pool import HostBlocks, KVPool
from rewardserve.models.packed_attention import Pack
from rewardserve.models.packing import rope_switch
from rewardserve.models.reward_model import RewardModel


class Launched(Protocol):
    """A forward that was handed to the device."""

    def ready(self) -> bool:
        """Whether `features` would not wait."""

    def features(self) -> list[list[float]]:
        """Of all reads of the plan's chunks, in order. Raises what the forward ended in, where that shows only now."""


class Runner(Protocol):
    """Prepares a forward while others run, then launches it. The two are called from different threads."""

    num_blocks: int  # 0: it has no prefix cache, plans hold whole sequences
    num_host_slots: int  # blocks that host memory holds besides

    def prepare(self, plan: BatchPlan) -> object: ...

    def launch(self, prepared: object) -> Launched:
        """Forwards take effect in the order they were launched."""


class Done:
    """A forward that was computed as it was launched, as on a CPU."""

    def __init__(self, features: list[list[float]]) -> None:
        self._features = features

    def ready(self) -> bool:
        return True

    def features(self) -> list[list[float]]:
        return self._features


class _OnGpu:
    """Its features are on their way to the host; nobody waits for them but who asks."""

    def __init__(self, features: torch.Tensor) -> None:
        self._features = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
        self._features.copy_(features, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def ready(self) -> bool:
        return self._copied.query()

    def features(self) -> list[list[float]]:
        self._copied.synchronize()
        return self._features.tolist()


@dataclass(frozen=True, slots=True)
class _Step:
    inputs: Pack | Replay
    moves: tuple[Move, ...]
    variant: int


@dataclass(frozen=True, slots=True)
class _Rows:
    rows: list[torch.Tensor]  # int64 ids of whole sequences
    reads: list[tuple[int, ...]]  # of each
    variant: int


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
        use_device(backbone.device)  # of the planner's thread
        rows = lay_end_to_end(plan)
        inputs: Pack | Replay | None = None if self._graphs is None else self._graphs.prepare(rows)
        if inputs is None:
            inputs = build_pack(rows, backbone, backbone.device.type != "cpu", self._model.takes_mean)
        return _Step(inputs, plan.moves, plan.variant)

    def launch(self, prepared: object) -> Launched:
        assert isinstance(prepared, _Step)
        for move in prepared.moves:
            assert self._host is not None
            (self._host.copy_out if move.out else self._host.copy_back)(move.block, move.slot)
        self._model.use(prepared.variant)
        match prepared.inputs:
            case Replay():
                assert self._graphs is not None
                features = self._graphs.launch(prepared.inputs)
            case pack:
                features = self._model.features_packed(pack, self._pool)
        return _OnGpu(features) if features.is_cuda else Done(features.tolist())

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

    def prepare(self, plan: BatchPlan) -> "_Rows":
        return _Rows(build_rows(plan), [chunk.reads for chunk in plan.chunks], plan.variant)

    def launch(self, prepared: object) -> Launched:
        assert isinstance(prepared, _Rows)
        self._model.use(prepared.variant)
        rows, reads = prepared.rows, prepared.reads
        features: list[list[list[float]]] = [[]] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        while order:
            count = self._fitting([len(rows[i]) for i in order])
            batch, order = order[:count], order[count:]
            computed = self._model.features_padded([rows[i] for i in batch], [reads[i] for i in batch]).tolist()
            for index in batch:
                num_reads = len(reads[index])
                features[index], computed = computed[:num_reads], computed[num_reads:]
        return Done([read for row in features for read in row])

    def _fitting(self, lengths: list[int]) -> int:
        """How many of `lengths`, longest first, make one padded batch: at least one."""
        count = max(1, self._max_batch_tokens // lengths[0])
        if self._rope_switch is not None and lengths[0] > self._rope_switch:
            count = min(count, sum(length > self._rope_switch for length in lengths))
        return count
