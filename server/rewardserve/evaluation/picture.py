"""One figure for each finding, and the three that matter most side by side. Needs matplotlib."""

import base64
import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rewardserve.evaluation.intervals import Share
from rewardserve.evaluation.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")
MODEL, GOOD, BAD, PLAIN = "#1f6f8b", "#3f8f4f", "#c0392b", "#7f7f7f"  # told apart by the colour-blind too
MAX_DOMAINS = 20  # in a picture; the JSON has all


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG, ready for an HTML page."""

    finding: str
    png: bytes

    @property
    def data_uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def pictures(report: Report) -> Iterator[Picture]:
    """One for each finding of the report that has something to show."""
    draw = {
        "ranking": (ranking, (7, 1.4 + 0.34 * len(_rows(report)))),
        "calibration": (calibration, (6, 4.6)),
        "length": (length, (7, 4.2)),
        "suites": (suites, (7, 1.4 + 0.34 * max(len(report.suites), 1))),
        "best_of_n": (best_of_n, (6.5, 4.2)),
        "disagreement": (disagreement, (6.5, 4.2)),
    }
    for finding, (function, size) in draw.items():
        if getattr(report, finding):
            yield Picture(finding, _png(report, function, size))


def overview(report: Report, path: Path) -> None:
    """Accuracy by domain, calibration and best-of-N, as far as there are; the suffix of `path` says which format."""
    from matplotlib.figure import Figure

    shown = [ranking, calibration, *([best_of_n] if report.best_of_n else [])]
    figure = Figure(figsize=(4.6 * len(shown), 3.9), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(shown)), shown, strict=True):
        draw(axes, report)
    about = report.about
    title = f"{about.model} {about.version} on {about.input}: {report.ranking.accuracy.num_prompts:,} prompts"
    figure.suptitle(_plain(f"{title}, {report.ranking.accuracy.num_pairs:,} pairs"), fontsize=10)
    with _boxes_for_strange_letters():
        figure.savefig(path, dpi=110)


def ranking(axes: "Axes", report: Report) -> None:
    rows = _rows(report)
    _shares(axes, [(name, found, MODEL) for name, found in rows])
    axes.set(xlabel="pairs ranked as judged, %  (95 % interval)", title="Ranking accuracy")
    left = min(45.0, *(100 * found.low - 3 for _, found in rows))
    axes.set_xlim(left, 104)


def calibration(axes: "Axes", report: Report) -> None:
    found = report.calibration
    sure = [100 * each.confidence for each in found.curve]
    right = [100 * each.accuracy.value for each in found.curve]
    total = sum(each.accuracy.num_pairs for each in found.curve)
    bars = axes.twinx()
    middles = [50 * (each.low + each.high) for each in found.curve]
    bars.bar(middles, [100 * each.accuracy.num_pairs / total for each in found.curve], 4.4, color="#dddddd")
    bars.set(ylim=(0, 100), ylabel="grey: share of the pairs, %")
    axes.set_zorder(bars.get_zorder() + 1)  # the curve before the bars
    axes.patch.set_visible(False)
    axes.plot([50, 100], [50, 100], "--", color=PLAIN, label="as sure as right")
    below = [value - 100 * each.accuracy.low for value, each in zip(right, found.curve, strict=True)]
    above = [100 * each.accuracy.high - value for value, each in zip(right, found.curve, strict=True)]
    label = f"the model: error {100 * found.raw.ece:.1f} %"
    axes.errorbar(sure, right, [below, above], fmt="o-", color=MODEL, capsize=3, markersize=4, label=label)
    axes.set(xlabel="how sure the model is, sigmoid(|margin|), %", ylabel="how often it is right, %")
    axes.set(title="Calibration", xlim=(49, 101), ylim=(min(30.0, *right) - 3, 102))
    axes.grid(True, alpha=0.25)
    axes.legend(loc="upper left", frameon=False, fontsize=8)


def best_of_n(axes: "Axes", report: Report) -> None:
    assert report.best_of_n is not None
    curve = report.best_of_n.curve
    numbers = [each.n for each in curve]
    axes.plot(numbers, [each.oracle for each in curve], "--", color=GOOD, label="best rated (oracle)")
    axes.plot(numbers, [each.rating for each in curve], "-", color=MODEL, label="best scored (the model)")
    sure = [each for each in curve if each.gain.low is not None and each.gain.high is not None]
    lows, highs = ([each.random + getattr(each.gain, end) for each in sure] for end in ("low", "high"))
    axes.fill_between([each.n for each in sure], lows, highs, color=MODEL, alpha=0.15, linewidth=0)
    axes.plot(numbers, [each.random for each in curve], ":", color=PLAIN, label="any of them")
    axes.set(xlabel="n, responses drawn for a prompt", ylabel="mean rating of the one that is kept")
    axes.set(title=f"Best of n, {report.best_of_n.num_prompts} prompts")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(True, alpha=0.25)
    axes.legend(loc="best", frameon=False, fontsize=8)


def length(axes: "Axes", report: Report) -> None:
    found = report.length
    times = [2**each.doublings for each in found.curve]
    axes.axhline(0, color=PLAIN, linewidth=0.8)
    axes.plot(times, [each.score for each in found.curve], "o-", color=MODEL)
    axes.set(xscale="log", xlabel="length, as a multiple of the prompt's mean response (geometric, characters)")
    axes.set(ylabel="score above the mean of the prompt's responses", title="Score against length, within prompts")
    _plain_ticks(axes, times)
    axes.grid(True, alpha=0.25)


def suites(axes: "Axes", report: Report) -> None:
    from matplotlib.lines import Line2D

    colours = {"adversarial": MODEL, "known_bad": BAD}
    rows = [(each.name.replace("_", " "), each.untouched_wins, colours[each.kind]) for each in report.suites]
    _shares(axes, rows)
    axes.set(xlabel="untouched answer scores higher, %  (95 % interval)", title="Suites made from the best answers")
    axes.set_xlim(-2, 104)
    names = {MODEL: "changed in looks only", BAD: "broken"}
    keys = [Line2D([], [], color=colour, marker="o", label=name) for colour, name in names.items()]
    axes.legend(handles=keys, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)


def disagreement(axes: "Axes", report: Report) -> None:
    assert report.disagreement is not None
    curve = report.disagreement.curve
    kept = [100 * each.share_of_pairs for each in curve]
    axes.plot(kept, [100 * each.accuracy.value for each in curve], "o-", color=MODEL)
    lows, highs = ([100 * getattr(each.accuracy, end) for each in curve] for end in ("low", "high"))
    axes.fill_between(kept, lows, highs, color=MODEL, alpha=0.15, linewidth=0)
    axes.set(xlabel="pairs kept, those with the smallest std for their margin first, %", ylabel="accuracy on them, %")
    axes.set(title=f"Does disagreement tell errors? AUROC {report.disagreement.auroc_of_preferences:.2f}")
    axes.grid(True, alpha=0.25)


def _rows(report: Report) -> list[tuple[str, Share]]:
    found = report.ranking
    rows = [("all", found.accuracy)]
    if found.spillover:
        rows += [("in domain", found.spillover.in_domain), ("out of domain", found.spillover.out_of_domain)]
    if len(found.by_domain) > 1:
        rows += list(found.by_domain.items())[:MAX_DOMAINS]
    return rows


def _shares(axes: "Axes", rows: Sequence[tuple[str, Share, str]]) -> None:
    """A line for each, from the top: its value, its interval, and its name on the left."""
    for place, (_, found, colour) in enumerate(rows):
        ends = [[100 * (found.value - found.low)], [100 * (found.high - found.value)]]
        axes.errorbar([100 * found.value], [place], xerr=ends, fmt="o", color=colour, capsize=3, markersize=5)
        axes.annotate(
            f"{100 * found.value:.1f}", (100 * found.value, place), (0, 5), textcoords="offset points", ha="center",
            fontsize=8,
        )  # fmt: skip
    axes.axvline(50, color=PLAIN, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), [_short(name) for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.grid(True, axis="x", alpha=0.25)


def _short(name: str) -> str:
    return _plain(name if len(name) <= 24 else name[:23] + "…")


def _plain(text: str) -> str:
    """A name may hold anything: `$` would start a formula."""
    return text.replace("$", r"\$")


def _plain_ticks(axes: "Axes", values: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    powers = [2.0**power for power in range(-8, 9)]
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in powers if min(values) / 2 < tick < max(values) * 2]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x" if value >= 1 else f"1/{1 / value:g}x")


def _png(report: Report, draw: Callable[["Axes", Report], None], size: tuple[float, float]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure.add_subplot(), report)
    file = io.BytesIO()
    with _boxes_for_strange_letters():
        figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


@contextlib.contextmanager
def _boxes_for_strange_letters() -> Iterator[None]:
    """What the font does not have is drawn as a box; a warning for each letter would say no more."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield
