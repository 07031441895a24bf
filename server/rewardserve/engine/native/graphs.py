"""Forwards of few tokens replayed as CUDA graphs: what they cost is launching a thousand kernels, not computing.

A graph computes on tensors that stay where they are, of a size that stays what it is. So a pack's inputs are laid out
as those of the next larger bucket, all in one buffer, and one copy brings them there; what is left of the bucket does
nothing: tiles without rows, rows that nobody reads, stores to a block that belongs to nobody. A graph ends where the
head begins: models over one backbone have heads of their own, and means are of as many rows as there are.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np
import torch
from rewardserve_kernels.kv_cache.paged import StoreIndex, store_index
from rewardserve_kernels.pooling.running_mean import MeanRows, plan_means
from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment
from rewardserve_kernels.upload import Upload

from rewardserve.engine.native.batch import PackRows, build_pack
from rewardserve.errors import OptionsDoNotFit
from rewardserve.models.checkpoint import first_line
from rewardserve.models.kv_pool import KVPool
from rewardserve.models.packed_attention import Pack
from rewardserve.models.reward_model import RewardModel

log = logging.getLogger(__name__)

BUCKETS = (256, 512, 1024, 2048)  # rows
MAX_READS = 128
MAX_SEGMENTS = 256
MAX_TABLE = 16_384  # blocks, of the tables of all plans of a pack: with two plans, a million tokens of prompts
WARM_UPS = 3  # forwards before a capture, as torch asks for: what is set up once must not be captured


class StaticStep:
    """A forward whose inputs lie at fixed places. Needs attention with fixed plans: attention.triton."""

    def __init__(self, model: RewardModel, pool: KVPool, num_rows: int, spare_block: int) -> None:
        """The model must have run once. `spare_block` of the pool is written to and never read."""
        from rewardserve_kernels.attention import triton

        device = model.backbone.device
        self.num_rows = num_rows
        self._model, self._pool, self._spare_block = model, pool, spare_block
        self._rows_per_tile: dict[tuple[int, bool], int] = {}
        max_tiles: dict[tuple[int, bool], int] = {}
        for key, shape in model.backbone.attention_shapes.items():
            self._rows_per_tile[key] = rows = triton.rows_per_tile_of(*astuple(shape), device)
            max_tiles[key] = MAX_READS if key[1] else num_rows // rows + MAX_SEGMENTS
        # In this order, and block tables at the end: what is not in use of those need not be copied.
        sizes = [num_rows, num_rows, MAX_READS, *(num_rows,) * 3, *map(triton.FixedPlan.size_of, max_tiles.values())]
        self._begins = [0, *np.cumsum(sizes).tolist()]
        empty = np.zeros(self._begins[-1] + MAX_TABLE, np.int32)
        empty[self._begins[4] : self._begins[5]] = spare_block
        self.inputs = torch.from_numpy(empty).to(device)
        ids, positions, read_rows, *stored = (
            self.inputs[at : at + n] for at, n in zip(self._begins, sizes[:6], strict=False)
        )
        self._plans = {
            key: triton.FixedPlan(self.inputs[begin:], MAX_READS if key[1] else num_rows, max_tiles[key], key[0])
            for key, begin in zip(max_tiles, self._begins[6:], strict=False)
        }
        reads = (Segment(0, 1, 0, (), store=False),) * MAX_READS  # as many; where they are the plans say
        self._pack = Pack(ids, positions, (), reads, read_rows, StoreIndex(*stored), dict(self._plans))

    def lay_out(self, rows: PackRows) -> np.ndarray | None:
        """The beginning of `inputs` for these rows, [n] int32; None if there is no room for them."""
        if len(rows.input_ids) > self.num_rows or not 0 < len(rows.reads) <= MAX_READS:
            return None
        backbone, table = self._model.backbone, self._begins[-1]
        parts = [rows.input_ids, rows.position_ids, rows.read_rows, *store_index(rows.segments)]
        tables: list[np.ndarray] = []
        try:
            for (key, fixed), begin in zip(self._plans.items(), self._begins[6:], strict=False):
                plan = backbone.plan_attention(rows.segments, rows.reads, key)
                parts.append(fixed.lay_out(plan, self._rows_per_tile[key], table - begin))
                tables.append(plan.blocks)
                table += len(plan.blocks)
        except ValueError:  # more tiles than there is room for
            return None
        if table > len(self.inputs):
            return None
        laid_out = np.zeros(table, np.int32)
        laid_out[self._begins[4] : self._begins[5]] = self._spare_block
        for begin, part in zip(self._begins, [*parts, np.concatenate(tables)], strict=True):
            laid_out[begin : begin + len(part)] = part
        return laid_out

    def compute(self) -> torch.Tensor:
        """Hidden states as of `hidden_packed`, of which as many rows count as were filled in."""
        return self._model.hidden_packed(self._pack, self._pool)


class Replayed(Protocol):
    """torch.cuda.CUDAGraph."""

    def replay(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Captured:
    step: StaticStep
    graph: Replayed
    hidden: torch.Tensor  # where the graph leaves its hidden states


@dataclass(frozen=True, slots=True)
class Replay:
    """One forward of a graph that is to come."""

    captured: Captured
    inputs: torch.Tensor  # [n] int32, the beginning of the step's: on the host, pinned for a GPU, or there already
    count: int  # rows of the hidden states that count
    means: MeanRows | None


class Graphs:
    """A captured step for every bucket."""

    def __init__(self, model: RewardModel, pool: KVPool, captured: Sequence[Captured]) -> None:
        """Smallest first."""
        self._model, self._pool, self._captured = model, pool, captured

    def prepare(self, rows: PackRows) -> Replay | None:
        """None if no graph holds them. May be called while others are launched."""
        captured = next((c for c in self._captured if len(rows.input_ids) <= c.step.num_rows), None)
        if captured is None or (laid_out := captured.step.lay_out(rows)) is None:
            return None
        device = captured.step.inputs.device
        if not self._model.takes_mean:
            inputs = torch.from_numpy(laid_out)
            inputs = inputs.pin_memory() if device.type == "cuda" else inputs
            return Replay(captured, inputs, len(rows.reads), None)
        upload = Upload()  # all in one copy; means are not the graph's: they are as many as there are
        number = upload.add(laid_out)
        means = plan_means(rows.segments, rows.read_segments, upload)
        upload.ship(device)
        return Replay(captured, upload[number], len(rows.input_ids), means())

    def launch(self, replay: Replay) -> torch.Tensor:
        """Features [reads, features] of the model in use."""
        step = replay.captured.step
        step.inputs[: len(replay.inputs)].copy_(replay.inputs, non_blocking=True)  # after all replays before
        replay.captured.graph.replay()
        return self._model.features_of(replay.captured.hidden[: replay.count], replay.means, self._pool)


def capture(model: RewardModel, pool: KVPool, spare_block: int, tolerance: float) -> Graphs | None:
    """None, with a warning, where this model cannot be captured: it runs all the same, kernel by kernel.

    `tolerance`: relative difference to a forward that is not replayed. Blocks 0 and 1 of the pool are written to.
    Raises OptionsDoNotFit where a capture has begun and failed: CUDA's allocator may be left in it, to serve nobody.
    """
    if not hasattr(model.backbone.attention, "rows_per_tile_of"):
        return _not_captured("their attention is not Triton's")
    started = time.perf_counter()
    captured, memory = [], torch.cuda.graph_pool_handle()
    for num_rows in reversed(BUCKETS):  # the largest first: the others find room in its memory
        try:
            step = StaticStep(model, pool, num_rows, spare_block)
            _warm_up(step)
        except Exception as error:
            return _not_captured(first_line(error))
        try:
            captured.append(_captured(step, memory))
        except Exception as error:
            raise OptionsDoNotFit(
                f"its forward cannot be captured as a CUDA graph: {first_line(error)}; start with --no-cuda-graphs"
            ) from error
    for one in captured:
        error = _difference(model, pool, one)
        if not error <= tolerance:
            return _not_captured(f"one of {one.step.num_rows} rows is off by {error:.1e} when it is replayed")
    log.info("CUDA graphs for up to %d tokens captured in %.1f s", BUCKETS[-1], time.perf_counter() - started)
    return Graphs(model, pool, captured[::-1])


def _not_captured(reason: str) -> None:
    log.warning("small forwards are not captured as CUDA graphs: %s", reason)


def _warm_up(step: StaticStep) -> None:
    """Sets up what is set up once. Raises RuntimeError where the forward makes the host wait: a capture would fail of
    it, and that cannot be mended afterwards.
    """
    stream, mode = torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step.compute()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step.compute()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.current_stream().wait_stream(stream)


def _captured(step: StaticStep, memory: tuple[int, int]) -> Captured:
    graph = torch.cuda.CUDAGraph()
    # Around it because torch leaves the capture's own stream as the current one if it fails.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=memory):
        hidden = step.compute()
    return Captured(step, graph, hidden)


def _difference(model: RewardModel, pool: KVPool, captured: Captured) -> float:
    """Relative, of hidden states by a replay to those of the same rows by a forward: the median, as of the canary."""
    rows, graphs = _some_rows(model.backbone.config.vocab_size, captured.step.num_rows), Graphs(model, pool, [captured])
    replay = graphs.prepare(rows)
    assert replay is not None
    graphs.launch(replay)
    got = captured.hidden[: replay.count].float()
    wanted = model.hidden_packed(build_pack(rows, model.backbone, True, model.takes_mean), pool)[: replay.count].float()
    return float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())


def _some_rows(vocab_size: int, most: int) -> PackRows:
    """Past a block's border if no more than `most` of them reach so far. The prompt's lie in blocks 0 and 1."""
    responses = (21, 1, 9)
    length = min(BLOCK_TOKENS + 9, most - sum(responses))
    segments = [Segment(0, length, 0, (0, 1), store=True)]
    for count in responses:
        row = segments[-1].row + segments[-1].num_rows
        segments.append(Segment(row, count, length, (0, 1), store=False))
    return PackRows(
        np.random.default_rng(0).integers(0, vocab_size, length + sum(responses), dtype=np.int32),
        np.concatenate([np.arange(s.start, s.end, dtype=np.int32) for s in segments]),
        tuple(segments),
        tuple(segments[1:]),
        tuple(range(1, len(segments))),
    )
