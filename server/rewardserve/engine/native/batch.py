"""BatchPlan -> Pack: the only place where the tensors of a forward are assembled."""

import numpy as np
import torch
from rewardserve_kernels.kv_cache.paged import StoreIndex, store_index
from rewardserve_kernels.ragged import Segment
from rewardserve_kernels.upload import Upload

from rewardserve.engine.native.sequence import BatchPlan
from rewardserve.models.backbone import Pack


def build_pack(plan: BatchPlan, device: torch.device, store_at_once: bool) -> Pack:
    """Lays the plan's chunks end to end. One copy to the device, none back.

    With `store_at_once` rows are stored in one launch, which a GPU wants; a CPU copies segment by segment.
    """
    segments, pooled, pooled_rows = [], [], []
    row = 0
    for index, chunk in enumerate(plan.chunks):
        num_rows = chunk.stop - chunk.start
        segments.append(Segment(row, num_rows, chunk.start, chunk.blocks, chunk.store))
        row += num_rows
        if chunk.scored:
            pooled.append(index)
            pooled_rows.append(row - 1)
    upload = Upload()
    input_ids = upload.add(np.frombuffer(b"".join(chunk.tokens for chunk in plan.chunks), "<i4"))
    positions = upload.add(np.concatenate([np.arange(c.start, c.stop, dtype=np.int32) for c in plan.chunks]))
    rows = upload.add(np.array(pooled_rows, np.int32))
    stored = [upload.add(part) for part in store_index(segments)] if store_at_once else []
    upload.ship(device)
    return Pack(
        upload[input_ids],
        upload[positions],
        tuple(segments),
        tuple(pooled),
        upload[rows],
        StoreIndex(*(upload[part] for part in stored)) if stored else None,
    )


def build_rows(plan: BatchPlan) -> list[torch.Tensor]:
    """The plan's scored sequences, each whole, for the padded path."""
    return [torch.from_numpy(np.frombuffer(chunk.tokens, "<i4").astype(np.int64)) for chunk in plan.chunks]
