"""Kernels compiled before anything waits for them, on all cores: a kernel of attention takes a core four to eight
seconds. What is compiled lies in Triton's cache on disk, where every later process finds it.
"""

import os
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import kernel_checks
import kernel_figures
from attention_case import Case, attend, ragged
from family_checks import families, family_is_right
from part import Part


def compile_ahead(part: Part) -> None:
    """Those of the gate, of the table and of the models. What goes wrong here is for the parts that need it to tell."""
    cases = [*kernel_checks.CASES, *kernel_figures.cases(part)]
    jobs = [*dict.fromkeys(("attention", case) for case in cases), *(("family", name) for name in families(part))]
    if part.tiny:
        jobs = [jobs[0], jobs[-1]]
    compile_all(part, jobs)


def compile_all(part: Part, jobs: Sequence[tuple[str, Any]]) -> None:
    """Each job, a kind of JOBS and what it is of, is done once, for what it compiles."""
    workers = min(len(jobs), os.cpu_count() or 1)
    taken: dict[str, Any] = {}
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        place = (part.folder, str(part.device), part.tiny)
        named = {pool.submit(_do, kind, of, *place): f"{kind} {of}" for kind, of in jobs}
        for done in as_completed(named):
            failure = done.exception()
            taken[named[done]] = f"{type(failure).__name__}: {failure}" if failure else done.result()
            part.note(compiled_s=taken, workers=workers)
    part.say(f"{len(jobs)} jobs in {workers} processes: {taken}")


JOBS: dict[str, Callable[[Part, Any], object]] = {
    "attention": lambda part, case: attend(part, case, ragged(part, case)),
    "family": family_is_right,
}


def _do(kind: str, of: Case | str, folder: Path, device: str, tiny: bool) -> float | str:
    """Seconds, or what went wrong: not every error of a compiler crosses to another process."""
    part = Part("compiler", folder, device, tiny)
    begun = time.perf_counter()
    try:
        JOBS[kind](part, of)
        part.wait()
    except Exception:
        return traceback.format_exc(limit=-2)
    return round(time.perf_counter() - begun, 1)
