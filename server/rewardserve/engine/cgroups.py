"""What the groups of processes (cgroups) that this one is in may take: a container's, a job's, a service's."""

import contextlib
import os
from pathlib import Path

# Those of this one, and where all of them are.
OWN_GROUPS, ALL_GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# By their version: files, and how names in memory.stat begin that count groups within a group too.
LIMITS_OF_MEMORY = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: ("memory.max", "memory.current", ""),
}
PAGES_OF_FILES = ("active_file", "inactive_file")


def _groups_with(controller: str) -> list[tuple[int, Path]]:
    """(version of cgroups, folder) of each group of this process that this may limit, and each that those are in.

    In a container its own group is at the top, whatever its path is said to be.
    """
    found: list[tuple[int, Path]] = []
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            version, top = 2, ALL_GROUPS
        elif controller in controllers.split(","):
            version, top = 1, ALL_GROUPS / controller
        else:
            continue
        group = top / path.lstrip("/")
        found += [(version, each) for each in (group, *group.parents[: len(group.parts) - len(top.parts)])]
    return found


def num_cores() -> int:
    """For threads that wait for one another: the cores that this process may be on or, if that is less, the whole ones
    of its groups' time.

    A container of 4 CPUs on a machine of 64 may be on all of them. With a thread on each its time is spent in a
    sixteenth of every period, and they wait for one another, spinning, in the middle of every operation.
    """
    least = float(len(os.sched_getaffinity(0)))
    for version, group in _groups_with("cpu"):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            if version == 2:
                quota, period = map(int, (group / "cpu.max").read_text().split())
            else:
                quota, period = (int((group / f"cpu.cfs_{what}_us").read_text()) for what in ("quota", "period"))
            if quota > 0 and period > 0:  # -1: no limit
                least = min(least, quota / period)
    return max(1, int(least))


def bytes_left() -> list[int]:
    """Memory that each of the groups of this process, and each group that those are in, may still take."""
    found: list[int] = []
    for version, group in _groups_with("memory"):
        limit, used, of_all = LIMITS_OF_MEMORY[version]
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            allowed, taken = (int((group / name).read_text()) for name in (limit, used))
            found.append(allowed - taken + _pages_of_files(group / "memory.stat", of_all))
    return found


def _pages_of_files(stat: Path, of_all: str) -> int:
    """Bytes that a group's use counts and that give way to whoever needs memory: where a checkpoint was read they fill
    all that the group may have. `of_all` comes before names that count groups within it too.
    """
    names = {of_all + name for name in PAGES_OF_FILES}
    lines = map(str.split, stat.read_text().splitlines() if stat.exists() else [])
    return sum(int(number) for name, number in lines if name in names)
