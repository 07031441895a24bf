"""Linear layers built for this CPU give the exact sums but for fp32, row by row, and find the MLPs they may replace."""

import pytest
import torch
import torch.nn.functional as F
from built import why_not
from rewardserve_kernels.linear import avx512
from rewardserve_kernels.linear.avx512 import Avx512GatedMLP, Avx512Linear, can_replace, gated_mlp
from torch import nn
from transformers import GemmaConfig, GraniteConfig, Qwen3Config
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.granite.modeling_granite import GraniteMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

missing = why_not(avx512.load)

pytestmark = pytest.mark.skipif(bool(missing), reason=missing)

SIZES = [(2, 1), (6, 63), (64, 64), (66, 65), (768, 200), (3104, 130), (4098, 130), (9000, 96)]  # (inner, columns)
SUM_ERROR = 2e-7  # of fp32 sums of products with a standard deviation of 1 in all, by the root of their number
ROUNDING = 2**-8  # to bf16: half of what its last bit is worth, at most


@pytest.fixture(autouse=True)
def _the_same_numbers() -> None:
    torch.manual_seed(0)


def linear(inner: int, columns: int, bias: bool = False) -> nn.Linear:
    """With sums of a standard deviation of about 1."""
    layer = nn.Linear(inner, columns, bias=bias)
    nn.init.normal_(layer.weight, std=inner**-0.5)
    return layer.bfloat16().requires_grad_(False)


@pytest.mark.parametrize(("inner", "columns"), SIZES)
@pytest.mark.parametrize("num_rows", [1, 5, 6, 25, 131])
@pytest.mark.parametrize("bias", [False, True])
def test_sums_are_those_of_fp64_but_for_rounding_to_fp32(inner: int, columns: int, num_rows: int, bias: bool) -> None:
    layer, x = linear(inner, columns, bias), torch.randn(num_rows, inner).bfloat16()
    got = Avx512Linear(layer)(x)
    assert got.dtype == torch.float32
    assert (got - layer.double()(x.double())).abs().max() < SUM_ERROR * inner**0.5


