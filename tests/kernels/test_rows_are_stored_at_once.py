"""Rows of a pack stored at once lie where they lie segment by segment, and nothing else is touched."""

import pytest
import torch
from rewardserve_kernels.kv_cache import paged
from rewardserve_kernels.kv_cache.paged import StoreIndex, store_index, store_segment
from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment

SEGMENTS = (
    Segment(0, 130, 0, (4, 1), store=True),
    Segment(130, 20, 5, (), store=False),
    Segment(150, 300, 70, (5, 0, 2), store=True),
    Segment(450, 1, 255, (3, 6), store=True),
)
NUM_ROWS, NUM_BLOCKS, KV_HEADS = 451, 8, 3


def pools(*sizes: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.full((NUM_BLOCKS, KV_HEADS, BLOCK_TOKENS, size), float("nan"), dtype=dtype) for size in sizes]


def keys_and_values(*sizes: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """As they come out of a layer: heads of a row beside each other."""
    torch.manual_seed(0)
    return [torch.randn(NUM_ROWS, KV_HEADS, size).to(dtype).transpose(0, 1) for size in sizes]


def index(segments=SEGMENTS) -> StoreIndex:
    return StoreIndex(*map(torch.from_numpy, store_index(segments)))


def one_by_one(k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    wanted = pools(k.shape[2], v.shape[2], dtype=k.dtype)
    for segment in SEGMENTS:
        for pool, rows in zip(wanted, (k, v), strict=True):
            if segment.store:
                store_segment(pool, rows[:, segment.row : segment.row + segment.num_rows], segment)
    return wanted


def same(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    """To the bit; what nobody wrote is still NaN."""
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(got, wanted, strict=True))


def test_by_plain_torch() -> None:
    k, v = keys_and_values(5, 3)
    stored = pools(5, 3)
    paged.store_rows(*stored, k, v, index())
    assert same(stored, one_by_one(k, v)) and stored[0].isfinite().sum() == 431 * KV_HEADS * 5


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(64, 64), (80, 24), (5, 3)])
def test_by_the_kernel(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    kernel = pytest.importorskip("rewardserve_kernels.kv_cache.triton", reason="triton is not installed")
    k, v = keys_and_values(*sizes, dtype=dtype)
    wanted = one_by_one(k, v)
    for keys in (k, k.contiguous(), k.transpose(1, 2).contiguous().transpose(1, 2)):  # also by other strides
        stored = pools(*sizes, dtype=dtype)
        kernel.store_rows(*stored, keys, v, index())
        assert same(stored, wanted)


@pytest.mark.interpreted
def test_nothing_to_store_is_nothing_done() -> None:
    kernel = pytest.importorskip("rewardserve_kernels.kv_cache.triton", reason="triton is not installed")
    stored = pools(8, 8)
    kernel.store_rows(*stored, *keys_and_values(8, 8), index(SEGMENTS[1:2]))
    assert same(stored, pools(8, 8))


@pytest.mark.interpreted
def test_another_precision_is_refused() -> None:
    kernel = pytest.importorskip("rewardserve_kernels.kv_cache.triton", reason="triton is not installed")
    with pytest.raises(ValueError, match="in the precision they have"):
        kernel.store_rows(*pools(8, 8, dtype=torch.bfloat16), *keys_and_values(8, 8), index())
