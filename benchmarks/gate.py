"""No speed without right scores: every provider is held to Hugging Face one by one in fp32 before anything is timed."""

import math
from dataclasses import dataclass
from itertools import chain

from peers.protocol import Scores

MAX_TIMES_PADDED = 5.0  # a mean error beyond so many times that of padded Hugging Face is no rounding
MAX_OF_SPREAD = 0.1  # and neither is one beyond this part of the scores' standard deviation


class RedGate(Exception):
    """Our own scores are wrong: there is no speed to speak of."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Of one provider on one workload, against the reference."""

    max_abs_err: float
    mean_abs_err: float
    right: bool


def check(scores: dict[str, Scores], exact: Scores) -> dict[str, Accuracy]:
    """By provider. `hf_padded`, where it is among them, says how much rounding costs."""
    errors = {name: _errors(got, exact) for name, got in scores.items()}
    limit = MAX_OF_SPREAD * _std([*chain.from_iterable(exact)]) or math.inf  # a single score has no spread
    if "hf_padded" in errors:
        limit = min(limit, MAX_TIMES_PADDED * _mean(errors["hf_padded"]))
    return {name: Accuracy(max(each), _mean(each), _mean(each) <= limit) for name, each in errors.items()}


def _errors(got: Scores, exact: Scores) -> list[float]:
    """Absolute ones; infinite where a score is missing or no number."""
    if [len(group) for group in got] != [len(group) for group in exact]:
        return [math.inf]
    pairs = zip(chain.from_iterable(got), chain.from_iterable(exact), strict=True)
    return [abs(a - b) if a is not None and math.isfinite(a) else math.inf for a, b in pairs]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _std(values: list[float]) -> float:
    mean = _mean(values)
    return math.sqrt(_mean([(value - mean) ** 2 for value in values]))


def refuse(accuracy: dict[str, Accuracy], ours: list[str], workload: str) -> None:
    """Raises RedGate if any of ours is wrong."""
    wrong = [f"{name} is off by {accuracy[name].mean_abs_err:.2g}" for name in ours if not accuracy[name].right]
    if wrong:
        raise RedGate(f"{workload}: {', '.join(wrong)} from the fp32 reference: no speed on a red gate")
