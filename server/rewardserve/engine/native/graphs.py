"""Forwards of few tokens replayed as CUDA graphs: what they cost is launching a thousand kernels, not computing.

A graph computes on tensors that stay where they are, of a size that stays what it is. So a pack's inputs are copied
into those of the next larger bucket; what is left of the bucket does nothing: tiles without rows, rows that nobody
reads, stores to a block that belongs to nobody. A graph ends where the head begins: models over one backbone have heads
of their own, and means are of as many rows as there are.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import astuple
from typing import Protocol

import torch
from rewardserve_kernels.kv_cache.paged import StoreIndex
from rewardserve_kernels.ragged import Segment

from rewardserve.models.backbone import Pack
from rewardserve.models.kv_pool import KVPool
from rewardserve.models.reward_model import RewardModel

log = logging.getLogger(__name__)

BUCKETS = (256, 512, 1024, 2048)  # rows
MAX_READS = 128
MAX_SEGMENTS = 256
MAX_TABLE = 16_384  # blocks, of all block tables of a pack together: two million tokens of prompts
WARM_UPS = 3  # forwards before a capture, as torch asks for: what is set up once must not be captured


class StaticStep:
    """A forward whose inputs lie at fixed places. Needs attention with fixed plans: attention.triton."""

    def __init__(self, model: RewardModel, pool: KVPool, num_rows: int, spare_block: int) -> None:
        """The model must have run once. `spare_block` of the pool is written to and never read."""
        from rewardserve_kernels.attention import triton

        device = model.backbone.device
        self._model, self._pool, self._spare_block = model, pool, spare_block
        self._rows_per_tile: dict[tuple[int, bool], int] = {}
        plans: dict[tuple[int, bool], triton.FixedPlan] = {}
        for key, shape in model.backbone.attention_shapes.items():
            window, reads_only = key
            rows = triton.rows_per_tile_of(*astuple(shape), device)
            num_queries = MAX_READS if reads_only else num_rows
            max_tiles = MAX_READS if reads_only else num_rows // rows + MAX_SEGMENTS
            plans[key] = triton.FixedPlan(num_queries, max_tiles, MAX_TABLE, device, window)
            self._rows_per_tile[key] = rows

        def zeros(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        stored = StoreIndex(zeros(num_rows), zeros(num_rows) + spare_block, zeros(num_rows))
        reads = (Segment(0, 1, 0, (), store=False),) * MAX_READS  # as many; where they are the plans say
        self._pack = Pack(zeros(num_rows), zeros(num_rows), (), reads, zeros(MAX_READS), stored, dict(plans))

    @property
    def num_rows(self) -> int:
        return len(self._pack.input_ids)

    def fill(self, pack: Pack) -> bool:
        """Takes over the inputs of `pack`, on the current stream; False if there is no room for them."""
        assert pack.stored is not None and self._pack.stored is not None
        if len(pack.input_ids) > self.num_rows or not 0 < len(pack.reads) <= MAX_READS:
            return False
        backbone = self._model.backbone
        try:
            for key, fixed in self._pack.plans.items():
                plan = pack.plans.get(key) or backbone.plan_attention(pack.segments, pack.reads, key)
                fixed.fill(plan, self._rows_per_tile[key])
        except ValueError:  # more tiles or blocks than there is room for
            return False
        for ours, theirs in (
            (self._pack.input_ids, pack.input_ids),
            (self._pack.position_ids, pack.position_ids),
            (self._pack.read_rows, pack.read_rows),
            (self._pack.stored.rows, pack.stored.rows),
            (self._pack.stored.slots, pack.stored.slots),
        ):
            ours[: len(theirs)] = theirs
        self._pack.stored.blocks.fill_(self._spare_block)
        self._pack.stored.blocks[: len(pack.stored.blocks)] = pack.stored.blocks
        return True

    def compute(self) -> torch.Tensor:
        """Hidden states as of `hidden_packed`, of which as many rows count as were filled in."""
        return self._model.hidden_packed(self._pack, self._pool)


class Replayed(Protocol):
    """torch.cuda.CUDAGraph."""

    def replay(self) -> None: ...


class Graphs:
    """A captured step for every bucket."""

    def __init__(
        self, model: RewardModel, pool: KVPool, captured: Sequence[tuple[StaticStep, Replayed, torch.Tensor]]
    ) -> None:
        """Smallest first; the tensors are where the graphs leave their hidden states."""
        self._model, self._pool, self._captured = model, pool, captured

    def launch(self, pack: Pack) -> torch.Tensor | None:
        """Features [len(pack.reads), features] of the model in use; None if no graph holds the pack."""
        for step, graph, hidden in self._captured:
            if len(pack.input_ids) <= step.num_rows:
                if not step.fill(pack):
                    return None
                graph.replay()
                count = len(pack.input_ids) if self._model.takes_mean else len(pack.reads)
                return self._model.features_of(hidden[:count], pack, self._pool)
        return None


def capture(model: RewardModel, pool: KVPool, spare_block: int) -> Graphs | None:
    """None, with a warning, where this model cannot be captured: it runs all the same, kernel by kernel."""
    started = time.perf_counter()
    captured, memory = [], torch.cuda.graph_pool_handle()
    try:
        for num_rows in reversed(BUCKETS):  # the largest first: the others find room in its memory
            step = StaticStep(model, pool, num_rows, spare_block)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    step.compute()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory):
                hidden = step.compute()
            captured.append((step, graph, hidden))
    except Exception as error:
        log.warning(
            "small forwards are not captured as CUDA graphs: %s", f"{type(error).__name__}: {error}".splitlines()[0]
        )
        return None
    log.info("CUDA graphs for up to %d tokens captured in %.1f s", BUCKETS[-1], time.perf_counter() - started)
    return Graphs(model, pool, captured[::-1])
