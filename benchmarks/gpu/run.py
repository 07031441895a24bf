"""Everything about the CUDA path in one command of under ten minutes, on a machine where nothing can be installed.

    python benchmarks/gpu/run.py [--seconds 570] [--only gate kernels ...] [--output DIR] [--dry-run]

It needs torch, triton, transformers and numpy; the server and the kernels are taken from the source tree. Every part is
a process of its own (plan.py, parts.py): one that fails or takes too long costs its own figures and no others. While
one runs the next one imports what it needs, and waits. The gate comes first: kernels against their oracles, families by
their canaries, one score bit for bit cold, warm and batched.
If it is red, or was left out, so is the table, and the exit code is 1, as it is where any part failed. `--dry-run` goes
through all of it on a CPU with tiny models: its figures mean nothing.

Writes <gpu>.json, with all there is, and <gpu>.png where matplotlib is installed; `--draw <gpu>.json` makes the picture
later. With `--only` the other parts of the file stay as they were, each with its date and commit.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from picture import draw
from plan import AS_SERVED, FIRST, GATE, NAMES, STAGES, Planned, chosen
from table import Results, failed, red, table

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROGRAM = HERE / "parts.py"
SOURCES = ("server", "kernels", "benchmarks", "tests/support")
LEAST_S = 15.0  # of a part: less is not worth its start
TO_WRITE_S = 5.0  # kept of the time there is
BEFORE_S = 3.0  # before it is stopped, a part that minds the time has ended
DRY_TIMES = 3  # as long as it may take on a GPU's machine: the cores of a dry run are few, and others use them too
KEPT_ERRORS = 4000  # characters of what a part wrote to stderr


def main() -> int:
    options = _options()
    if options.draw:
        print(draw(json.loads(options.draw.read_text()), options.draw.with_suffix(".png")))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of what stops the parts
    end, results = time.monotonic() + options.seconds, {}
    stem = options.output / "unknown-gpu"
    with tempfile.TemporaryDirectory() as scratch:
        asked = [[part for part in stage if part.name in options.parts] for stage in STAGES]
        stages = run_stages(list(filter(None, asked)), end, Path(scratch), options.dry_run)
        with contextlib.closing(stages):  # which stops what still runs or waits
            for found in stages:
                results |= found
                stem = _write(results, options)  # what is there is there, whatever comes
    print(table(results, whole_gate=not options.dry_run))
    print(
        f"written to {stem}.json; {draw(json.loads(stem.with_suffix('.json').read_text()), stem.with_suffix('.png'))}"
    )
    wrong = [name for name in red(results) if not options.dry_run or name not in GATE or name in results]
    return 1 if wrong or failed(results) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=570, help="in all (570)")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help=f"{FIRST} and these: {', '.join(NAMES)}")
    parser.add_argument("--output", type=Path, default=HERE.parent / "results", help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny models: does it all run?")
    parser.add_argument("--draw", type=Path, metavar="FILE.json", help="only the picture of what was measured before")
    options = parser.parse_args()
    try:
        options.parts = chosen(options.only) if options.only else set(NAMES)
    except ValueError as error:
        parser.error(str(error))
    return options


def run_stages(stages: list[list[Planned]], end: float, scratch: Path, dry_run: bool) -> Generator[Results]:
    """Of one after the other, until `end` (time.monotonic()) at most; the parts of one run at the same time."""
    started: dict[str, _Running] = {}

    def start(stage: list[Planned]) -> list[_Running]:
        return [started.setdefault(part.name, _Running(part, scratch, dry_run)) for part in stage]

    try:
        ahead = start(stages[0])
        for stage, following in zip(stages, [*stages[1:], []], strict=True):
            running, ahead, results = ahead, [], {}
            for part, each in zip(stage, running, strict=True):
                seconds = min(part.most_s * (DRY_TIMES if dry_run else 1), end - time.monotonic() - TO_WRITE_S)
                if seconds < LEAST_S:
                    results[part.name] = {"failed": "no time was left for it"}
                    continue
                print(f"--- {part.name}, {seconds:.0f} s at most", flush=True)
                each.go(seconds)
            ahead = start(following)
            for each in running:
                if each.name not in results:
                    results[each.name] = each.result()
                if "failed" in results[each.name]:
                    print(f"    {each.name} FAILED: {results[each.name]['failed']}", flush=True)
            yield results
    finally:
        for each in started.values():
            each.stop()


class _Running:
    """A part's process, and all that it starts. It imports what it needs, and waits to be told to go."""

    def __init__(self, part: Planned, scratch: Path, dry_run: bool) -> None:
        self.name, self._seconds, self._started = part.name, 0.0, 0.0
        self._written, self._errors = scratch / f"{part.name}.json", (scratch / f"{part.name}.errors").open("w+")
        path = os.pathsep.join([*(str(ROOT / source) for source in SOURCES), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        environment |= AS_SERVED if part.as_served else {}
        size, device = ("tiny", "cpu") if dry_run else ("whole", "cuda")
        command = [sys.executable, str(PROGRAM), part.name, str(scratch), device, size]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stderr=self._errors, text=True, start_new_session=True
        )

    def go(self, seconds: float) -> None:
        """It is stopped after as many."""
        self._seconds, self._started = seconds, time.monotonic()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as told:  # broken: `result` says of what
            told.write(f"{seconds - BEFORE_S}\n")

    def result(self) -> dict[str, Any]:
        """What the part wrote down, also if it did not come to its end; then with `failed`, and why."""
        failed = ""
        try:
            code = self._process.wait(max(0.0, self._started + self._seconds - time.monotonic()))
            failed = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            failed = f"it was not done after {self._seconds:.0f} s"
        took = round(time.monotonic() - self._started, 1)
        self.stop()
        result = json.loads(self._written.read_text()) if self._written.exists() else {}  # whole: it is replaced
        self._errors.seek(0)
        errors = self._errors.read()[-KEPT_ERRORS:]
        self._errors.close()
        if failed and errors.strip():
            failed += f": {errors.strip().splitlines()[-1]}"
        told = {"failed": failed} if failed else {}
        return {**result, **told, "stderr": errors, "took_s": took}

    def stop(self) -> None:
        """It and what it started: compilers, engines."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._process.wait()


def _write(results: Results, options: argparse.Namespace) -> Path:
    """The file's path without its ending. Parts that were not run stay as they are in it."""
    name = results.get(FIRST, {}).get("name", "unknown-gpu")
    stem = options.output / (
        re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ("-dry-run" if options.dry_run else "")
    )
    file, ran = stem.with_suffix(".json"), {"date": _now(), "git": _commit(), "flags": sys.argv[1:]}
    before = json.loads(file.read_text())["parts"] if file.exists() else {}
    parts = {**before, **{name: {**result, "ran": ran} for name, result in results.items()}}
    whole = {**ran, "parts": {name: parts[name] for name in NAMES if name in parts}}
    options.output.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(whole, indent=1) + "\n")
    unfinished.replace(file)
    return stem


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _commit() -> str:
    """With "-dirty" where the tree has changes. Empty where there is no git, or no repository: a copy will do."""
    try:
        git = subprocess.run(
            ["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return git.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
