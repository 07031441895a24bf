"""Tests marked `interpreted` run under Triton's interpreter: kernels as numpy programs, on tensors of the CPU.

The interpreter is chosen by an environment variable when triton is first imported, for the whole process and for
triton's own functions too; with it nothing can be compiled. So a process of its own runs all such tests of a file, when
the first of them comes up, and each is reported here as it went there.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
Outcomes = dict[str, str | None]  # what went wrong, or None, by name of a test
OUTCOMES = pytest.StashKey[dict[Path, tuple[Outcomes, str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted: runs under Triton's interpreter, in a process of its own")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if INTERPRETED or pyfuncitem.get_closest_marker("interpreted") is None:
        return None
    import triton

    if _numbers(triton.__version__) < (3, 7) and _numbers(np.__version__) >= (2, 4):
        pytest.skip("the interpreter of triton before 3.7 cannot loop between loaded numbers with numpy 2.4")
    found = pyfuncitem.session.stash.setdefault(OUTCOMES, {})
    if pyfuncitem.path not in found:
        of_file = [item for item in pyfuncitem.session.items if item.path == pyfuncitem.path]
        found[pyfuncitem.path] = _run([item for item in of_file if item.get_closest_marker("interpreted")])
    outcomes, output = found[pyfuncitem.path]
    problem = outcomes.get(pyfuncitem.name, f"it did not run\n{output}")
    if problem is not None:
        pytest.fail(problem, pytrace=False)
    return True


def _run(items: list[pytest.Item]) -> tuple[Outcomes, str]:
    """The outcomes of those that ran, and what was printed."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}"]
        command += [item.nodeid for item in items]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        run = subprocess.run(command, cwd=items[0].config.rootpath, env=environment, capture_output=True, text=True)
        cases = ElementTree.parse(report).iter("testcase") if report.exists() else ()  # it may have crashed
        outcomes = {case.attrib["name"]: _problem(case) for case in cases}
        return outcomes, run.stdout + run.stderr


def _problem(case: ElementTree.Element) -> str | None:
    return next((child.text for child in case if child.tag in ("failure", "error", "skipped")), None)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
