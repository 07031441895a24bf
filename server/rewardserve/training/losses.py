"""Scores -> what training makes small. All arithmetic is fp32; every loss is a mean over its rows."""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, mse_loss


def bradley_terry(
    better: torch.Tensor, worse: torch.Tensor, label: torch.Tensor | None = None, margin: torch.Tensor | None = None
) -> torch.Tensor:
    """Minus the log-likelihood of the comparisons, when P(better wins) = sigmoid(better - worse).

    Bradley and Terry 1952; as a reward model's loss Ouyang et al. 2022, arXiv:2203.02155, equation 1. All arguments are
    [pairs]. `margin` is subtracted from the difference: Touvron et al. 2023, arXiv:2307.09288, equation 2. `label` is
    the share of votes for `better`, 0.5 for a tie, and makes it the cross-entropy of Christiano et al. 2017,
    arXiv:1706.03741, section 2.2.3; both ways to win then have to be won by the margin, so that exchanging the two
    responses and the label changes nothing.
    """
    difference = better.float() - worse.float()
    margin = torch.zeros_like(difference) if margin is None else margin.float()
    won = logsigmoid(difference - margin)
    if label is None:
        return -won.mean()
    return -(label * won + (1 - label) * logsigmoid(-difference - margin)).mean()


def squared_error(scores: torch.Tensor, ratings: torch.Tensor) -> torch.Tensor:
    """scores, ratings [responses]: the score is to be the rating itself, as in Wang et al. 2024, arXiv:2406.08673."""
    return mse_loss(scores.float(), ratings.float())


def cross_entropy(scores: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """scores, probabilities [responses]: the score is the logit of the response being a good one.

    As outcome-supervised models are trained, Uesato et al. 2022, arXiv:2211.14275. Raters who disagree are a
    probability between 0 and 1.
    """
    return binary_cross_entropy_with_logits(scores.float(), probabilities.float())


def centering(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """Keeps a pair's scores around 0, which the other losses leave open: Eisenstein et al. 2023, arXiv:2312.09244,
    equation 2. All arguments are [pairs]."""
    return (better.float() + worse.float()).square().mean()


POINTWISE = {"mse": squared_error, "classification": cross_entropy}
