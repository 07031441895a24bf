"""A weight laid out ahead of time gives the bits of the plain product, at every number of rows but one."""

import pytest
import torch
from rewardserve_kernels.linear.prepacked import PrepackedLinear, can_prepack
from torch import nn

pytestmark = pytest.mark.skipif(
    not can_prepack(nn.Linear(8, 8).bfloat16()), reason="this CPU has no bf16 matrix products in oneDNN"
)


@pytest.mark.parametrize(("inner", "outer"), [(64, 128), (768, 2304), (3072, 1024)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_bitwise_the_plain_one(inner: int, outer: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inner, outer, bias=bias).bfloat16()
    packed = PrepackedLinear(linear, 512)
    x = torch.randn(1, 700, inner).bfloat16()
    with torch.inference_mode():
        wanted = linear(x)
        for num_rows in (2, 3, 17, 64, 127, 512, 700):
            assert torch.equal(packed(x[:, :num_rows]), wanted[:, :num_rows])
