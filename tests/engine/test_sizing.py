"""What memory there is for stored prompts, and what is said where there is too little."""

from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint
from rewardserve.engine.native import sizing
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.options import NativeOptions
from rewardserve.errors import OptionsDoNotFit
from rewardserve.models import loader
from rewardserve.models.backbone import Backbone
from rewardserve_kernels.workspace import untouched

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


def test_a_prefix_cache_that_memory_does_not_hold_is_refused_before_it_is_made_resident() -> None:
    options = NativeOptions("folder", device="cpu", prefix_cache_bytes=1 << 50)
    with pytest.raises(OptionsDoNotFit, match=r"does not fit: \d+ MB of memory are free; give less"):
        sizing.choose_num_blocks(options, torch.device("cpu"), bytes_per_block=GB, beside_bytes=0)
    assert sizing.choose_num_blocks(options, torch.device("cpu"), bytes_per_block=1 << 10, beside_bytes=0)


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
