"""Several numbers to one: a response's steps to its score."""

import math
from collections.abc import Sequence

from rewardserve.types import StepReduction


def reduce_steps(steps: Sequence[float], how: StepReduction) -> float:
    """`steps` is not empty."""
    match how:
        case StepReduction.MIN:
            return min(steps)
        case StepReduction.MEAN:
            return math.fsum(steps) / len(steps)
        case StepReduction.PRODUCT:
            return math.prod(steps)
        case StepReduction.LAST:
            return steps[-1]
