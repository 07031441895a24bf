"""Tests marked `interpreted` run under Triton's interpreter: kernels as numpy programs, on tensors of the CPU.

The interpreter is chosen by an environment variable when triton is first imported, for the whole process and for
triton's own functions too; with it nothing can be compiled. So one process of its own runs all such tests of a session,
when the first of them comes up, and each is reported here as it went there.
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
Outcomes = dict[tuple[str, str], str | None]  # what went wrong, or None, by module and name of a test
OUTCOMES = pytest.StashKey[tuple[Outcomes, str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted: runs under Triton's interpreter, in a process of its own")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if INTERPRETED or pyfuncitem.get_closest_marker("interpreted") is None:
        return None
    import triton

    if _numbers(triton.__version__) < (3, 7) and _numbers(np.__version__) >= (2, 4):
        pytest.skip("the interpreter of triton before 3.7 cannot loop between loaded numbers with numpy 2.4")
    session = pyfuncitem.session
    if OUTCOMES not in session.stash:
        session.stash[OUTCOMES] = _run([i for i in session.items if i.get_closest_marker("interpreted")])
    outcomes, output = session.stash[OUTCOMES]
    problem = outcomes.get((pyfuncitem.module.__name__.split(".")[-1], pyfuncitem.name), f"it did not run\n{output}")
    if problem is not None:
        pytest.fail(problem, pytrace=False)
    return True


def _run(items: list[pytest.Item]) -> tuple[Outcomes, str]:
    """The outcomes of those that ran, and what was printed."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}"]
        command += [item.nodeid for item in items]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=items[0].config.rootpath, env=environment, capture_output=True, text=True)
        cases = ElementTree.parse(report).iter("testcase") if report.exists() else ()  # it may have crashed
        outcomes = {(case.attrib["classname"].split(".")[-1], case.attrib["name"]): _problem(case) for case in cases}
        return outcomes, run.stdout + run.stderr


def _problem(case: ElementTree.Element) -> str | None:
    return next((child.text for child in case if child.tag in ("failure", "error", "skipped")), None)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
