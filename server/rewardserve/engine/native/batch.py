"""BatchPlan -> Pack: the only place where the tensors of a forward are assembled.

They are laid out on the host first, then sent to the device; what is replayed takes another way there (graphs.py).
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
from rewardserve_kernels.kv_cache.paged import StoreIndex, store_index
from rewardserve_kernels.pooling.running_mean import plan_means
from rewardserve_kernels.ragged import Segment
from rewardserve_kernels.upload import Upload

from rewardserve.engine.native.sequence import BatchPlan
from rewardserve.models.backbone import Backbone
from rewardserve.models.packed_attention import Pack

# Of fewer rows, products and norms take other paths, to other bits: on a CPU products of a single one; on a GPU torch's
# own norms, which share a row among more threads where there are fewer rows than a block holds.
LEAST_ROWS, LEAST_ROWS_ON_GPU = 2, 16


@dataclass(frozen=True, slots=True)
class PackRows:
    """A plan's chunks end to end, on the host."""

    input_ids: np.ndarray  # [rows] int32
    position_ids: np.ndarray  # [rows] int32
    segments: tuple[Segment, ...]
    reads: tuple[Segment, ...]  # for every row that is read, its segment up to it
    read_segments: tuple[int, ...]  # numbers of the segments that are read at all

    @property
    def read_rows(self) -> np.ndarray:
        """[reads] int32: the last row of each."""
        return np.array([read.row + read.num_rows - 1 for read in self.reads], np.int32)


def lay_end_to_end(plan: BatchPlan) -> PackRows:
    segments: list[Segment] = []
    reads: list[Segment] = []
    row = 0
    for chunk in plan.chunks:
        num_rows = chunk.stop - chunk.start
        segments.append(Segment(row, num_rows, chunk.start, chunk.blocks, chunk.store))
        for position in chunk.reads:
            reads.append(Segment(row, position + 1 - chunk.start, chunk.start, chunk.blocks, store=False))
        row += num_rows
    return PackRows(
        np.frombuffer(b"".join(chunk.tokens for chunk in plan.chunks), "<i4"),
        np.concatenate([np.arange(c.start, c.stop, dtype=np.int32) for c in plan.chunks]),
        tuple(segments),
        tuple(reads),
        tuple(i for i, chunk in enumerate(plan.chunks) if chunk.reads),
    )


def _at_least(rows: PackRows, least: int) -> PackRows:
    """With rows of nobody behind them, and the first read over again, up to so many of each; no reads stay none."""
    num_rows, num_reads = len(rows.input_ids), len(rows.reads)
    if num_rows < least:
        nobodys = Segment(num_rows, least - num_rows, 0, (), store=False)
        rows = replace(
            rows,
            input_ids=np.pad(rows.input_ids, (0, least - num_rows)),
            position_ids=np.concatenate([rows.position_ids, np.arange(least - num_rows, dtype=np.int32)]),
            segments=(*rows.segments, nobodys),
        )
    if 0 < num_reads < least:
        rows = replace(rows, reads=rows.reads + rows.reads[:1] * (least - num_reads))
    return rows


def build_pack(rows: PackRows, backbone: Backbone, for_gpu: bool, takes_mean: bool = False) -> Pack:
    """One copy to the device, none back. `takes_mean`: the head does.

    With `for_gpu` rows are stored in one launch, and how the attention is cut goes along in the copy; on a CPU segments
    are stored one by one, and the thread that computes cuts the attention.
    """
    num_reads, rows = len(rows.reads), _at_least(rows, LEAST_ROWS_ON_GPU if for_gpu else LEAST_ROWS)
    upload = Upload()
    input_ids, positions = upload.add(rows.input_ids), upload.add(rows.position_ids)
    read_rows = upload.add(rows.read_rows)
    stored = [upload.add(part) for part in store_index(rows.segments)] if for_gpu else []
    ahead = _PlansAhead(backbone, rows.segments, rows.reads, upload) if for_gpu else None
    means = plan_means(rows.segments, rows.read_segments, upload) if takes_mean else None
    upload.ship(backbone.device)
    return Pack(
        upload[input_ids],
        upload[positions],
        rows.segments,
        rows.reads,
        upload[read_rows],
        StoreIndex(*(upload[part] for part in stored)) if stored else None,
        ahead.arrived(upload) if ahead else {},
        means() if means else None,
        num_reads,
    )


class _PlansAhead:
    """Plans of Triton's attention for every kind of it that the model's forwards met, sent along with the pack."""

    def __init__(
        self, backbone: Backbone, segments: Sequence[Segment], reads: Sequence[Segment], upload: Upload
    ) -> None:
        self._sent: list[tuple[tuple[int, bool], Any, int, int, int]] = []
        if not hasattr(backbone.attention, "rows_per_tile_of"):
            return  # it has no plans that lie on the device
        for key, shape in backbone.attention_shapes.items():
            if key[1] and not reads:
                continue
            plan = backbone.plan_attention(segments, reads, key)
            rows = backbone.attention.rows_per_tile_of(*astuple(shape), backbone.device)
            buffer, num_tiles = plan.lay_out(rows)
            self._sent.append((key, plan, rows, upload.add(buffer), num_tiles))

    def arrived(self, upload: Upload) -> dict[tuple[int, bool], Any]:
        for _, plan, rows, number, num_tiles in self._sent:
            plan.adopt(rows, upload[number], num_tiles)
        return {key: plan for key, plan, *_ in self._sent}


def build_rows(plan: BatchPlan) -> list[torch.Tensor]:
    """The plan's scored sequences, each whole, for the padded path."""
    return [torch.from_numpy(np.frombuffer(chunk.tokens, "<i4").astype(np.int64)) for chunk in plan.chunks]
