"""Hidden state -> score, as it is trained. What is saved is what serving reads, which knows nothing of dropout."""

import torch
from torch import nn
from torch.nn.functional import dropout

MLP_KEYS = ("score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias")


class LinearHead(nn.Linear):
    """[..., hidden_size] -> [..., 1] fp32, without a bias: Bradley-Terry could not tell which it should be."""

    def __init__(self, hidden_size: int, dropout: float = 0.0) -> None:
        super().__init__(hidden_size, 1, bias=False)
        self.dropout = dropout  # share of the hidden state that is zeroed, in training only
        start(self)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):  # in fp32, as it is served
            return super().forward(dropout(hidden.float(), self.dropout, self.training))


class MlpHead(nn.Sequential):
    """[..., hidden_size] -> [..., 1] fp32: Linear, ReLU, Linear, as wide inside as the hidden state."""

    def __init__(self, hidden_size: int, dropout: float = 0.0) -> None:
        super().__init__(nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, 1))
        self.dropout = dropout  # share of the hidden state that is zeroed, in training only
        start(self[2])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):  # in fp32, as it is served
            return super().forward(dropout(hidden.float(), self.dropout, self.training))


def start(layer: nn.Linear) -> None:
    """Small first scores, of a spread of about 1 where hidden states have one: Huang et al. 2024, arXiv:2403.17031."""
    nn.init.normal_(layer.weight, std=(layer.in_features + 1) ** -0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
