"""What names a checkpoint. Loads no torch: a mistyped folder is told before an engine has imported it."""

import os
from pathlib import Path

from rewardserve.errors import LoadFailed


def check_source(source: str) -> None:
    """Raises LoadFailed for what is neither a local folder nor of the form of a hub's name."""
    try:
        is_folder = Path(source).is_dir()
    except OSError as error:  # too long a name, or a folder above it that is closed to us
        raise LoadFailed(f"{source}: {error.strerror}") from error
    if not is_folder and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise LoadFailed(f"{source}: no such folder, and not a hub name of the form 'organisation/model'")


def behind_links(source: str) -> str:
    """The folder that links lead to now: `latest` leads elsewhere when the engine is restarted, or its version is gone
    back to. Any other source as it is.
    """
    if not os.path.isdir(source):
        return source
    folder = os.path.realpath(source)
    return source if folder == os.path.abspath(source) else folder
