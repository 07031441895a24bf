"""A weight laid out ahead of time gives a row the same bits whatever is beside it: those of the plain product, where
that does as much."""

import pytest
import torch
from rewardserve_kernels.cpu_code import cpu_flags
from rewardserve_kernels.linear.prepacked import PrepackedLinear, can_prepack
from torch import nn

pytestmark = pytest.mark.skipif(
    not can_prepack(nn.Linear(8, 8).bfloat16()), reason="this CPU has no bf16 matrix products in oneDNN"
)


@pytest.mark.parametrize(("inner", "outer"), [(64, 128), (768, 2304), (3072, 1024)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_rows_product_does_not_depend_on_the_rows_beside_it(inner: int, outer: int, bias: bool) -> None:
    """At every number of rows but one."""
    torch.manual_seed(0)
    linear = nn.Linear(inner, outer, bias=bias).bfloat16()
    packed = PrepackedLinear(linear, 512)
    x = torch.randn(1, 700, inner).bfloat16()
    with torch.inference_mode():
        wanted = packed(x)
        assert torch.allclose(wanted, linear(x), rtol=2e-2, atol=2e-2)
        for num_rows in (2, 3, 17, 64, 127, 512, 700):
            assert torch.equal(packed(x[:, :num_rows]), wanted[:, :num_rows])
            assert torch.equal(packed(x[:, -num_rows:]), wanted[:, -num_rows:])
        if "amx_bf16" not in cpu_flags():
            assert torch.equal(wanted, linear(x))
