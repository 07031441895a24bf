"""Heads: final hidden states in, features out. All in fp32; a row's features do not depend on those beside it."""

from collections.abc import Sequence
from typing import Protocol

import torch
from rewardserve_kernels.pooling.reference import linear_head
from torch import nn

ROWS_AT_ONCE = 16  # always as many, so that products take the same path however many rows there are


class Head(Protocol):
    num_features: int

    @property
    def num_parameters(self) -> int: ...

    def to(self, device: torch.device) -> "Head": ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its weights, by name."""

    def copy_from(self, other: "Head") -> None:
        """Takes over the weights of one with the same shapes, in place."""

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """states [rows, hidden_size] -> features [rows, num_features] fp32."""


class LinearHead:
    """One product; rows of a language model's head are one too."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """weight [features, hidden_size], bias [features]."""
        self.weight = weight.float()
        self.bias = None if bias is None else bias.float()
        self.num_features = len(weight)

    @property
    def num_parameters(self) -> int:
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())

    def to(self, device: torch.device) -> "LinearHead":
        return LinearHead(self.weight.to(device), None if self.bias is None else self.bias.to(device))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        parts = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        return {name: tuple(tensor.shape) for name, tensor in parts.items()}

    def copy_from(self, other: "Head") -> None:
        assert isinstance(other, LinearHead)
        self.weight.copy_(other.weight)
        if self.bias is not None and other.bias is not None:
            self.bias.copy_(other.bias)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        return linear_head(states, self.weight, self.bias)


class ModuleHead:
    """Whatever layers a head is made of."""

    def __init__(self, module: nn.Module, num_features: int) -> None:
        """`module` takes [rows, hidden_size] fp32 to [rows, num_features]; it mixes no rows."""
        self._module = module.float().eval().requires_grad_(False)
        self.num_features = num_features

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self._module.parameters())

    def to(self, device: torch.device) -> "ModuleHead":
        self._module.to(device)
        return self

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._module.state_dict().items()}

    def copy_from(self, other: "Head") -> None:
        assert isinstance(other, ModuleHead)
        self._module.load_state_dict(other._module.state_dict())

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        rows = len(states)
        padded = nn.functional.pad(states.float(), (0, 0, 0, -rows % ROWS_AT_ONCE))
        parts = [self._module(part) for part in padded.split(ROWS_AT_ONCE)] if rows else []
        return torch.cat(parts)[:rows] if parts else states.new_zeros(0, self.num_features, dtype=torch.float32)


class OddsOf(nn.Module):
    """Logits [rows, n] -> the probability [rows, 1] of one of them by softmax over all."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self._index = index

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(-1)[:, self._index, None]


class Softcap(nn.Module):
    """Logits of any size -> within (-cap, cap)."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self._cap = cap

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.tanh(logits / self._cap) * self._cap


class GatedHead(nn.Module):
    """Rewards of every objective, and the weights a gate would give them: read at two positions, both made for each.

    The rewards are mixed by the gate after a linear transform; that is put into the gate: r T g = r (T g).
    """

    def __init__(
        self,
        regression: nn.Linear,
        gate: nn.Sequential,
        scale: torch.Tensor,
        temperature: float,
        transform: torch.Tensor,
    ) -> None:
        """regression hidden_size -> objectives * quantiles; gate hidden_size -> objectives; transform [n, n]."""
        super().__init__()
        self._regression, self._gate, self._temperature = regression, gate, temperature
        self._scale = nn.Parameter(scale)
        self._transform = nn.Parameter(transform)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        gate = (self._gate(states) / self._temperature).softmax(-1) * self._scale
        return torch.cat([self._regression(states), gate @ self._transform.T], -1)


class WeightedMeansHead(nn.Module):
    """Pairs of mean and deviation for each attribute, and weights from the same state (URM): the weighted means.

    The deviations are not answered: the authors' code leaves them out of the score, and whether they are deviations as
    they stand or logarithms of them is not said where the model is published.
    """

    def __init__(self, pairs: nn.Linear, weights: nn.Sequential) -> None:
        super().__init__()
        self._pairs, self._weights = pairs, weights

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        means = self._pairs(states).unflatten(-1, (-1, 2))[..., 0]
        return torch.cat([(means * self._weights(states)).sum(-1, keepdim=True), means], -1)


def linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.float())
    if bias is not None:
        layer.bias = nn.Parameter(bias.float())
    return layer


def batch_norm(tensors: dict[str, torch.Tensor], eps: float = 1e-5) -> nn.BatchNorm1d:
    """`tensors` by what torch.nn.BatchNorm1d calls them."""
    layer = nn.BatchNorm1d(len(tensors["running_mean"]), eps=eps)
    layer.load_state_dict(tensors)
    return layer


def mlp(linears: Sequence[nn.Linear], activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for layer in linears:
        layers += [activation(), layer] if layers else [layer]
    return nn.Sequential(*layers)
