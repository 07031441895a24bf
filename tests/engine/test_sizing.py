"""What memory there is for stored prompts, and what is said where there is too little."""

from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint
from rewardserve.engine import cgroups
from rewardserve.engine.native import sizing
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.options import NativeOptions
from rewardserve.errors import OptionsDoNotFit
from rewardserve.models import loader
from rewardserve.models.backbone import Backbone
from rewardserve_kernels.workspace import untouched

GB = 1 << 30


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("depth", ["a container's", "a job's", "all jobs'"])
@pytest.mark.parametrize("limit", [1, 2])
def test_pages_of_files_that_a_group_of_processes_has_read_are_memory_it_can_still_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, depth: str, limit: int
) -> None:
    """A checkpoint of 0.7 GB was read: with 0.2 GB in use there is no room in a group of 1 GB, and nothing is short.

    The limit is that of the group that a container calls the top, of a job's own, or of the group that one is in.
    """
    in_files, in_use = int(0.7 * GB), int(0.2 * GB)
    top = tmp_path / "memory" if version == 1 else tmp_path
    limited = {"a container's": top, "a job's": top / "slurm" / "job_7", "all jobs'": top / "slurm"}[depth]
    limited.mkdir(parents=True, exist_ok=True)
    own = "/docker/of/another/view" if depth == "a container's" else "/slurm/job_7"
    (tmp_path / "own").write_text(f"5:cpu,cpuacct:/\n4:memory:{own}\n0::/\n" if version == 1 else f"0::{own}\n")
    monkeypatch.setattr(cgroups, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(cgroups, "ALL_GROUPS", tmp_path)
    of_all = "total_" if version == 1 else ""
    stat = {"anon": in_use, f"{of_all}active_file": GB // 10, f"{of_all}inactive_file": in_files - GB // 10}
    if version == 1:  # of the group itself, without those within it
        stat |= {"active_file": 1, "inactive_file": 2}
    said, used = [("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")][version - 1]
    (limited / said).write_text(f"{limit * GB}\n")
    (limited / used).write_text(f"{in_files + in_use}\n")
    (limited / "memory.stat").write_text("".join(f"{name} {number}\n" for name, number in stat.items()))
    assert sizing.auto_cache_bytes() == (limit * GB - in_use) // 10


def test_groups_without_a_limit_leave_all_that_the_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").write_text("0::/user.slice\n")
    (tmp_path / "user.slice").mkdir()
    (tmp_path / "user.slice" / "memory.max").write_text("max\n")
    (tmp_path / "user.slice" / "memory.current").write_text("5\n")
    monkeypatch.setattr(cgroups, "ALL_GROUPS", tmp_path)
    for own in ("own", "not there"):
        monkeypatch.setattr(cgroups, "OWN_GROUPS", tmp_path / own)
        assert sizing.auto_cache_bytes() > 0


@pytest.mark.parametrize("limited", ["", "slurm", "slurm/job_7"])
@pytest.mark.parametrize(("quota", "cores"), [(250, 2), (50, 1), (100, 1), (6400, 8), (None, 8)])
@pytest.mark.parametrize("version", [1, 2])
def test_threads_are_no_more_than_the_cores_that_a_group_of_processes_has_the_time_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, quota: int | None, cores: int, limited: str
) -> None:
    """Of a container with a quota of CPUs on a machine of eight cores, each of which it may be on."""
    (tmp_path / "own").write_text("7:cpu,cpuacct:/slurm/job_7\n0::/\n" if version == 1 else "0::/slurm/job_7\n")
    monkeypatch.setattr(cgroups, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(cgroups, "ALL_GROUPS", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    group = (tmp_path / "cpu" if version == 1 else tmp_path) / limited
    group.mkdir(parents=True, exist_ok=True)
    if version == 1:
        (group / "cpu.cfs_quota_us").write_text(f"{-1 if quota is None else quota * 1000}\n")
        (group / "cpu.cfs_period_us").write_text("100000\n")
    else:
        (group / "cpu.max").write_text(f"{'max' if quota is None else quota * 1000} 100000\n")
    assert cgroups.num_cores() == cores


def test_a_prefix_cache_that_memory_does_not_hold_is_refused_before_it_is_made_resident() -> None:
    options = NativeOptions("folder", device="cpu", prefix_cache_bytes=1 << 50)
    with pytest.raises(OptionsDoNotFit, match=r"does not fit: \d+ MB of memory are free; give less"):
        sizing.choose_num_blocks(options, torch.device("cpu"), bytes_per_block=GB, beside_bytes=0)
    assert sizing.choose_num_blocks(options, torch.device("cpu"), bytes_per_block=1 << 10, beside_bytes=0)


def test_a_host_cache_that_memory_does_not_hold_is_refused_before_it_is_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a job that may take 1 GB: what it asks for the system gives, until it is used."""
    for name, text in {"own": "0::/\n", "memory.max": f"{GB}\n", "memory.current": "0\n"}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cgroups, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(cgroups, "ALL_GROUPS", tmp_path)
    save_checkpoint(tmp_path)
    options = {"compile": "off", "num_threads": 1, "prefix_cache_bytes": 16 << 20, "device": "cpu"}
    with pytest.raises(OptionsDoNotFit, match="a host cache of 2048 MB does not fit: 1024 MB of memory are free"):
        load_runner(NativeOptions(str(tmp_path), host_cache_bytes=2 * GB, **options))


def test_memory_that_cannot_be_had_is_told_from_a_forward_that_fails() -> None:
    """By its kind: what runs out of memory is tried again in smaller forwards, and fails as RESOURCE_EXHAUSTED."""
    with pytest.raises(MemoryError):
        untouched([1 << 46], torch.empty(0))


@pytest.mark.parametrize("of", [(loader, "load"), (Backbone, "run_packed")], ids=["its weights", "a first forward"])
def test_a_model_that_its_device_does_not_hold_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: tuple[object, str]
) -> None:
    """Neither a crash while loading nor a model that is served padded for good."""

    def too_large(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    save_checkpoint(tmp_path)
    monkeypatch.setattr(*of, too_large)
    with pytest.raises(OptionsDoNotFit, match=r"too little memory on cpu: OutOfMemoryError: CUDA out of memory"):
        load_runner(NativeOptions(str(tmp_path), device="cpu", compile="off", num_threads=1))
