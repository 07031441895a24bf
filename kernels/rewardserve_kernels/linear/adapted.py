"""Linear layers that add what one of several low-rank adapters adds: models that differ by it share all else.

x W^T + (x A^T) B^T (Hu et al. 2021, arXiv:2106.09685, section 4.1). Adapters of a lower rank, and models without one at
this layer, are filled up with zeros, which add nothing.
"""

from collections.abc import Sequence

import torch
from torch import nn

LowRank = tuple[torch.Tensor, torch.Tensor]  # A [rank, in_features], B [out_features, rank]


class AdaptedLinear(nn.Module):
    """Takes the place of an nn.Linear, which stays inside and may be replaced there."""

    def __init__(self, linear: nn.Linear, adapters: Sequence[LowRank | None], chosen: torch.Tensor) -> None:
        """`chosen`, [1] int64 on the layer's device, says which of `adapters` is added; one tensor for many layers.

        A tensor, for torch.compile makes another graph for every value of a number.
        """
        super().__init__()
        self.linear = linear
        rank = max(len(pair[0]) for pair in adapters if pair is not None)
        downs = linear.weight.new_zeros(len(adapters), rank, linear.in_features)
        ups = linear.weight.new_zeros(len(adapters), linear.out_features, rank)
        for down, up, pair in zip(downs, ups, adapters, strict=True):
            if pair is not None:
                down[: len(pair[0])] = pair[0]
                up[:, : len(pair[0])] = pair[1]
        self.downs = nn.Parameter(downs, requires_grad=False)
        self.ups = nn.Parameter(ups, requires_grad=False)
        self.register_buffer("chosen", chosen, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]."""
        down, up = self.downs.index_select(0, self.chosen)[0], self.ups.index_select(0, self.chosen)[0]
        added = nn.functional.linear(nn.functional.linear(x.to(down.dtype), down), up)
        own = self.linear(x)
        return own + added.to(own.dtype)
