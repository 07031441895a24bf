"""Runs -> figures, the sentences about them, and rows of JSON or CSV that tell their circumstances."""

import csv
import io
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rewardserve.client import ModelInfo
from rewardserve.loadtest.loadgen import OpenLoop, Run, fell_behind, percentile

FEW = 100  # requests; the p99 of fewer is the slowest of them
KEPT_UP = 0.9  # of the arrivals; less, and a queue grew as long as the run went on
PROMISED_SHARE, PROMISED_RATIO = 0.8, 5.0  # at this share of the capacity, p99 stays under so many times p50


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What a figure depends on, besides the load. The machine is the load generator's; the server may be elsewhere."""

    date: str
    rewardserve: str
    grpcio: str
    protobuf: str
    python: str
    cpu: str
    num_cores: int  # that the generator may use
    endpoint: str
    model: str
    model_version: str
    architecture: str
    execution_path: str
    dtype: str
    device: str
    workload: str
    num_groups: int
    groups_per_request: int
    pairs_per_request: float
    cold_fraction: float
    seed: int


@dataclass(frozen=True, slots=True)
class Figures:
    """One run in numbers. Latencies are of the requests answered; NaN never: where there are none, None."""

    mode: str  # "open" or "closed"
    offered: float  # requests per second that arrived by schedule, or callers
    share_of_capacity: float | None
    duration_s: float
    num_answered: int
    num_failed: int
    failures: dict[str, int]  # by status
    requests_per_s: float
    pairs_per_s: float
    tokens_per_s: float
    p10_ms: float | None
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    generator_lag_p99_ms: float | None
    generator_fell_behind: bool
    cached_share: float | None  # of the prompts' tokens
    interrupted: bool

    @property
    def p99_over_p50(self) -> float | None:
        return self.p99_ms / self.p50_ms if self.p99_ms and self.p50_ms else None

    @property
    def kept_up(self) -> bool:
        """Whether requests were answered, or refused, about as fast as they arrived.

        Those under way at the end count by their share: where all take as long as the fastest tenth did, that is how
        far they are then.
        """
        arrived_per_s = (self.num_answered + self.num_failed) / self.duration_s
        taken = (self.p10_ms or 0.0) / 1000 / self.duration_s
        done = 1 - taken / 2 if taken < 1 else 1 / (2 * taken)
        return self.requests_per_s + self.num_failed / self.duration_s >= KEPT_UP * done * arrived_per_s


@dataclass(frozen=True, slots=True)
class Report:
    circumstances: Circumstances
    runs: tuple[Figures, ...]
    capacity: float | None = None  # requests per second, where a sweep has looked for it

    def at(self, share: float) -> Figures | None:
        return next((run for run in self.runs if run.share_of_capacity == share), None)

    def rows(self) -> list[dict[str, Any]]:
        """Flat: one for each run, with everything it depends on."""
        about = {**asdict(self.circumstances), "capacity_requests_per_s": self.capacity}
        return [{**asdict(run), "p99_over_p50": run.p99_over_p50, "kept_up": run.kept_up, **about} for run in self.runs]


