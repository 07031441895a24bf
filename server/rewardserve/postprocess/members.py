"""An ensemble's members to one score and its spread."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rewardserve.types import Aggregate, How


@dataclass(frozen=True, slots=True)
class Members:
    """What an ensemble says of one response."""

    score: float
    mean: float
    min: float
    std: float  # of the members there are: divided by their number


def fold_members(scores: Sequence[float], aggregate: Aggregate) -> Members:
    """`scores` is not empty; all are finite."""
    mean, std = statistics.fmean(scores), statistics.pstdev(scores)
    match aggregate.how:
        case How.MEAN:
            score = mean
        case How.MIN:
            score = min(scores)
        case How.MEDIAN:
            score = statistics.median(scores)
        case How.MEAN_LESS_STD:
            score = mean - aggregate.num_stds * std
    return Members(score, mean, min(scores), std)
