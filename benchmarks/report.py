"""What was measured: a table for people, a picture, and a file that a claim can be held to."""

import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

import matplotlib
import psutil
from measure import Plan, ProviderResult, Result, WorkloadResult
from providers import PROVIDERS
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).parents[1]
DEFINITIONS = {
    "tokens": "prompt + response of every pair",
    "tokens_shared": "the same with every common beginning counted once, across groups too",
    "limit_pairs_per_s": "pairs over the seconds of the least matrix products at gflops_per_s: every common beginning "
    "once, causal attention, in the last layer keys and values of all tokens but the rest of scored tokens only",
    "pairs_per_s": "all groups at once, prompts new to every cache; from the median of the rounds",
    "seconds": "of each round",
    "p50_ms": "one group sent alone to an idle provider; quantiles of latency_ms",
    "peak_bytes": "peak resident memory of the provider's processes while it scored the workload",
    "mean_abs_err": "of the scores, from Hugging Face one by one in fp32",
}
OURS, PEER, LIMIT = "#1f6feb", "#9aa4b2", "#b3261e"


def device_name(device: str) -> str:
    """As the makers call it."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def file_stem(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") or device


def as_json(plan: Plan, result: Result) -> dict[str, Any]:
    return {
        "machine": {
            "device": device_name(plan.job.device),
            "threads": plan.job.threads,
            "cores_of_the_machine": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **result.versions},
        "git": _git(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": {"name": Path(plan.job.model).name, "dtype": plan.job.dtype},
        "rounds": plan.rounds,
        "definitions": DEFINITIONS,
        "workloads": {each.work.workload.name: _workload(each) for each in result.workloads},
    }


def _workload(result: WorkloadResult) -> dict[str, Any]:
    return {
        "description": result.work.workload.description,
        "groups": len(result.work.workload.groups),
        "pairs": result.work.num_pairs,
        "tokens": result.num_tokens,
        "tokens_shared": result.shared.tokens,
        "limit_pairs_per_s": round(result.limit_pairs_per_s, 3),
        "gflops_per_s": {name: round(rate / 1e9, 1) for name, rate in result.flops_per_s.items()},
        "providers": {name: _provider(result, each) for name, each in result.providers.items()},
    }


def _provider(result: WorkloadResult, entry: ProviderResult) -> dict[str, Any]:
    if entry.failed:
        return {"failed": entry.failed}
    assert entry.accuracy is not None
    accuracy = entry.accuracy
    errors = {"max_abs_err": _number(accuracy.max_abs_err), "mean_abs_err": _number(accuracy.mean_abs_err)}
    if not accuracy.right:
        return {"wrong": True, **errors}
    return {
        "pairs_per_s": round(_pairs_per_s(result, entry), 3),
        "p50_ms": round(1e3 * _quantile(entry.latencies, 0.5), 2),
        "p99_ms": round(1e3 * _quantile(entry.latencies, 0.99), 2),
        "peak_bytes": entry.peak_bytes,
        **errors,
        "seconds": [round(seconds, 4) for seconds in entry.seconds],
        "latency_ms": [round(1e3 * seconds, 2) for seconds in entry.latencies],
    }


def _number(value: float) -> float | None:
    """JSON knows no infinity: where a score is missing there is no error to state."""
    return value if math.isfinite(value) else None


def _pairs_per_s(result: WorkloadResult, entry: ProviderResult) -> float:
    return result.work.num_pairs / statistics.median(entry.seconds)


def _measured(result: WorkloadResult) -> dict[str, ProviderResult]:
    return {name: entry for name, entry in result.providers.items() if entry.seconds and not entry.failed}


def _quantile(values: list[float], q: float) -> float:
    """Linear between the two nearest."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def _git() -> str:
    """The commit, and whether what ran differs from it."""

    def ask(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True).stdout.strip()

    changed = ask("status", "--porcelain", "--", "server", "kernels", "benchmarks/*.py", "benchmarks/peers")
    return ask("rev-parse", "--short", "HEAD") + ("-changed" if changed else "")


def print_tables(result: Result, console: Console) -> None:
    for each in result.workloads:
        console.print(_table(each))


