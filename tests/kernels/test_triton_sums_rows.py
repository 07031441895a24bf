"""Sums of rows within blocks: the kernel's are plain torch's to the bit, interpreted, on a CPU."""

from collections.abc import Sequence

import pytest
import torch
from rewardserve_kernels.pooling import running_mean
from rewardserve_kernels.pooling.running_mean import MeanRows, plan_means, running_means
from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment
from rewardserve_kernels.upload import Upload

pytest.importorskip("triton", reason="triton is not installed")
from rewardserve_kernels.pooling import triton as kernel

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # numpy on NaN
]
NAN = float("nan")
SIZE = 200  # no power of two, more than one program's columns
SEGMENTS = (
    Segment(0, 1, 0, (5,), store=True),
    Segment(1, BLOCK_TOKENS + 3, BLOCK_TOKENS - 9, (0, 1, 6), store=True),  # goes on in mid-block, and over two more
    Segment(BLOCK_TOKENS + 4, 40, 2 * BLOCK_TOKENS, (0, 1), store=False),
)


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows a stride apart, the last ones of nobody; sums of blocks, those that nothing goes on from NaN."""
    torch.manual_seed(0)
    rows = torch.randn(BLOCK_TOKENS + 60, SIZE + 8).to(dtype)[:, :SIZE]
    rows[BLOCK_TOKENS + 44 :] = NAN
    sums = torch.full((8, SIZE), NAN)
    sums[:2] = torch.randn(2, SIZE)
    return rows, sums


def planned(segments: Sequence[Segment], read: Sequence[int]) -> MeanRows:
    upload = Upload()
    plan = plan_means(segments, read, upload)
    upload.ship(torch.device("cpu"))
    return plan()


@pytest.fixture(autouse=True)
def poisoned_results():
    """What is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_are_summed_as_plain_torch_does(dtype: torch.dtype) -> None:
    plan = planned(SEGMENTS, (0, 2))
    rows, sums = tensors(dtype)
    for pieces in (plan.stored, plan.own):
        got = kernel.sum_pieces(rows, pieces, sums)
        assert len(got) and got.isfinite().all()
        assert torch.equal(got, running_mean.sum_pieces(rows, pieces, sums))


def test_means_and_kept_sums_are_the_same() -> None:
    plan = planned(SEGMENTS, (0, 1, 2))
    (rows, sums), (_, wanted_sums) = tensors(torch.float32), tensors(torch.float32)
    got, wanted = running_means(rows, plan, sums, kernel.sum_pieces), running_means(rows, plan, wanted_sums)
    assert got.isfinite().all() and torch.equal(got, wanted)
    assert torch.equal(sums.nan_to_num(7.0), wanted_sums.nan_to_num(7.0))


def test_no_pieces_have_no_sums() -> None:
    plan = planned((), ())
    rows, sums = tensors(torch.float32)
    assert kernel.sum_pieces(rows, plan.own, sums).shape == (0, SIZE)
