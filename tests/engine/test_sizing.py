"""What memory there is for stored prompts."""

from pathlib import Path

import pytest
from rewardserve.engine.native import sizing

GB = 1 << 30


@pytest.mark.parametrize("prefix", ["", "total_"], ids=["cgroup v2", "cgroup v1"])
@pytest.mark.parametrize("limit", [1, 2])
def test_pages_of_files_that_a_container_has_read_are_memory_it_can_still_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str, limit: int
) -> None:
    """A checkpoint of 0.7 GB was read: with 0.2 GB in use the container is full, and nothing is short."""
    in_files, in_use = int(0.7 * GB), int(0.2 * GB)
    stat = {"anon": in_use, f"{prefix}active_file": GB // 10, f"{prefix}inactive_file": in_files - GB // 10}
    if prefix:  # of the root group alone
        stat |= {"active_file": 1, "inactive_file": 2}
    (tmp_path / "limit").write_text(f"{limit * GB}\n")
    (tmp_path / "used").write_text(f"{in_files + in_use}\n")
    (tmp_path / "memory.stat").write_text("".join(f"{name} {number}\n" for name, number in stat.items()))
    places = (str(tmp_path / "limit"), str(tmp_path / "used"), prefix)
    monkeypatch.setattr(sizing, "CONTAINER_MEMORY", (("/nowhere", "/nowhere", ""), places))
    assert sizing.auto_cache_bytes() == (limit * GB - in_use) // 10
