"""A checkpoint's files of JSON. Loads no torch."""

import json
from pathlib import Path
from typing import Any

from rewardserve.errors import LoadFailed


def read_object(path: Path) -> dict[str, Any]:
    """Raises LoadFailed naming a file that cannot be read, or holds anything else."""
    try:
        found = json.loads(path.read_bytes())  # by its own encoding, whatever the locale is
    except OSError as error:
        raise LoadFailed(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise LoadFailed(f"{path}: is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise LoadFailed(f"{path}: is no object of JSON")
    return found
