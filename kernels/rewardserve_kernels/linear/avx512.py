"""Linear layers for CPUs with bf16 dot products: avx512.cpp, built at first use.

As fast as oneDNN's product of bf16 (Zen 5, two cores: 0.96 to 1.05 x at the shapes of a 100M and a 0.6B model, with the
sums of a gated MLP multiplied before they leave 1.0 to 1.14 x, and no pass over them afterwards), and closer: sums are
fp32, where the library gives them in bf16 whatever is done with them next. A row's bits do not depend on other rows.

On matrix units (AMX) likewise, for inputs that are a multiple of 32: a Xeon of two cores, 512 to 4,096 rows at the
shapes of models from 100M to 4B, 0.8 to 1.6 x oneDNN's (1.7 to 2.4 TFLOP/s, where dot products reach 0.13), gated ones
1.0 to 1.9 x. How oneDNN cuts a sum there depends on the number of rows, and so do a row's bits.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from rewardserve_kernels import cpu_code

NEEDED = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_bf16"})
PANEL = 64  # columns; as in avx512.cpp
HALF = PANEL // 2
FP32, SILU, GELU_TANH, ADD = range(4)  # `Kind` of avx512.cpp
TRIED_SIZES = (1.0, 1e2, 1e4)
ACTIVATIONS = {SILU: F.silu, GELU_TANH: functools.partial(F.gelu, approximate="tanh")}


class _Product(ctypes.Structure):
    """`Product` of avx512.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "inner", "columns", "x_row")),
        *((name, ctypes.c_void_p) for name in ("to", "scale")),
        ("kind", ctypes.c_int32),
    )


def load() -> None:
    """Builds it if need be. Raises cpu_code.CannotBuild where it cannot run here."""
    _library()


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpu_code.load(Path(__file__).with_suffix(".cpp"), NEEDED)
    library.linear.argtypes, library.linear.restype = [ctypes.c_void_p, ctypes.c_int32], None
    library.uses_tiles.argtypes, library.uses_tiles.restype = [ctypes.c_int64], ctypes.c_int32
    return library


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, columns: int, kind: int) -> torch.Tensor:
    """Raises ValueError for anything but bf16, and as many inputs as the weight has."""
    if x.dtype != torch.bfloat16 or x.shape[-1] != 2 * weight.shape[1]:
        raise ValueError(f"it takes {2 * weight.shape[1]} inputs in bfloat16, not {x.shape[-1]} in {x.dtype}")
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = x.new_empty(*x.shape[:-1], columns, dtype=torch.float32 if kind == FP32 else torch.bfloat16)
    multiply(x.flatten(0, -2), weight, bias, out, kind)
    return out


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    kind: int,
    to: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> None:
    """x [rows, inner] in bf16 times a weight that is laid out, into `out` [rows, columns].

    ADD instead adds sums to the rows `to` [rows] of out, which are in fp32, each times its `scale` [rows] in fp32. It
    names no row twice. Nothing of this is checked.
    """
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (x, weight, bias, out))
    others = (None if tensor is None else tensor.data_ptr() for tensor in (to, scale))
    product = _Product(*pointers, *x.shape, out.shape[-1], x.stride(0), *others, kind)
    _library().linear(ctypes.byref(product), torch.get_num_threads())


_operators = torch.library.Library("rewardserve", "FRAGMENT")
_operators.define("linear(Tensor x, Tensor weight, Tensor? bias, int columns, int kind) -> Tensor")
_operators.impl("linear", _linear, "CPU")


@torch.library.register_fake("rewardserve::linear", lib=_operators)
def _linear_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, columns: int, kind: int
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], columns, dtype=torch.float32 if kind == FP32 else torch.bfloat16)


def can_replace(linear: nn.Module) -> bool:
    """Whether it is one that Avx512Linear can take the place of, given that `load` works."""
    return (
        type(linear) is nn.Linear
        and linear.weight.dtype == torch.bfloat16
        and linear.weight.device.type == "cpu"
        and linear.in_features % 2 == 0
    )


