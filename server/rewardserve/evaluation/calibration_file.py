"""What a margin between two scores is worth as a probability, as values and as a file that a server can read.

One JSON object: "format" is "rewardserve.calibration.v1", "kind" says which of the three it is, and the rest are its
numbers and where they come from:

    {"kind": "temperature", "temperature": T}
        P(a is preferred to b) = sigmoid((score_a - score_b) / T)
    {"kind": "affine", "scale": A, "offset": B}
        the calibrated score is A * score + B, and P = sigmoid(difference of calibrated scores)
    {"kind": "isotonic", "margins": [...], "probabilities": [...]}
        P by straight lines between these points, level outside of them; both ascend, and P(-margin) = 1 - P(margin)

Where a model's scores are probabilities, "score" and "margin" above are those of their log-odds (`log_odds`).

`origin` is {"model", "version", "input", "num_pairs", "num_prompts"}: a calibration is of one version of a model.
Standard library only, so that whoever serves needs nothing more to read it.
"""

import bisect
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from rewardserve.json_object import once_each

FORMAT = "rewardserve.calibration.v1"
BESIDE = "rewardserve_calibration.json"  # the file's name in a checkpoint's folder, where servers look for it
SMALLEST, LARGEST = 2.0**-149 / 2, 1 - 2.0**-25  # half a step of fp32 from 0, and from 1


class BadCalibration(ValueError):
    """A file that is no calibration; the message names the field and what it should be."""


@dataclass(frozen=True, slots=True)
class Temperature:
    """Scores are log-odds after division by `temperature`: above 1 the model was too sure, below 1 too shy."""

    temperature: float

    kind: ClassVar[str] = "temperature"

    def __post_init__(self) -> None:
        _require(_is_number(self.temperature) and self.temperature > 0, "temperature", "a number above 0")

    def probability(self, margin: float) -> float:
        """That the response whose score is higher by `margin` is preferred."""
        return sigmoid(margin / self.temperature)


@dataclass(frozen=True, slots=True)
class Affine:
    """Scores become log-odds with a mean of 0, so that those of different models can be averaged."""

    scale: float
    offset: float

    kind: ClassVar[str] = "affine"

    def __post_init__(self) -> None:
        _require(_is_number(self.scale) and self.scale > 0, "scale", "a number above 0")
        _require(_is_number(self.offset), "offset", "a number")

    def score(self, score: float) -> float:
        """The calibrated score."""
        return self.scale * score + self.offset

    def probability(self, margin: float) -> float:
        """As in `Temperature`; the offset cancels."""
        return sigmoid(margin * self.scale)


@dataclass(frozen=True, slots=True)
class Isotonic:
    """Any curve that never falls: of the margin only, for it says nothing about a single score."""

    margins: tuple[float, ...]
    probabilities: tuple[float, ...]

    kind: ClassVar[str] = "isotonic"

    def __post_init__(self) -> None:
        for name in ("margins", "probabilities"):
            values = getattr(self, name)
            numbers = isinstance(values, Sequence) and len(values) > 0 and all(map(_is_number, values))
            _require(numbers, name, "a list of numbers")
            _require(all(a <= b for a, b in pairwise(values)), name, "in ascending order")
        _require(len(self.margins) == len(self.probabilities), "probabilities", "as many as there are margins")
        _require(all(0 <= value <= 1 for value in self.probabilities), "probabilities", "between 0 and 1")

    def probability(self, margin: float) -> float:
        """As in `Temperature`."""
        right = bisect.bisect_right(self.margins, margin)
        if right in (0, len(self.margins)):
            return self.probabilities[max(right - 1, 0)]
        left_margin, right_margin = self.margins[right - 1], self.margins[right]
        left, rise = self.probabilities[right - 1], self.probabilities[right] - self.probabilities[right - 1]
        part = (margin - left_margin) / (right_margin - left_margin)  # first: margins may be as small as floats get
        return left + rise * part


Calibration: TypeAlias = Temperature | Affine | Isotonic
KINDS: dict[str, type[Calibration]] = {each.kind: each for each in (Temperature, Affine, Isotonic)}


@dataclass(frozen=True, slots=True)
class Origin:
    """What a calibration was fitted on."""

    model: str
    version: str
    input: str
    num_pairs: int
    num_prompts: int


def write(path: Path, calibration: Calibration, origin: Origin) -> None:
    """Raises OSError."""
    values = {"format": FORMAT, "kind": calibration.kind, **asdict(calibration), "origin": asdict(origin)}
    path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read(path: Path) -> tuple[Calibration, Origin]:
    """Raises OSError, and BadCalibration for anything that `write` would not have written."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once_each)
    except (ValueError, RecursionError) as error:
        raise BadCalibration(f"{path}: cannot be read as JSON: {error}") from None
    try:
        return _parse(values)
    except BadCalibration as error:
        raise BadCalibration(f"{path}: {error}") from None


def _parse(values: Any) -> tuple[Calibration, Origin]:
    _require(isinstance(values, Mapping) and values.get("format") == FORMAT, "format", repr(FORMAT))
    kind = values.get("kind")
    _require(isinstance(kind, str) and kind in KINDS, "kind", " or ".join(map(repr, KINDS)))
    cls = KINDS[kind]
    names = [field.name for field in fields(cls)]
    for name in names:
        _require(name in values, name, f"there, in a calibration of kind {kind!r}")
    calibration = cls(**{name: _frozen(values[name]) for name in names})
    origin = values.get("origin")
    known = {field.name for field in fields(Origin)}
    _require(isinstance(origin, Mapping) and set(origin) == known, "origin", f"an object of {', '.join(sorted(known))}")
    return calibration, Origin(**origin)


def sigmoid(value: float) -> float:
    """Without overflow, however large the value is."""
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    return math.exp(value) / (1 + math.exp(value))


def log_odds(probability: float) -> float:
    """The inverse of `sigmoid`, of a score that is a probability: margins between these are Bradley and Terry's.

    Finite at 0 and 1, which fp32 rounds to: as if they were half a step away.
    """
    held = min(max(probability, SMALLEST), LARGEST)
    return math.log(held) - math.log1p(-held)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _require(holds: bool, field: str, wanted: str) -> None:
    if not holds:
        raise BadCalibration(f"{field}: must be {wanted}")
