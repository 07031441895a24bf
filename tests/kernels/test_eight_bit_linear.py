"""8-bit linear layers: as near the exact product as eight bits allow, and a row's result is its own."""

import pytest
import torch
from rewardserve_kernels.linear.fp8 import Fp8Linear, can_be_fp8
from rewardserve_kernels.linear.int8 import Int8Linear
from rewardserve_kernels.linear.replace import put_back, replace_linears
from torch import nn

NEAR = {Int8Linear: 0.01, Fp8Linear: 0.05}  # three bits of mantissa
kinds = pytest.mark.parametrize("kind", NEAR)


def layer(inner: int, outer: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inner, outer, bias=bias).bfloat16()


@kinds
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_result_is_near_the_exact_one(kind: type[nn.Module], bias: bool, dtype: torch.dtype) -> None:
    linear = layer(768, 320, bias)
    x = torch.randn(1, 50, 768).to(dtype)
    with torch.inference_mode():
        got, wanted = kind(linear)(x), linear.double()(x.double())
    assert got.dtype is torch.bfloat16
    assert (got.double() - wanted).norm() / wanted.norm() < NEAR[kind]


@kinds
def test_a_row_has_the_same_bits_alone_and_among_others(kind: type[nn.Module]) -> None:
    linear = kind(layer(512, 256))
    x = torch.randn(1, 300, 512).bfloat16()
    x[:, 7] *= 1000  # a row with a scale of its own
    with torch.inference_mode():
        wanted = linear(x)
        for rows in (slice(0, 2), slice(5, 9), slice(100, 117), slice(299, 300)):
            assert torch.equal(linear(x[:, rows]), wanted[:, rows])


@kinds
def test_rows_of_zeros_give_the_bias_and_the_largest_numbers_are_finite(kind: type[nn.Module]) -> None:
    linear = layer(64, 32)
    x = torch.zeros(1, 3, 64).bfloat16()
    x[0, 1] = torch.finfo(torch.bfloat16).max / 64
    with torch.inference_mode():
        got = kind(linear)(x)
    assert torch.equal(got[0, 0], linear.bias) and got.isfinite().all()


def test_sizes_that_a_gpus_product_does_not_take_are_told() -> None:
    assert can_be_fp8(layer(32, 48)) and not can_be_fp8(layer(40, 48)) and not can_be_fp8(layer(32, 44))


def test_only_plain_linears_are_replaced_and_they_can_be_put_back() -> None:
    class Scaled(nn.Linear):
        pass

    module = nn.Sequential(layer(8, 8), nn.LayerNorm(8), nn.Sequential(Scaled(8, 8), nn.Linear(8, 8)))
    first, last = module[0], module[2][1]
    replaced = replace_linears(module, lambda linear: Int8Linear(linear) if linear is not last else None)
    assert replaced == [(module, "0", first)]
    assert isinstance(module[0], Int8Linear) and type(module[2][0]) is Scaled and module[2][1] is last
    put_back(replaced)
    assert module[0] is first
