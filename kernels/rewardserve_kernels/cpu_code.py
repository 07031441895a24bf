"""C++ for the very CPU it runs on: compiled once, kept beside the user's other caches."""

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

HEADERS = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", f"-I{HEADERS}")
BUILD_TIMEOUT_S = 120


class CannotBuild(Exception):
    """There is no compiler, or it failed; the message says which."""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What Linux says this CPU can do; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


@functools.cache
def load(source: Path, needed: frozenset[str] = frozenset()) -> ctypes.CDLL:
    """The library built of `source`, an OpenMP program without other dependencies. Raises CannotBuild, also where the
    CPU lacks one of the flags `needed`.

    $CXX names the compiler, as it does for torch.compile; without it that is g++, whose OpenMP is the one torch has
    loaded already: a second pool of threads on the same cores would cost both of them dearly.
    """
    if missing := needed - cpu_flags():
        raise CannotBuild(f"this CPU has no {', '.join(sorted(missing))}")
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    version = _run([*compiler, "--version"])
    texts = [file.read_text() for file in (source, *sorted(HEADERS.glob("*.h")))]
    key = hashlib.sha256("\0".join([*texts, version, *FLAGS, *sorted(cpu_flags())]).encode())
    name = f"{source.stem}-{key.hexdigest()[:16]}.so"
    command = [*compiler, *FLAGS, str(source), "-o"]
    try:
        if (cache := _cache()) is None:
            with _temporary_folder() as folder:
                _run([*command, f"{folder}/{name}"])
                return ctypes.CDLL(f"{folder}/{name}")
        library = cache / name
        if library.exists():
            with contextlib.suppress(OSError):  # a damaged one is built anew
                return ctypes.CDLL(str(library))
        # Another process may be building it too: each its own file, the last one stays.
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            built = Path(scratch) / "library.so"
            _run([*command, str(built)])
            built.replace(library)
        return _opened(library)
    except OSError as error:  # a full disk, folders from which nothing may be run
        raise CannotBuild(f"{name}: {error}") from error


def _opened(library: Path) -> ctypes.CDLL:
    """From a temporary folder if its own is one from which nothing may be run."""
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        with _temporary_folder() as folder:
            return ctypes.CDLL(shutil.copy(library, folder))


def _cache() -> Path | None:
    """$XDG_CACHE_HOME/rewardserve, in ~/.cache by default; None where that cannot be written."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rewardserve"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return None


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Gone once the library is open, which needs its file no more: a forked engine ends without a tidying up."""
    return tempfile.TemporaryDirectory(prefix="rewardserve-", ignore_cleanup_errors=True)  # NFS keeps what is open


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S).stdout
    except FileNotFoundError as error:
        raise CannotBuild(f"there is no C++ compiler {command[0]}; install g++ or name one in CXX") from error
    except subprocess.CalledProcessError as error:
        raise CannotBuild(f"{command[0]} failed: {' '.join(error.stderr.split())[:300]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"{command[0]}: {error}") from error
