"""Hidden states -> scores in plain torch: the CPU's way, and the oracle for pooling.triton. All arithmetic is fp32."""

from dataclasses import dataclass
from enum import Enum

import torch


class Pooling(Enum):
    """Which rows of a span the heads read."""

    LAST = "last"  # the span's last row
    MEAN = "mean"  # the mean of its rows, each after the final norm


class NormKind(Enum):
    RMS = "rms"  # x / sqrt(mean(x^2) + eps) * weight; Zhang and Sennrich 2019, arXiv:1910.07467, equation 4
    LAYER = "layer"  # (x - mean(x)) / sqrt(var(x) + eps) * weight + bias; Ba et al. 2016, arXiv:1607.06450


@dataclass(frozen=True, slots=True)
class Norm:
    """A model's final norm. Its result is not rounded to the model's precision."""

    kind: NormKind
    weight: (
        torch.Tensor
    )  # [hidden_size], any float; with `plus_one` what counts is 1 + weight (transformers' GemmaRMSNorm)
    eps: float
    bias: torch.Tensor | None = None  # [hidden_size], of LAYER only
    plus_one: bool = False


@dataclass(frozen=True, slots=True)
class Pooled:
    """What was summed up for each span before: the prompt's part of a mean."""

    sums: torch.Tensor  # [spans, hidden_size] fp32, contiguous: sums of rows after the norm
    counts: torch.Tensor  # [spans] int32: of how many rows


def linear_head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """hidden [spans, hidden_size], weight [heads, hidden_size], bias [heads] -> scores [spans, heads], all in fp32.

    A product and a sum for each row instead of a matrix product: a score must not depend on how many rows are pooled
    with it, and fp32 matrix products of a few rows take different paths by their number.
    """
    scores = (hidden.float()[:, None, :] * weight.float()[None]).sum(-1)
    return scores if bias is None else scores + bias.float()


def pool_head(
    hidden: torch.Tensor,
    spans: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor | None = None,
    norm: Norm | None = None,
    pooling: Pooling = Pooling.LAST,
    before: Pooled | None = None,
    sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """Final norm, pooling and heads over the spans of a pack: scores [spans, heads] fp32.

    hidden [rows, hidden_size] are hidden states before the final norm, or after it with `norm` None; the last axis is
    contiguous. spans [spans, 2] int32 are first rows and rows after the last, on the device. head_weight
    [heads, hidden_size], head_bias [heads]. With MEAN, `before` is added to each span's rows, and `sums`
    [spans, hidden_size] fp32 is filled with the sums of both, from which another call can go on; it may be `before`'s.

    A span's rows are added one after the other, so that a mean is the same bit for bit wherever its rows were cut into
    earlier and later ones, and whatever else is in the pack. The score of a span without a row is NaN, unless
    something was pooled before. Raises ValueError for shapes, precisions and combinations that are not meant.
    """
    check_arguments(hidden, spans, head_weight, head_bias, norm, pooling, before, sums)
    pooled = torch.zeros(len(spans), hidden.shape[1], device=hidden.device)
    counts = torch.zeros(len(spans), dtype=torch.int32) if before is None else before.counts.cpu()
    if before is not None:
        pooled.copy_(before.sums)
    for index, (begin, end) in enumerate(spans.tolist()):
        if pooling is Pooling.LAST:
            begin = max(begin, end - 1)
        for row in normed(hidden[begin:end].float(), norm):
            pooled[index] += row
        counts[index] += end - begin
    if sums is not None:
        sums.copy_(pooled)
    return linear_head(pooled / counts.to(pooled)[:, None], head_weight, head_bias)


def normed(rows: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """rows [rows, hidden_size] fp32."""
    if norm is None:
        return rows
    if norm.kind is NormKind.LAYER:
        rows = rows - rows.mean(-1, keepdim=True)
    rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + norm.eps)
    rows = rows * (norm.weight.float() + norm.plus_one)
    return rows if norm.bias is None else rows + norm.bias.float()


def check_arguments(
    hidden: torch.Tensor,
    spans: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor | None,
    norm: Norm | None,
    pooling: Pooling,
    before: Pooled | None,
    sums: torch.Tensor | None,
) -> None:
    """Raises ValueError where `pool_head` does. Reads no values: that would wait for the device."""
    num_spans, heads, hidden_size = len(spans), len(head_weight), hidden.shape[-1]
    if hidden.dim() != 2 or (hidden_size > 1 and hidden.stride(1) != 1):
        raise ValueError("hidden is not [rows, hidden_size] with a contiguous last axis")
    meant: list[tuple[str, torch.Tensor | None, tuple[int, ...]]] = [
        ("spans", spans, (num_spans, 2)),
        ("head_weight", head_weight, (heads, hidden_size)),
        ("head_bias", head_bias, (heads,)),
        ("norm.weight", None if norm is None else norm.weight, (hidden_size,)),
        ("norm.bias", None if norm is None else norm.bias, (hidden_size,)),
        ("before.sums", None if before is None else before.sums, (num_spans, hidden_size)),
        ("before.counts", None if before is None else before.counts, (num_spans,)),
        ("sums", sums, (num_spans, hidden_size)),
    ]
    for name, tensor, shape in meant:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)} instead of {list(shape)}")
        if name in ("spans", "before.counts") and tensor.dtype != torch.int32:
            raise ValueError(f"{name} is not int32")
        if name in ("sums", "before.sums") and (tensor.dtype != torch.float32 or not tensor.is_contiguous()):
            raise ValueError(f"{name} is not fp32 and contiguous")
    if norm is not None and norm.bias is not None and norm.kind is not NormKind.LAYER:
        raise ValueError("an RMS norm has no bias")
    if pooling is Pooling.LAST and (before is not None or sums is not None):
        raise ValueError("the last row alone has no sums, before or after")
