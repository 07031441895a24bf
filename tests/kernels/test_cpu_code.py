"""C++ for this CPU is built once and kept; where that cannot be, the reason is named."""

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from rewardserve_kernels import cpu_code
from rewardserve_kernels.cpu_code import CannotBuild

SOURCE = 'extern "C" int answer() { return 42; }'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "deep_thought.cpp"
    path.write_text(SOURCE)
    yield path
    cpu_code.load.cache_clear()


def compilations(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The compiler's commands from now on, as they are given."""
    commands: list[list[str]] = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **kw: (commands.append(command), run(command, **kw))[1])
    return commands


def test_what_was_built_once_is_kept_until_its_source_changes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = compilations(monkeypatch)

    def answer() -> int:
        cpu_code.load.cache_clear()  # as another process
        return cpu_code.load(source).answer()

    assert answer() == 42 and answer() == 42
    assert sum("-shared" in command for command in commands) == 1
    source.write_text(SOURCE.replace("42", "43"))
    assert answer() == 43
    assert sum("-shared" in command for command in commands) == 2
    assert len(list((source.parent / "cache" / "rewardserve").iterdir())) == 2, "nothing else is left behind"


def test_a_cache_that_cannot_be_written_is_done_without(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is left in its stead: an engine is forked, and no exit handler of it runs."""
    (source.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(source.parent / "file"))
    temporary = source.parent / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert cpu_code.load(source).answer() == 42
    assert not list(temporary.iterdir())


def test_a_user_without_a_home_has_no_cache_and_needs_none(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "~")  # what is found where there is neither $HOME nor a line in /etc/passwd
    with pytest.raises(RuntimeError):
        Path.home()
    assert cpu_code.load(source).answer() == 42


def test_a_damaged_library_is_built_anew(source: Path) -> None:
    program = f"import pathlib, rewardserve_kernels.cpu_code as c; c.load(pathlib.Path({str(source)!r}))"
    subprocess.run([sys.executable, "-c", program], check=True)  # what this process has loaded it would find again
    (library,) = (source.parent / "cache" / "rewardserve").iterdir()
    library.write_bytes(b"")
    assert cpu_code.load(source).answer() == 42


def test_what_was_built_where_nothing_may_be_run_is_run_from_elsewhere(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a home that is mounted noexec. Where there is no such place, the library's products do."""
    load, cache = ctypes.CDLL, str(source.parent / "cache")

    def mounted_noexec(path: str) -> ctypes.CDLL:
        if path.startswith(places):
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", mounted_noexec)
    places: tuple[str, ...] = (cache,)
    assert cpu_code.load(source).answer() == 42
    cpu_code.load.cache_clear()
    places = ("/",)
    with pytest.raises(CannotBuild, match="failed to map segment"):
        cpu_code.load(source)


def test_a_missing_compiler_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    with pytest.raises(CannotBuild, match="there is no C\\+\\+ compiler /nonexistent/g\\+\\+; install g\\+\\+"):
        cpu_code.load(source)


def test_what_the_compiler_says_is_passed_on(source: Path) -> None:
    source.write_text("int answer() { return forty_two; }")
    with pytest.raises(CannotBuild, match="forty_two"):
        cpu_code.load(source)


def test_what_this_cpu_lacks_is_named_before_anything_is_built(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = compilations(monkeypatch)
    with pytest.raises(CannotBuild, match="this CPU has no tea"):
        cpu_code.load(source, frozenset({"tea"}))
    assert not commands
