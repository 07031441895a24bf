"""Many small arrays to a device in one copy."""

import numpy as np
import torch


class Upload:
    """int32 arrays are added; `ship` lays them end to end and sends them off; then each is a tensor on the device.

    On a GPU every copy has a price of its own, ten microseconds or so, and only one from pinned memory lets the host go
    on. Where the device is a CPU nothing is copied twice.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._tensors: tuple[torch.Tensor, ...] = ()

    def add(self, array: np.ndarray) -> int:
        """`array` [n] int32 -> its number."""
        assert array.dtype == np.int32 and array.ndim == 1 and not self._tensors
        self._arrays.append(array)
        return len(self._arrays) - 1

    def ship(self, device: torch.device) -> None:
        """Once, after the last `add`. The copy may be under way when it returns; work queued after it waits for it."""
        whole = torch.from_numpy(np.concatenate(self._arrays))
        if device.type == "cuda":
            whole = whole.pin_memory().to(device, non_blocking=True)
        self._tensors = whole.split([len(array) for array in self._arrays])

    def __getitem__(self, number: int) -> torch.Tensor:
        """[n] int32 on the device."""
        return self._tensors[number]
