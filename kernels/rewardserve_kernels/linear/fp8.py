"""Linear layers in 8-bit floats (e4m3): weights scaled by output channel, activations by row as they come.

On GPUs of compute capability 8.9 and later a product is expected to run at up to twice the rate of bf16, which has not
been measured yet (benchmarks/NOTES.md, 10); torch.compile is to make one pass of finding a row's scale and rounding it.
torch's CPU product gives the same numbers, slowly: for trying out. A row's scale is its own, so a row's result does not
depend on the others as far as the product's does not.
"""

import torch
from torch import nn

E4M3_MAX = 448.0  # the largest float8_e4m3fn (arXiv 2209.05433, table 1)
SMALLEST_SCALE = 1e-12  # of a row of zeros
MULTIPLE = 16  # of both sizes, for the GPU's product


class Fp8Linear(nn.Module):
    """Takes the place of an nn.Linear for inference: it has no parameters. Gives bf16."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        quantized, scale = _quantize(linear.weight.detach())
        self.register_buffer("weight", quantized)  # [out_features, in_features] float8_e4m3fn
        self.register_buffer("weight_scale", scale.t())  # [1, out_features] fp32
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def refill(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Another weight [out_features, in_features] and bias, of the same shapes, from here on."""
        quantized, scale = _quantize(weight.to(self.weight.device))
        self.weight.copy_(quantized)
        self.weight_scale.copy_(scale.t())
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] in any precision -> [..., out_features] in bf16."""
        quantized, scale = _quantize(x.flatten(0, -2))
        # The transposed weight is the column-major factor the GPU's product asks for.
        result = torch._scaled_mm(
            quantized, self.weight.t(), scale_a=scale, scale_b=self.weight_scale, out_dtype=torch.bfloat16
        ).unflatten(0, x.shape[:-1])
        return result if self.bias is None else result + self.bias


def can_be_fp8(linear: nn.Linear) -> bool:
    return linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0


def _quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn values of the same shape, and the fp32 scale of each row [rows, 1]."""
    rows = rows.float()
    scale = (rows.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp_min(SMALLEST_SCALE)
    return (rows / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale
