"""Latency against load, as a picture on paper and as one in a terminal."""

from collections.abc import Sequence
from pathlib import Path

from rewardserve.loadtest.report import Figures, Report, figure_of, prefixes

SHADES = "█▓░"  # up to the p50, on to the p90, on to the p99
PLAIN_SHADES = "#=-"  # for a terminal that does not know those
FORMATS = (".png", ".svg", ".pdf")
COLOURS = {"p99": "#c0392b", "p90": "#e08e0b", "p50": "#1f6f8b"}


def curve(report: Report) -> list[Figures]:
    """What the picture shows, by load: the open loop, where there is one, for a closed one is never late."""
    shown = [run for run in report.runs if run.p50_ms is not None]
    shown = [run for run in shown if run.mode == "open"] or shown
    return sorted(shown, key=lambda run: run.offered)


def draw(report: Report, path: Path) -> None:
    """p50, p90 and p99 against the load. Needs matplotlib; the suffix of `path` says which format."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    runs = curve(report)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    loads = [_load_of(run) for run in runs]
    for name, colour in COLOURS.items():
        axes.plot(loads, [getattr(run, f"{name}_ms") for run in runs], "o-", color=colour, label=name)
    for index, run in enumerate(run for run in runs if run.num_failed):
        label = "_" * bool(index) + "some requests failed"  # one of them in the legend
        axes.axvline(_load_of(run), color=COLOURS["p99"], alpha=0.15, linewidth=6, label=label)
    if report.capacity:
        axes.axvline(report.capacity, color="grey", linestyle="--", label="capacity (closed loop)")
    axes.set(yscale="log", xlabel=f"load, {_unit(runs)}", ylabel="latency from the scheduled moment, ms")
    axes.set_xlim(left=0)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, alpha=0.25)
    axes.legend(loc="upper left", frameon=False)
    axes.set_title(_title(report), fontsize=9, loc="left")
    figure.savefig(path, dpi=150)


def terminal_picture(report: Report, width: int, encoding: str = "utf-8") -> str:
    """A bar for each load: solid up to the p50, shaded on to the p90, faint on to the p99."""
    runs = curve(report)
    if not runs:
        return ""
    shades = SHADES if _can_show(SHADES, encoding) else PLAIN_SHADES
    labels = [_label(run) for run in runs]
    room = max(len(label) for label in labels)
    longest_ms = max(run.p99_ms or 0.0 for run in runs)
    columns = max(10, width - room - len(figure_of(longest_ms)) - 2)
    legend = f"{shades[0]} p50  {shades[1]} p90  {shades[2]} p99, ms"
    lines = [f"{_unit(runs).rjust(room)} {legend}"]
    for label, run in zip(labels, runs, strict=True):
        bar = _bar(run, columns / longest_ms if longest_ms else 0.0, shades)
        lines.append(f"{label.rjust(room)} {bar} {figure_of(run.p99_ms)}")
    return "\n".join(lines)


def _bar(run: Figures, columns_per_ms: float, shades: str) -> str:
    bar = ""
    for shade, value in zip(shades, (run.p50_ms, run.p90_ms, run.p99_ms), strict=True):
        bar += shade * (round((value or 0.0) * columns_per_ms) - len(bar))
    return bar or shades[0]


def _load_of(run: Figures) -> float:
    return run.offered if run.mode == "open" else run.requests_per_s


def _unit(runs: Sequence[Figures]) -> str:
    return "requests/s" if runs and runs[0].mode == "open" else "callers: requests/s"


def _label(run: Figures) -> str:
    if run.mode == "closed":
        return f"{run.offered:g}: {figure_of(run.requests_per_s)}"
    share = f"{run.share_of_capacity:.0%} " if run.share_of_capacity is not None else ""
    return f"{share}{figure_of(run.offered)}"


def _title(report: Report) -> str:
    c = report.circumstances
    model = f"{c.model} {c.model_version}: {c.architecture}, {c.dtype} on {c.device}, {c.execution_path}"
    work = f"{c.workload}, {c.pairs_per_request:.3g} pairs per request, {prefixes(c.cold_fraction)}"
    return f"{model}\n{work}\nrewardserve {c.rewardserve}, {c.date}, load from {c.cpu}"


def _can_show(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
