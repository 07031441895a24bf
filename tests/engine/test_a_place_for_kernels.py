"""Without a home that can be written to, Triton's kernels are compiled all the same."""

import os
import tempfile
from pathlib import Path

import pytest
from rewardserve.engine.native.gpu import find_place_for_kernels

triton = pytest.importorskip("triton", reason="triton is not installed")


def test_kernels_are_kept_elsewhere_where_there_is_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container of a user that it does not know, or whose files are read-only."""
    from triton.runtime.cache import FileCacheManager

    (tmp_path / "no folder").write_text("")
    monkeypatch.setitem(vars(triton.knobs.cache), "home_dir", str(tmp_path / "no folder"))  # found as it was imported
    monkeypatch.setenv("HOME", str(tmp_path / "no folder"))
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError, match="no folder"):
        FileCacheManager("of-a-kernel").put(b"code", "kernel.cubin")
    for _ in range(2):  # the next process finds what this one has kept
        find_place_for_kernels()
        assert Path(FileCacheManager("of-a-kernel").put(b"code", "kernel.cubin")).is_relative_to(tmp_path)
        del os.environ["TRITON_CACHE_DIR"]
    assert len(list(tmp_path.glob("rewardserve-triton-*"))) == 1


def test_a_place_that_was_chosen_or_can_be_written_to_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "chosen")
    find_place_for_kernels()
    assert os.environ["TRITON_CACHE_DIR"] == "chosen"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    find_place_for_kernels()
    assert "TRITON_CACHE_DIR" not in os.environ
