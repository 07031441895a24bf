"""BatchPlan -> Pack: the only place where the tensors of a forward are assembled."""

import numpy as np
import torch
from rewardserve_kernels.ragged import Segment

from rewardserve.engine.native.sequence import BatchPlan
from rewardserve.models.backbone import Pack


def build_pack(plan: BatchPlan, device: torch.device) -> Pack:
    """Lays the plan's chunks end to end. One copy to the device for each tensor, none back."""
    segments, pooled, pooled_rows = [], [], []
    row = 0
    for index, chunk in enumerate(plan.chunks):
        num_rows = chunk.stop - chunk.start
        segments.append(Segment(row, num_rows, chunk.start, chunk.blocks, chunk.store))
        row += num_rows
        if chunk.scored:
            pooled.append(index)
            pooled_rows.append(row - 1)
    input_ids = np.frombuffer(b"".join(chunk.tokens for chunk in plan.chunks), "<i4").astype(np.int64)
    positions = np.concatenate([np.arange(chunk.start, chunk.stop) for chunk in plan.chunks])
    return Pack(
        _to(input_ids, device),
        _to(positions, device),
        tuple(segments),
        tuple(pooled),
        _to(np.array(pooled_rows, dtype=np.int64), device),
    )


def build_rows(plan: BatchPlan) -> list[torch.Tensor]:
    """The plan's scored sequences, each whole, for the padded path."""
    return [torch.from_numpy(np.frombuffer(chunk.tokens, "<i4").astype(np.int64)) for chunk in plan.chunks]


def _to(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
