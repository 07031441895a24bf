"""The findings of an evaluation as a terminal of 80 columns shows them: one line each."""

from collections.abc import Iterator
from functools import partial

from rich.table import Table
from rich.text import Text

from rewardserve.cli.table import TABLE, make_console, one_line
from rewardserve.evaluation.bands import Verdict
from rewardserve.evaluation.intervals import Estimate, Share
from rewardserve.evaluation.report import Report

STYLES = {"unusable": "bold red", "weak": "yellow", "usable": "", "good": "green"}
MAX_DOMAINS = 12  # report.json has all

Line = tuple[str, str, str, str]  # finding, value, interval, of how much


def show(report: Report) -> None:
    """On stdout."""
    console = make_console()
    print_line = partial(console.print, soft_wrap=True)
    about, accuracy = report.about, report.ranking.accuracy
    pairs = f"{accuracy.num_pairs:,} pairs of {accuracy.num_prompts:,} prompts"
    print_line(Text(one_line(f"{about.model} {about.version} on {about.input}: {pairs}")))
    table = Table(**TABLE)
    table.add_column("finding", no_wrap=True)
    for column in ("value", "95 % interval", "of"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in _lines(report):
        table.add_row(*map(Text, line))
    console.print(table)
    print_line()
    console.print(_verdicts(report))
    print_line()


def _verdicts(report: Report) -> Table:
    table = Table(**TABLE)
    for column, justify in (("usual bands", "left"), ("value", "right"), ("", "left")):
        table.add_column(column, justify=justify, no_wrap=True)
    for each in report.verdicts:
        table.add_row(Text(each.figure), Text(f"{each.value:.3f}"), Text(_band(each), STYLES[each.band]))
    return table


def _band(each: Verdict) -> str:
    return each.band if each.is_sure or each.low is None else f"{each.band}, not for sure"


def _lines(report: Report) -> Iterator[Line]:
    yield _share("ranking accuracy", report.ranking.accuracy)
    if len(report.ranking.by_domain) > 1:
        for name, each in list(report.ranking.by_domain.items())[:MAX_DOMAINS]:
            yield _share(f"  {one_line(name)[:28]}", each)
    if report.ranking.spillover:
        yield _estimate("  in domain less out of domain", report.ranking.spillover.difference, percent=True)
    yield _estimate("calibration error", report.calibration.ece, percent=True)
    for kind, errors in report.calibration.fitted.items():
        yield f"  after a fit: {kind}", f"{100 * errors.ece:.1f} %", "", ""
    if report.agreement:
        yield _estimate("Spearman with ratings", report.agreement.spearman)
        yield _estimate("Kendall's tau-b", report.agreement.kendall)
    yield from _length(report)
    for suite in report.suites:
        yield _share(f"untouched beats {suite.name.replace('_', ' ')}", suite.untouched_wins)
    if report.best_of_n and len(report.best_of_n.curve) > 1:
        yield from _best_of_n(report)
    if report.disagreement:
        yield "AUROC of disagreement", f"{report.disagreement.auroc_of_preferences:.3f}", "", ""
        yield "  of the std of margins", f"{report.disagreement.auroc_of_std:.3f}", "", ""
        if report.disagreement.auroc_beyond_margin is not None:
            yield "  of that, at like margins", f"{report.disagreement.auroc_beyond_margin:.3f}", "", ""
        yield "  of that over the margin", f"{report.disagreement.auroc:.3f}", "", ""
        yield "  of the margin alone", f"{report.disagreement.auroc_of_small_margin:.3f}", "", ""


def _length(report: Report) -> Iterator[Line]:
    found = report.length
    if found.score_with_characters:
        yield _estimate("score with length (Spearman)", found.score_with_characters)
    if found.rating_with_characters:
        yield _estimate("  rating with length", found.rating_with_characters)
    for name, each in (
        ("accuracy, preferred is longer", found.preferred_is_longer),
        ("  preferred is shorter", found.preferred_is_shorter),
        ("  lengths are alike", found.alike),
        ("  length taken out of the score", found.length_removed),
        ("  of length alone", found.longer_is_better),
    ):
        if each:
            yield _share(name, each)


def _best_of_n(report: Report) -> Iterator[Line]:
    assert report.best_of_n is not None
    for each in report.best_of_n.curve:
        if each.n in (4, 16) or (each.n == len(report.best_of_n.curve) and each.n not in (4, 16)):
            possible = f"{each.oracle - each.random:+.3f} possible"
            yield f"best of {each.n} gains in rating", f"{each.gain.value:+.3f}", _range(each.gain, 1, 3), possible


def _share(name: str, each: Share) -> Line:
    ties = f", {each.num_ties:,} ties" if each.num_ties else ""
    interval = f"{100 * each.low:.1f} to {100 * each.high:.1f}"
    return name, f"{100 * each.value:.1f} %", interval, f"{each.num_pairs:,} pairs{ties}"


def _estimate(name: str, each: Estimate, percent: bool = False) -> Line:
    value = f"{100 * each.value:.1f} %" if percent else f"{each.value:.3f}"
    interval = _range(each, 100, 1) if percent else _range(each, 1, 3)
    return name, value, interval, f"{each.num_prompts:,} prompts"


def _range(each: Estimate, times: float, places: int) -> str:
    if each.low is None or each.high is None:
        return ""
    return f"{times * each.low:.{places}f} to {times * each.high:.{places}f}"
