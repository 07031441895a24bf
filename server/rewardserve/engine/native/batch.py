"""BatchPlan -> Pack: the only place where the tensors of a forward are assembled."""

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from rewardserve_kernels.kv_cache.paged import StoreIndex, store_index
from rewardserve_kernels.pooling.running_mean import MeanRows, plan_means
from rewardserve_kernels.ragged import Segment
from rewardserve_kernels.upload import Upload

from rewardserve.engine.native.sequence import BatchPlan
from rewardserve.models.backbone import Backbone, Pack


def build_pack(plan: BatchPlan, backbone: Backbone, for_gpu: bool, takes_mean: bool = False) -> Pack:
    """Lays the plan's chunks end to end. One copy to the device, none back; for a head that `takes_mean`, a few more.

    With `for_gpu` rows are stored in one launch, and how the attention is cut goes along in the copy; on a CPU segments
    are stored one by one, and the thread that computes cuts the attention.
    """
    segments: list[Segment] = []
    reads: list[Segment] = []
    row = 0
    for chunk in plan.chunks:
        num_rows = chunk.stop - chunk.start
        segments.append(Segment(row, num_rows, chunk.start, chunk.blocks, chunk.store))
        for position in chunk.reads:
            reads.append(Segment(row, position + 1 - chunk.start, chunk.start, chunk.blocks, store=False))
        row += num_rows
    upload = Upload()
    input_ids = upload.add(np.frombuffer(b"".join(chunk.tokens for chunk in plan.chunks), "<i4"))
    positions = upload.add(np.concatenate([np.arange(c.start, c.stop, dtype=np.int32) for c in plan.chunks]))
    rows = upload.add(np.array([read.row + read.num_rows - 1 for read in reads], np.int32))
    stored = [upload.add(part) for part in store_index(segments)] if for_gpu else []
    ahead = _PlansAhead(backbone, segments, reads, upload) if for_gpu else None
    upload.ship(backbone.device)
    return Pack(
        upload[input_ids],
        upload[positions],
        tuple(segments),
        tuple(reads),
        upload[rows],
        StoreIndex(*(upload[part] for part in stored)) if stored else None,
        ahead.arrived(upload) if ahead else {},
        _means(plan, segments, backbone.device) if takes_mean else None,
    )


def _means(plan: BatchPlan, segments: Sequence[Segment], device: torch.device) -> MeanRows:
    return plan_means(segments, [i for i, chunk in enumerate(plan.chunks) if chunk.reads], device)


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
