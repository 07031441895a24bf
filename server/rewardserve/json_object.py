"""Objects of JSON in which no key is given twice; Python's own parser lets the last one count, in silence."""

from collections.abc import Iterable
from typing import Any


def once_each(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for json.loads. Raises ValueError naming the key."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found
