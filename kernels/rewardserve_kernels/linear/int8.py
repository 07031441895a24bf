"""Linear layers in 8-bit integers on a CPU: weights by output channel, activations by row as they come (W8A8, dynamic).

A row's scale is its own, and sums of integers have no order: a row's result does not depend on the others. The steps
around the product are many and small; torch.compile makes one pass of them, without it this is slower than bf16.
"""

import torch
from torch import nn

LEVELS = 127  # -127 to 127: symmetric
SMALLEST_SCALE = 1e-12  # of a row of zeros


class Int8Linear(nn.Module):
    """Takes the place of an nn.Linear for inference: it has no parameters. Gives bf16."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        quantized, scale = _quantize(linear.weight.detach())
        self.register_buffer("weight", quantized.t())  # [in_features, out_features] int8
        self.register_buffer("weight_scale", scale[:, 0])  # [out_features] fp32
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def refill(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Another weight [out_features, in_features] and bias, of the same shapes, from here on."""
        quantized, scale = _quantize(weight.to(self.weight.device))
        self.weight.copy_(quantized.t())
        self.weight_scale.copy_(scale[:, 0])
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] in any precision -> [..., out_features] in bf16."""
        quantized, scale = _quantize(x)
        sums = torch._int_mm(quantized.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        result = sums.float() * self.weight_scale * scale  # in this order the largest numbers stay finite
        if self.bias is not None:
            result = result + self.bias
        return result.to(torch.bfloat16)


def _quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values of the same shape, and the fp32 scale of each row [..., 1]."""
    rows = rows.float()
    scale = (rows.abs().amax(-1, keepdim=True) / LEVELS).clamp_min(SMALLEST_SCALE)
    return (rows / scale).round().to(torch.int8), scale
