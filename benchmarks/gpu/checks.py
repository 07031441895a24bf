"""What is found right, and what is not."""

import traceback
from collections.abc import Callable
from typing import Any

from part import Part


class Checks:
    """Call it with each check: it is noted, whatever comes of it."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._found: dict[str, dict[str, Any]] = {}

    def __call__(self, name: str, action: Callable[[], tuple[bool, str]]) -> None:
        """`action` returns whether all is right, and what is to be said of it; what it raises is not right."""
        outcome: dict[str, Any]
        try:
            ok, detail = action()
        except Exception as error:
            ok, detail = False, f"{type(error).__name__}: {error}".splitlines()[0][:200]
            outcome = {"ok": ok, "detail": detail, "traceback": traceback.format_exc()}
        else:
            outcome = {"ok": ok, "detail": detail}
        self._found[name] = outcome
        self._part.note(checks=self._found)
        self._part.say(f"{'green' if ok else 'RED  '} {name}: {detail}")
