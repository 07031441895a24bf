"""BatchPlan -> raw scores: executes one forward. Knows nothing of requests, queues or caches."""

from typing import Protocol

import torch
from rewardserve_kernels.workspace import Workspace

from rewardserve.engine.native.batch import build_pack, build_rows
from rewardserve.engine.native.sequence import BatchPlan
from rewardserve.models.backbone import KVPool, Pack, rope_switch
from rewardserve.models.reward_model import RewardModel


class Runner(Protocol):
    """Prepares a forward while another one runs, then runs it. The two are called from different threads."""

    num_blocks: int  # 0: it has no prefix cache, plans hold whole sequences

    def prepare(self, plan: BatchPlan) -> object: ...

    def run(self, prepared: object) -> list[float]:
        """Scores of the plan's scored chunks, in order."""


class PackedRunner:
    def __init__(self, model: RewardModel, pool: KVPool) -> None:
        self._model = model
        self._pool = pool
        self.num_blocks = pool.num_blocks

    def prepare(self, plan: BatchPlan) -> Pack:
        return build_pack(plan, self._model.backbone.device)

    def run(self, prepared: object) -> list[float]:
        assert isinstance(prepared, Pack)
        return self._model.score_packed(prepared, self._pool).tolist()

    @property
    def workspace(self) -> Workspace:
        """What is kept for intermediate results."""
        return self._pool.workspace


class PaddedRunner:
    """The fallback: whole sequences sorted by length, padded within batches of `max_batch_tokens`."""

    num_blocks = 0

    def __init__(self, model: RewardModel, max_batch_tokens: int) -> None:
        self._model = model
        self._max_batch_tokens = max_batch_tokens
        self._rope_switch = rope_switch(model.backbone.config)

    def prepare(self, plan: BatchPlan) -> list[torch.Tensor]:
        return build_rows(plan)

    def run(self, prepared: object) -> list[float]:
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
        return scores

    def _fitting(self, lengths: list[int]) -> int:
        """How many of `lengths`, longest first, make one padded batch: at least one."""
        count = max(1, self._max_batch_tokens // lengths[0])
        if self._rope_switch is not None and lengths[0] > self._rope_switch:
            count = min(count, sum(length > self._rope_switch for length in lengths))
        return count