def _table(result: WorkloadResult) -> Table:
    work = result.work.workload
    table = Table(
        title=f"[bold]{work.name}[/]: {work.description}\n{work.num_pairs} pairs in {len(work.groups)} groups, "
        f"{result.num_tokens} tokens, {result.shared.tokens} of them once",
        caption=f"the machine's limit: {result.limit_pairs_per_s:.1f} pairs/s; p50 and p99: one group alone",
        title_justify="left",
    )
    table.add_column("provider", no_wrap=True)
    for column in ("pairs/s", "slowest - fastest", "of limit", "ours is x", "p50 ms", "p99 ms", "peak MB", "mean err"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("max err", justify="right", no_wrap=True)
    ours = result.providers.get("rewardserve_engine")
    for name, entry in result.providers.items():
        table.add_row(name, *_cells(result, entry, ours), style="bold" if PROVIDERS[name].ours else "")
    return table


def _cells(result: WorkloadResult, entry: ProviderResult, ours: ProviderResult | None) -> list[str]:
    if entry.failed:
        return [f"[red]{_first_line(entry.failed)}[/]"]
    assert entry.accuracy is not None
    errors = [f"{entry.accuracy.mean_abs_err:.4f}", f"{entry.accuracy.max_abs_err:.4f}"]
    if not entry.accuracy.right:
        return ["[red]WRONG[/]", *[""] * 6, *errors]
    rate = _pairs_per_s(result, entry)
    pairs = result.work.num_pairs
    return [
        f"{rate:.2f}",
        f"{pairs / max(entry.seconds):.2f} - {pairs / min(entry.seconds):.2f}",
        f"{rate / result.limit_pairs_per_s:.0%}",
        f"{_pairs_per_s(result, ours) / rate:.2f}" if ours and ours.seconds else "",
        f"{1e3 * _quantile(entry.latencies, 0.5):.0f}",
        f"{1e3 * _quantile(entry.latencies, 0.99):.0f}",
        f"{entry.peak_bytes / 1e6:.0f}",
        *errors,
    ]


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0][:60]


def draw(result: Result, title: str, file: Path) -> None:
    """One panel a workload: a bar for each provider with the spread of its rounds, and the machine's limit."""
    columns = min(3, len(result.workloads))
    rows = -(-len(result.workloads) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.4 * rows), squeeze=False, layout="constrained")
    for axis, each in zip(axes.flat, result.workloads, strict=False):
        _draw_workload(axis, each)
    for axis in axes.flat[len(result.workloads) :]:
        axis.set_visible(False)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _draw_workload(axis: Axes, result: WorkloadResult) -> None:
    measured = _measured(result)
    rates = {name: _pairs_per_s(result, entry) for name, entry in measured.items()}
    pairs = result.work.num_pairs
    below = [rates[name] - pairs / max(entry.seconds) for name, entry in measured.items()]
    above = [pairs / min(entry.seconds) - rates[name] for name, entry in measured.items()]
    bars = axis.barh(
        list(rates),
        list(rates.values()),
        color=[OURS if PROVIDERS[name].ours else PEER for name in rates],
        xerr=[below, above],
        error_kw={"ecolor": "#444444", "capsize": 2, "lw": 1},
    )
    axis.bar_label(bars, [f"{rate:.1f}" for rate in rates.values()], padding=6, fontsize=8)
    axis.axvline(result.limit_pairs_per_s, color=LIMIT, ls="--", lw=1.2)
    axis.annotate(
        f"limit {result.limit_pairs_per_s:.1f} ",
        (result.limit_pairs_per_s, 1.0),
        xycoords=("data", "axes fraction"),
        ha="right",
        va="top",
        color=LIMIT,
        fontsize=8,
    )
    axis.set_xlim(0, 1.12 * max(result.limit_pairs_per_s, *rates.values()))
    axis.invert_yaxis()
    axis.set_title(result.work.workload.name, fontsize=10)
    axis.set_xlabel("pairs/s", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def write(plan: Plan, result: Result, folder: Path, stem: str) -> Path:
    """Writes STEM.json and STEM.png; returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{stem}.json"
    file.write_text(json.dumps(as_json(plan, result), indent=1) + "\n")
    title = f"{Path(plan.job.model).name}, {plan.job.dtype}, {device_name(plan.job.device)}, {plan.job.threads} threads"
    draw(result, title, folder / f"{stem}.png")
    return file
