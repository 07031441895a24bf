"""Hidden states -> scores: the scalar head, in fp32."""

import torch


def linear_head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """hidden [spans, hidden_size], weight [heads, hidden_size], bias [heads] -> scores [spans, heads], all in fp32.

    A product and a sum for each row instead of a matrix product: a score must not depend on how many rows are pooled
    with it, and fp32 matrix products of a few rows take different paths by their number.
    """
    scores = (hidden.float()[:, None, :] * weight.float()[None]).sum(-1)
    return scores if bias is None else scores + bias.float()
