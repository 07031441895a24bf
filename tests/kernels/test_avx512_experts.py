"""A mixture's experts built for this CPU give the exact sums but for rounding, each token by itself."""

import copy

import pytest
import torch
import torch.nn.functional as F
from built import why_not
from rewardserve_kernels.linear import avx512
from rewardserve_kernels.linear.experts import Avx512Experts, experts
from torch import nn
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

missing = why_not(avx512.load)

pytestmark = pytest.mark.skipif(bool(missing), reason=missing)

NUM_EXPERTS, CHOSEN = 5, 3
SIZES = [(64, 32), (66, 30), (96, 200), (130, 64)]  # (hidden, intermediate): on matrix units and not


@pytest.fixture(autouse=True)
def _the_same_numbers() -> None:
    torch.manual_seed(0)


def weights(hidden: int, intermediate: int) -> tuple[torch.Tensor, torch.Tensor]:
    """With sums of a standard deviation of about 1."""
    gate_up = torch.randn(NUM_EXPERTS, 2 * intermediate, hidden) * hidden**-0.5
    return gate_up.bfloat16(), (torch.randn(NUM_EXPERTS, hidden, intermediate) * intermediate**-0.5).bfloat16()


def routed(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nobody chooses the last expert but the last token."""
    index = torch.stack([torch.randperm(NUM_EXPERTS - 1)[:CHOSEN] for _ in range(num_tokens)])
    index[-1, 0] = NUM_EXPERTS - 1
    return index, torch.rand(num_tokens, CHOSEN)


@pytest.mark.parametrize(("hidden", "intermediate"), SIZES)
@pytest.mark.parametrize("num_tokens", [1, 7, 150])
def test_a_token_is_the_weighted_sum_of_its_experts(hidden: int, intermediate: int, num_tokens: int) -> None:
    gate_up, down = weights(hidden, intermediate)
    x, (index, scale) = torch.randn(num_tokens, hidden).bfloat16(), routed(num_tokens)
    got = Avx512Experts(gate_up, down, avx512.SILU)(x, index, scale)
    wanted = torch.zeros(num_tokens, hidden, dtype=torch.float64)
    for token in range(num_tokens):
        for expert, weight in zip(index[token].tolist(), scale[token].tolist(), strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            factors = (F.silu(gate) * up).bfloat16().double()  # all that is rounded to 16 bits
            wanted[token] += weight * (down[expert].double() @ factors)
    assert got.dtype == torch.float32
    # A factor whose exact value is halfway between two of bf16 may go the other way.
    assert (got - wanted).abs().max() < 2e-2 and (got - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize(("hidden", "intermediate"), SIZES)
def test_a_token_has_the_same_bits_alone_and_among_others(hidden: int, intermediate: int) -> None:
    layer = Avx512Experts(*weights(hidden, intermediate), avx512.GELU_TANH)
    x, (index, scale) = torch.randn(40, hidden), routed(40)
    together = layer(x, index, scale)
    for token in (0, 17, 39):
        alone = slice(token, token + 1)
        assert torch.equal(layer(x[alone], index[alone], scale[alone])[0], together[token])
    other_way = layer(x.flip(0), index.flip(0, 1), scale.flip(0, 1))
    assert torch.equal(other_way.flip(0), together), "the order in which a token names its experts"


def test_an_expert_that_a_token_names_twice_counts_twice() -> None:
    layer = Avx512Experts(*weights(64, 32), avx512.SILU)
    x, (index, scale) = torch.randn(40, 64), routed(40)
    index[::3, 1] = index[::3, 0]
    once = scale.clone()
    once[::3, 0], once[::3, 1] = scale[::3, 0] + scale[::3, 1], 0
    other = index.where(once > 0, NUM_EXPERTS - 1)  # which nobody names but the last token
    got, wanted = layer(x, index, scale), layer(x, other, once)
    assert (got - wanted).abs().max() < 1e-5


def test_refilled_experts_are_those_of_the_new_weights() -> None:
    old, new = weights(64, 32), weights(64, 32)
    layer, wanted = (Avx512Experts(*each, avx512.SILU) for each in (old, new))
    x, (index, scale) = torch.randn(9, 64), routed(9)
    layer.refill(gate_up_proj=new[0], down_proj=new[1])
    assert torch.equal(layer(x, index, scale), wanted(x, index, scale))


SMALL = {"hidden_size": 64, "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": CHOSEN}


def made(kind: type[nn.Module], config, implementation: str = "eager") -> nn.Module:
    config._experts_implementation = implementation
    module = kind(config).bfloat16().requires_grad_(False)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


def of_qwen() -> nn.Module:
    return made(Qwen3MoeExperts, Qwen3MoeConfig(**SMALL, num_experts=NUM_EXPERTS, moe_intermediate_size=32))


def test_experts_of_transformers_are_recognized_and_give_the_same_but_for_rounding() -> None:
    for module in (of_qwen(), made(MixtralExperts, MixtralConfig(**SMALL, intermediate_size=32))):
        ours = experts(module)
        assert ours is not None
        x, (index, scale) = torch.randn(20, 64).bfloat16(), routed(20)
        wanted = copy.deepcopy(module).float()(x.float(), index, scale)
        assert (ours(x, index, scale) - wanted).norm() < 5e-3 * wanted.norm()


def test_experts_that_do_something_else_are_left_alone() -> None:
    assert experts(made(GptOssExperts, GptOssConfig(**SMALL, intermediate_size=32))) is None  # biases, clamped factors
    scaled = of_qwen()
    scaled._apply_gate = lambda factors: 2 * F.silu(factors[:, :32]) * factors[:, 32:]
    with_a_scale, in_fp32 = of_qwen(), of_qwen().float()
    with_a_scale.scale = nn.Parameter(torch.ones(1))
    for module in (scaled, with_a_scale, in_fp32, nn.Linear(2, 2).bfloat16()):
        assert experts(module) is None
