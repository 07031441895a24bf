"""Many small arrays to a device in one copy."""

import numpy as np
import torch

ALIGNMENT = 8  # bytes; of the widest integers
KINDS = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}


class Upload:
    """Arrays are added; `ship` lays them end to end and sends them off; then each is a tensor on the device.

    On a GPU every copy is expected to have a price of its own, ten microseconds or so (not measured yet), and only one
    from pinned memory lets the host go on. Where the device is a CPU nothing is copied twice.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._tensors: list[torch.Tensor] = []

    def add(self, array: np.ndarray) -> int:
        """`array`, of int32 or int64 and any shape -> its number."""
        assert array.dtype in KINDS and not self._tensors
        self._arrays.append(np.ascontiguousarray(array))
        return len(self._arrays) - 1

    def ship(self, device: torch.device) -> None:
        """Once, after the last `add`. The copy may be under way when it returns; work queued after it waits for it."""
        ends = np.cumsum([-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in self._arrays]).tolist()
        begins = [0, *ends[:-1]]
        whole = np.empty(max(ends[-1], ALIGNMENT), np.uint8)  # torch has no views of nothing
        for begin, array in zip(begins, self._arrays, strict=True):
            whole[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)
        shipped = torch.from_numpy(whole)
        if device.type == "cuda":
            shipped = shipped.pin_memory().to(device, non_blocking=True)
        self._tensors = [
            shipped[begin : begin + array.nbytes].view(KINDS[array.dtype]).view(array.shape)
            for begin, array in zip(begins, self._arrays, strict=True)
        ]

    def __getitem__(self, number: int) -> torch.Tensor:
        """On the device, as it was added."""
        return self._tensors[number]
