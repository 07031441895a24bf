"""What a judge wrote -> its verdict: read strictly, so that nothing is ever scored by a guess.

The verdict is the last thing that the judge writes. Whatever came before is its own business.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import regex

from rewardserve.json_object import once_each
from rewardserve.types import VerdictFormat, at_the_end

VERDICT_CHARACTERS = 4000  # at the end of what was written; a verdict is looked for there
SHOWN_CHARACTERS = 80
PATTERN_S = 0.5  # for a pattern to find it: meanwhile nothing else is judged
FENCE = "```"


class Unreadable(Exception):
    """What was written ends in no verdict. The message says why."""


@dataclass(frozen=True, slots=True)
class Verdict:
    score: float
    criteria: tuple[float, ...]  # in the order of VerdictFormat.criteria


def read_verdict(text: str, how: VerdictFormat) -> Verdict:
    """Raises Unreadable for anything but one number in the range for each criterion, as the last thing in `text`."""
    end = text[-VERDICT_CHARACTERS:].rstrip()
    try:
        found = _by_pattern(end, how.pattern) if how.pattern else _in_json(end)
        if missing := [name for name in how.criteria if name not in found]:
            raise Unreadable(f"no value for {', '.join(missing)}")
        if unknown := sorted(found.keys() - set(how.criteria)):
            raise Unreadable(f"no criterion is named {', '.join(map(repr, unknown))}")
        values = tuple(_number(name, found[name], how) for name in how.criteria)
    except Unreadable as error:
        raise Unreadable(f"{error}; what it wrote ends in {end[-SHOWN_CHARACTERS:]!r}") from None
    return Verdict(math.fsum(weight * value for weight, value in zip(how.weights, values, strict=True)), values)


def _in_json(end: str) -> Mapping[str, Any]:
    """The flat object at the end, which may stand in a fence."""
    end = end.removesuffix(FENCE).rstrip()
    begin = end.rfind("{")
    if begin < 0 or not end.endswith("}"):
        raise Unreadable("it ends in no JSON object")
    try:
        found = json.loads(end[begin:], object_pairs_hook=once_each, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"its JSON is malformed: {error}") from None
    assert isinstance(found, dict)
    return found


def _no_number(name: str) -> NoReturn:
    raise Unreadable(f"{name} is no number")


def _by_pattern(end: str, pattern: str) -> Mapping[str, Any]:
    try:
        match = regex.search(at_the_end(pattern), end, timeout=PATTERN_S)
    except TimeoutError:
        raise Unreadable(f"the pattern came to no end within {PATTERN_S:g} s") from None
    if match is None:
        raise Unreadable("it does not end as the pattern says")
    return {name: value for name, value in match.groupdict().items() if value is not None}


def _number(name: str, value: Any, how: VerdictFormat) -> float:
    if isinstance(value, str):
        words = dict(how.words)
        if value in words:
            return words[value]
        if not how.pattern:  # JSON tells numbers from words by itself
            raise Unreadable(f"{name} is {value!r}, not a number")
        try:
            value = float(value)
        except ValueError:
            raise Unreadable(f"{name} is {value!r}, not a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unreadable(f"{name} is {value!r}, not a number")
    if not how.lowest <= value <= how.highest:
        raise Unreadable(f"{name} is {value!r:.40}, not from {how.lowest:g} to {how.highest:g}")
    return float(value)