def circumstances(
    model: ModelInfo, workload: str, num_groups: int, pairs_per_request: float, **chosen: Any
) -> Circumstances:
    """`chosen`: groups_per_request, cold_fraction and seed, as they were asked for."""
    return Circumstances(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        **{package: version(package) for package in ("rewardserve", "grpcio", "protobuf")},
        python=platform.python_version(),
        cpu=_cpu_name(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        endpoint=model.endpoint,
        model=model.name,
        model_version=model.version,
        architecture=model.architecture,
        execution_path=model.path,
        dtype=model.dtype,
        device=model.device,
        workload=workload,
        num_groups=num_groups,
        pairs_per_request=pairs_per_request,
        **chosen,
    )


def figures(run: Run, share_of_capacity: float | None = None) -> Figures:
    is_open = isinstance(run.load, OpenLoop)
    return Figures(
        mode="open" if is_open else "closed",
        offered=run.load.requests_per_s if isinstance(run.load, OpenLoop) else run.load.num_callers,
        share_of_capacity=share_of_capacity,
        duration_s=run.duration_s,
        num_answered=run.num_answered,
        num_failed=run.num_failed,
        failures={status: failure.count for status, failure in run.failures.items()},
        requests_per_s=run.requests_per_s,
        pairs_per_s=run.pairs_per_s,
        tokens_per_s=run.tokens_per_s,
        p10_ms=_ms(run.latencies_s, 0.1),
        p50_ms=_ms(run.latencies_s, 0.5),
        p90_ms=_ms(run.latencies_s, 0.9),
        p99_ms=_ms(run.latencies_s, 0.99),
        max_ms=_ms(run.latencies_s, 1.0),
        generator_lag_p99_ms=_ms(run.lags_s, 0.99),
        generator_fell_behind=fell_behind(run),
        cached_share=run.num_cached_tokens / run.num_prompt_tokens if run.num_prompt_tokens else None,
        interrupted=run.interrupted,
    )


def _ms(ascending_s: Sequence[float], share: float) -> float | None:
    return percentile(ascending_s, share) * 1000 if ascending_s else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# -- in words ----------------------------------------------------------------------------------------------------------


def figure_of(value: float | None) -> str:
    """Three figures are as many as a measurement carries."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def prefixes(cold_fraction: float) -> str:
    return {0.0: "warm prefixes", 1.0: "cold prefixes"}.get(cold_fraction, f"{cold_fraction:.0%} cold prefixes")


def load_of(run: Figures) -> str:
    """What was offered."""
    cut = ", cut" if run.interrupted else ""
    if run.mode == "closed":
        return f"{run.offered:.0f} caller{'' if run.offered == 1 else 's'}{cut}"
    share = "" if run.share_of_capacity is None else f"{run.share_of_capacity:.0%}: "
    return f"{share}{figure_of(run.offered)}/s{cut}"


def verdict(result: Report) -> Iterator[str]:
    """Whether the promise holds, where a sweep has measured that."""
    run = result.at(PROMISED_SHARE)
    if run is None or run.p99_over_p50 is None or result.capacity is None:
        return
    holds = f"{'under' if run.p99_over_p50 < PROMISED_RATIO else 'NOT under'} {PROMISED_RATIO:g} x"
    if not run.kept_up:
        holds = "which says nothing, for the server did not keep up"  # in a growing queue all wait about as long
    yield (
        f"at {PROMISED_SHARE:.0%} of the capacity ({figure_of(run.offered)} of "
        f"{figure_of(result.capacity)} requests/s): p50 {figure_of(run.p50_ms)} ms, p99 "
        f"{figure_of(run.p99_ms)} ms; p99 is {run.p99_over_p50:.1f} x p50, {holds}"
    )
    if run.num_answered < FEW:
        enough_s = math.ceil(FEW / max(run.requests_per_s, 1e-9))
        yield f"  of {run.num_answered} requests, too few for a p99; --duration {enough_s} gives {FEW}"


def remarks(result: Report, examples: Mapping[str, str]) -> Iterator[str]:
    """What a reader must know of the figures. `examples`: by status, the first message of a failure."""
    if not result.runs:
        yield "nothing was measured"
    for status, message in examples.items():
        count = sum(run.failures.get(status, 0) for run in result.runs)
        yield f"failed: {count} x {status}: {message}"
    queued = [load_of(run) for run in result.runs if run.mode == "open" and run.num_answered and not run.kept_up]
    if queued:
        yield (
            f"the server did not keep up at {', '.join(queued)}: these latencies grow with --duration; "
            "is other work on its machine?"
        )
    late = [load_of(run) for run in result.runs if run.generator_fell_behind]
    if late:
        yield (
            f"the generator fell behind at {', '.join(late)}: a part of these latencies is its own; "
            "give it a core for itself, or more --groups-per-request at a lower rate"
        )


# -- files -------------------------------------------------------------------------------------------------------------


def write_rows(report: Report, path: Path) -> None:
    """`.csv`: rows are added to what is there. Anything else: one JSON object, in place of what was there."""
    if path.suffix == ".csv":
        _append_csv(report, path)
        return
    values = {"capacity_requests_per_s": report.capacity, "rows": report.rows()}
    path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def can_append(path: Path) -> bool:
    """Whether `path`, a .csv, is new or has our columns."""
    if not path.exists() or not path.stat().st_size:
        return True
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return next(csv.reader(file), []) == _columns()


def _append_csv(report: Report, path: Path) -> None:
    is_new = not path.exists() or not path.stat().st_size
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(), lineterminator="\n")
    if is_new:
        writer.writeheader()
    writer.writerows({**row, "failures": json.dumps(row["failures"])} for row in report.rows())
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text.getvalue())


def _columns() -> list[str]:
    """In the order of `Report.rows`."""
    about = [field.name for field in fields(Circumstances)]
    return [*(field.name for field in fields(Figures)), "p99_over_p50", "kept_up", *about, "capacity_requests_per_s"]