class Avx512Linear(nn.Module):
    """Takes the place of an nn.Linear in bf16 on a CPU, for inference: it has no parameters. Gives fp32."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", lay_out(linear.weight.detach()))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def refill(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Another weight [out_features, in_features] and bias, of the same shapes, from here on."""
        self.weight.copy_(lay_out(weight))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] in any precision -> [..., out_features] in fp32."""
        x = x.to(torch.bfloat16)  # here, where torch.compile sees it and makes it part of what came before
        return torch.ops.rewardserve.linear(x, self.weight, self.bias, self.out_features, FP32)


class Avx512GatedMLP(nn.Module):
    """Takes the place of a gated MLP, down(act(gate(x)) * up(x)): the factors are multiplied where they are computed.

    Its children bear the names of what they replace, for whoever looks for the weights of a checkpoint's key.
    """

    weight: torch.Tensor

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, kind: int) -> None:
        """`kind` is SILU or GELU_TANH."""
        super().__init__()
        self.intermediate_size, self._kind = gate.out_features, kind
        self.register_buffer("weight", lay_out_both(gate.weight.detach(), up.weight.detach()))
        self.gate_proj, self.up_proj = _Half(self, 0), _Half(self, 1)
        self.down_proj = Avx512Linear(down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden_size] in any precision -> the same in fp32."""
        x = x.to(torch.bfloat16)
        return self.down_proj(torch.ops.rewardserve.linear(x, self.weight, None, self.intermediate_size, self._kind))


class _Half(nn.Module):
    """The gate's or the other factor's columns in each panel of a gated MLP."""

    def __init__(self, mlp: Avx512GatedMLP, number: int) -> None:
        super().__init__()
        self._mlp = (mlp,)  # in a tuple: it is no child of its child
        self._number = number

    def refill(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """As Avx512Linear's; there is no bias."""
        _halves(self._mlp[0].weight, weight.shape[1])[self._number].copy_(_panels(weight, HALF))


def gated_mlp(module: nn.Module) -> Avx512GatedMLP | None:
    """What takes the place of `module`, where that is a gated MLP in bf16 that does nothing else besides; else None.

    Told by the names of its parts, as the decoders of transformers have them, and by trying what it computes: some of
    that build scale their factors, or clamp them where they are large.
    """
    parts = dict(module.named_children())
    if parts.keys() != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return None
    if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        return None
    gate, up, down = (parts[name] for name in ("gate_proj", "up_proj", "down_proj"))
    if not all(map(can_replace, (gate, up, down))) or gate.bias is not None or up.bias is not None:
        return None
    with torch.inference_mode():
        found = [kind for kind, act in ACTIVATIONS.items() if _computes(module, act, gate, up, down)]
    return Avx512GatedMLP(gate, up, down, found[0]) if len(found) == 1 else None


def _computes(
    module: nn.Module, act: Callable[[torch.Tensor], torch.Tensor], gate: nn.Linear, up: nn.Linear, down: nn.Linear
) -> bool:
    x = torch.linspace(-8, 8, 4 * gate.in_features).roll(7).view(4, -1)
    x = torch.cat([x * size for size in TRIED_SIZES]).to(torch.bfloat16)
    return torch.equal(module(x), down(act(gate(x)) * up(x)))


def lay_out(weight: torch.Tensor) -> torch.Tensor:
    """[columns, inner] as linear wants it: in panels, or on matrix units in pairs of halves."""
    weight = F.pad(weight, (0, 0, 0, -len(weight) % PANEL))
    return _panels(weight, HALF if _library().uses_tiles(weight.shape[1]) else PANEL)


def lay_out_both(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[columns, inner] each, one as the first and one as the second halves of panels."""
    parts = _panels(gate, HALF), _panels(up, HALF)
    return torch.stack(parts, 1).flatten(0, 1) if _library().uses_tiles(gate.shape[1]) else torch.cat(parts, dim=2)


def _halves(weight: torch.Tensor, inner: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each of the two lies in what lay_out_both gives."""
    if _library().uses_tiles(inner):
        return weight[0::2], weight[1::2]
    return weight[:, :, :HALF], weight[:, :, HALF:]


def _panels(weight: torch.Tensor, width: int) -> torch.Tensor:
    """[columns, inner] as [panels, inner / 2, width, 2], in bf16, filled up with columns of zeros."""
    weight = F.pad(weight.to(torch.bfloat16), (0, 0, 0, -len(weight) % width))
    return weight.view(-1, width, weight.shape[1] // 2, 2).transpose(1, 2).contiguous()