@pytest.mark.parametrize(("inner", "columns"), SIZES)
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_gated_products_are_rounded_once(inner: int, columns: int, act: str) -> None:
    parts = linear(inner, columns), linear(inner, columns)
    mlp = Avx512GatedMLP(*parts, linear(2, 2), avx512.SILU if act == "silu" else avx512.GELU_TANH)
    x = 3 * torch.randn(29, inner).bfloat16()
    got = torch.ops.rewardserve.linear(x, mlp.weight, None, columns, mlp._kind)
    gate, up = (part.double()(x.double()) for part in parts)
    wanted = (F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")) * up
    assert got.dtype == torch.bfloat16
    assert ((got - wanted).abs() <= wanted.abs() * ROUNDING * 1.01 + 1e-5).all()


def test_an_activation_far_from_zero_is_what_it_tends_to() -> None:
    identity = nn.Linear(2, 2, bias=False).bfloat16().requires_grad_(False)
    identity.weight.copy_(torch.eye(2))
    ones = nn.Linear(2, 2, bias=False).bfloat16().requires_grad_(False)
    ones.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    x = torch.tensor([[-1e30, 1.0], [-200.0, 1.0], [1e30, 1.0], [float("nan"), 1.0]])
    for kind in (avx512.SILU, avx512.GELU_TANH):
        mlp = Avx512GatedMLP(identity, ones, identity, kind)
        got = mlp(x)[:, 0]
        assert got[0] == got[1] == 0
        assert got[2] == torch.tensor(1e30).bfloat16()
        assert got[3].isnan()


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("inner", [4500, 4512], ids=["one by one", "a multiple of 32, for matrix units"])
def test_a_row_has_the_same_bits_alone_and_among_others_with_any_number_of_threads(
    inner: int, num_threads: int
) -> None:
    """700 rows of 2,048 columns are streamed past the caches, few are not."""
    layer, x = Avx512Linear(linear(inner, 2048, bias=True)), torch.randn(700, inner).bfloat16()
    parts, y = (linear(64, 3072), linear(64, 3072), linear(3072, 64)), torch.randn(700, 64).bfloat16()
    mlps = [Avx512GatedMLP(*parts, kind) for kind in (avx512.SILU, avx512.GELU_TANH)]
    wanted, before = [layer(x), *(mlp(y) for mlp in mlps)], torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for first, last in ((0, 1), (3, 5), (7, 10), (9, 13), (3, 8), (250, 431), (0, 700)):
            got = [layer(x[first:last]), *(mlp(y[first:last]) for mlp in mlps)]
            assert all(torch.equal(own, all_rows[first:last]) for own, all_rows in zip(got, wanted, strict=True))
    finally:
        torch.set_num_threads(before)


def test_rows_may_lie_apart_and_in_any_precision() -> None:
    layer, wide = Avx512Linear(linear(64, 32)), torch.randn(2, 9, 128)
    wanted = layer(wide[..., 32:96].contiguous())
    assert torch.equal(layer(wide[..., 32:96]), wanted)
    assert torch.equal(layer(wide.bfloat16()[..., 32:96]), wanted)
    assert torch.equal(layer(wide.transpose(1, 2).contiguous().transpose(1, 2)[..., 32:96]), wanted)
    assert layer(wide[:, :0, :64]).shape == (2, 0, 32)
    with pytest.raises(ValueError, match="takes 64 inputs in bfloat16, not 128"):
        layer(wide)


@pytest.mark.parametrize("bias", [False, True])
def test_refilled_layers_are_those_of_the_new_weights(bias: bool) -> None:
    old, new, x = linear(64, 100, bias), linear(64, 100, bias), torch.randn(7, 64)
    layer = Avx512Linear(old)
    layer.refill(new.weight.float(), new.bias)
    assert torch.equal(layer(x), Avx512Linear(new)(x))

    config = Qwen3Config(hidden_size=64, intermediate_size=100)
    before, after = (Qwen3MLP(config).bfloat16().requires_grad_(False) for _ in range(2))
    mlp, wanted = gated_mlp(before), gated_mlp(after)
    assert mlp is not None and wanted is not None
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(mlp, name).refill(getattr(after, name).weight, None)
    assert torch.equal(mlp(x), wanted(x))


@pytest.mark.parametrize(
    "mlp",
    [
        Qwen3MLP(Qwen3Config(hidden_size=64, intermediate_size=128)),
        GemmaMLP(GemmaConfig(hidden_size=64, intermediate_size=128, hidden_act="gelu_pytorch_tanh")),
        GraniteMLP(GraniteConfig(hidden_size=64, intermediate_size=128)),
    ],
    ids=lambda mlp: type(mlp).__name__,
)
def test_gated_mlps_of_transformers_are_recognized(mlp: nn.Module) -> None:
    mlp = mlp.bfloat16().requires_grad_(False)
    x, built = torch.randn(5, 64).bfloat16(), gated_mlp(mlp)
    assert built is not None
    torch.testing.assert_close(built(x), mlp.double()(x.double()).float(), rtol=0.02, atol=2e-3)


class _Scaled(Qwen3MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x) * 1.1) * self.up_proj(x))


class _Clamped(Qwen3MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=16) * self.up_proj(x).clamp(-16, 16))


class _WithItsOwnScale(Qwen3MLP):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


def test_mlps_that_do_something_else_are_left_alone() -> None:
    config = Qwen3Config(hidden_size=64, intermediate_size=128)
    scaled, clamped, with_its_own = (kind(config).bfloat16() for kind in (_Scaled, _Clamped, _WithItsOwnScale))
    silent, in_fp32 = Qwen3MLP(config).bfloat16(), Qwen3MLP(config)
    nn.init.zeros_(silent.down_proj.weight)  # whatever its activation is
    other = Qwen3MLP(Qwen3Config(hidden_size=64, intermediate_size=128, hidden_act="relu")).bfloat16()
    biased, more = Qwen3MLP(config).bfloat16(), Qwen3MLP(config).bfloat16()
    biased.gate_proj = linear(64, 128, bias=True)
    more.norm = nn.LayerNorm(64)
    for mlp in (scaled, clamped, with_its_own, silent, in_fp32, other, biased, more, nn.Linear(2, 2)):
        assert gated_mlp(mlp) is None
    assert not can_replace(linear(63, 64)), "pairs"
    assert not can_replace(nn.Linear(64, 64)), "fp32"
