"""Whether what is built for this very CPU can be had here: tests of it are skipped where it cannot, with the reason."""

from collections.abc import Callable

from rewardserve_kernels.cpu_code import CannotBuild


def why_not(load: Callable[[], None]) -> str:
    """Empty where it can."""
    try:
        load()
    except CannotBuild as failure:
        return str(failure)
    return ""
