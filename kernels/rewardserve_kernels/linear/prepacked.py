"""Linear layers whose bf16 weights are laid out for the CPU's products once, instead of on every product.

The product itself is oneDNN's either way. torch.compile does not take a tensor in oneDNN's own layout, so the product
is an opaque operator that is handed a number and looks the weight up.

On matrix units (AMX) oneDNN cuts the inner dimension by how many rows there are, and so a row's bits depend on those
beside it. There the product is always of as many rows: a fifth to a quarter slower on two virtual cores of a Xeon at
2,048 rows (128 at a time; 32: a half), and right. Elsewhere it gives the bits of the plain product.
"""

import itertools
import weakref

import torch
import torch.nn.functional as F
from torch import nn

from rewardserve_kernels.cpu_code import cpu_flags

ROWS_AT_ONCE = 128  # on matrix units

_weights: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
_numbers = itertools.count()


def _linear(x: torch.Tensor, number: torch.Tensor, out_features: int) -> torch.Tensor:
    weight, bias = _weights[int(number)]

    def product(rows: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")

    if not _has_matrix_units():
        return product(x)
    rows = x.flatten(0, -2)
    padded = F.pad(rows, (0, 0, 0, -len(rows) % ROWS_AT_ONCE))
    parts = [product(part) for part in padded.split(ROWS_AT_ONCE)]
    return torch.cat([rows.new_zeros(0, out_features), *parts])[: len(rows)].unflatten(0, x.shape[:-1])


_library = torch.library.Library("rewardserve", "FRAGMENT")
_library.define("prepacked_linear(Tensor x, Tensor number, int out_features) -> Tensor")
_library.impl("prepacked_linear", _linear, "CompositeExplicitAutograd")


@torch.library.register_fake("rewardserve::prepacked_linear", lib=_library)
def _linear_fake(x: torch.Tensor, number: torch.Tensor, out_features: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


class PrepackedLinear(nn.Module):
    """Takes the place of an nn.Linear in bf16 on a CPU, for inference: it has no parameters."""

    def __init__(self, linear: nn.Linear, num_rows: int) -> None:
        """`num_rows` is how many rows to lay the weight out for; others are right too, and nearly as fast."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._num_rows = num_rows
        # A tensor, since torch.compile makes another graph for every value of an int: one for each layer.
        self.register_buffer("number", torch.tensor(next(_numbers)), persistent=False)
        self.refill(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
        weakref.finalize(self, _weights.pop, int(self.number))

    def refill(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Another weight [out_features, in_features] and bias, of the same shapes, from here on."""
        num_rows = ROWS_AT_ONCE if _has_matrix_units() else self._num_rows
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(torch.bfloat16), num_rows)
        _weights[int(self.number)] = (packed, None if bias is None else bias.to(torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] in any precision -> [..., out_features] in bf16."""
        x = x.to(torch.bfloat16)  # here, where torch.compile sees it and makes it part of what came before
        return torch.ops.rewardserve.prepacked_linear(x, self.number, self.out_features)


def _has_matrix_units() -> bool:
    return "amx_bf16" in cpu_flags()


def can_prepack(linear: nn.Linear) -> bool:
    """Whether this CPU has bf16 matrix products in oneDNN, and the layer is one."""
    return (
        linear.weight.dtype == torch.bfloat16
        and linear.weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
