"""What a head computes and what is saved of it."""

import pytest
import torch
from rewardserve.training.heads import MLP_KEYS, LinearHead, MlpHead

HIDDEN = 24


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(5, 7, HIDDEN, generator=torch.Generator().manual_seed(0))


def test_an_mlp_is_linear_relu_linear(hidden):
    head = MlpHead(HIDDEN)
    w0, b0, w2, b2 = (head.state_dict()[key.removeprefix("score.")] for key in MLP_KEYS)
    assert [tuple(w.shape) for w in (w0, b0, w2, b2)] == [(HIDDEN, HIDDEN), (HIDDEN,), (1, HIDDEN), (1,)]
    torch.testing.assert_close(head(hidden), torch.clamp(hidden @ w0.T + b0, min=0) @ w2.T + b2)


def test_a_linear_head_has_one_weight_and_no_bias(hidden):
    head = LinearHead(HIDDEN)
    assert list(head.state_dict()) == ["weight"]
    torch.testing.assert_close(head(hidden)[..., 0], (hidden * head.weight).sum(-1))


@pytest.mark.parametrize("kind", [LinearHead, MlpHead])
def test_dropout_is_of_training_only_and_leaves_the_mean_where_it_was(kind, hidden):
    torch.manual_seed(0)
    head = kind(HIDDEN, dropout=0.5)
    plain = head.eval()(hidden)
    assert torch.equal(plain, head(hidden))
    dropped = torch.stack([head.train()(hidden) for _ in range(2)])
    assert not torch.equal(dropped[0], dropped[1])
    if kind is LinearHead:
        many = torch.stack([head(hidden) for _ in range(4000)]).mean(0)
        torch.testing.assert_close(many, plain, atol=0.15, rtol=0)


@pytest.mark.parametrize("kind", [LinearHead, MlpHead])
def test_a_head_computes_in_fp32_among_products_of_16_bits(kind, hidden):
    head = kind(HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(hidden), head.float()(hidden)) and head(hidden).dtype is torch.float32
    assert torch.equal(head(hidden.bfloat16()), head(hidden.bfloat16().float()))
