"""8-bit float linear layers: as near the product as three bits of mantissa allow, and a row's result is its own."""

import pytest
import torch
from rewardserve_kernels.linear.fp8 import Fp8Linear, can_be_fp8
from torch import nn


def layer(inner: int, outer: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inner, outer, bias=bias).bfloat16()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_result_is_within_a_twentieth_of_the_exact_one(bias: bool, dtype: torch.dtype) -> None:
    linear = layer(768, 320, bias)
    x = torch.randn(1, 50, 768).to(dtype)
    with torch.inference_mode():
        got, wanted = Fp8Linear(linear)(x), linear.double()(x.double())
    assert got.dtype is torch.bfloat16
    assert (got.double() - wanted).norm() / wanted.norm() < 0.05


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    linear = Fp8Linear(layer(512, 256))
    x = torch.randn(1, 300, 512).bfloat16()
    x[:, 7] *= 1000  # a row with a scale of its own
    with torch.inference_mode():
        wanted = linear(x)
        for rows in (slice(0, 2), slice(5, 9), slice(100, 117), slice(299, 300)):
            assert torch.equal(linear(x[:, rows]), wanted[:, rows])


def test_rows_of_zeros_and_of_the_largest_numbers_are_finite() -> None:
    linear = layer(64, 32)
    x = torch.zeros(1, 3, 64).bfloat16()
    x[0, 1] = torch.finfo(torch.bfloat16).max / 64
    with torch.inference_mode():
        got = Fp8Linear(linear)(x)
    assert torch.equal(got[0, 0], linear.bias) and got.isfinite().all()


def test_sizes_that_the_product_does_not_take_are_told() -> None:
    assert can_be_fp8(layer(32, 48)) and not can_be_fp8(layer(40, 48)) and not can_be_fp8(layer(32, 44))
