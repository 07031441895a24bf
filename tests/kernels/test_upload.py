"""Arrays sent in one copy are what they were: their order, kinds and shapes."""

import numpy as np
import torch
from rewardserve_kernels.upload import Upload


def test_arrays_of_any_length_and_width_come_out_as_they_went_in() -> None:
    rng = np.random.default_rng(0)
    shapes = [(3,), (0,), (2, 5), (1,), (0, 4), (7,), (3, 0), (1, 1)]
    arrays = [rng.integers(-(2**30), 2**30, shape, kind) for shape in shapes for kind in (np.int32, np.int64)]
    arrays.append(np.arange(12, dtype=np.int64).reshape(3, 4).T)  # not in one piece
    upload = Upload()
    numbers = [upload.add(array) for array in arrays]
    upload.ship(torch.device("cpu"))
    for number, array in zip(numbers, arrays, strict=True):
        assert torch.equal(upload[number], torch.from_numpy(array.copy())), array.shape
        assert upload[number].dtype == torch.from_numpy(array.copy()).dtype


def test_nothing_at_all_is_sent_as_well() -> None:
    upload = Upload()
    number = upload.add(np.zeros(0, np.int32))
    upload.ship(torch.device("cpu"))
    assert upload[number].shape == (0,)
