"""The report as one page that needs nothing else: no script, no font, no address of anything."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape

from rewardserve.evaluation.bands import Band
from rewardserve.evaluation.intervals import Estimate, Share
from rewardserve.evaluation.picture import Picture
from rewardserve.evaluation.report import Report

COLOURS: dict[Band, str] = {"unusable": "#c0392b", "weak": "#b9770e", "usable": "#1f6f8b", "good": "#2e7d4f"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff }
body { max-width: 60em; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em }
h2 { font-size: 1.15em; margin-top: 2.2em; border-top: 1px solid #ddd; padding-top: 1em }
table { border-collapse: collapse; margin: 0.8em 0 }
td, th { padding: 0.25em 1em 0.25em 0; vertical-align: top; text-align: left }
th { color: #666; font-weight: normal; border-bottom: 1px solid #ccc }
td.n, th.n { text-align: right; white-space: nowrap }
img { max-width: 100%; height: auto }
code { white-space: nowrap; font: inherit }
.band { color: #fff; border-radius: 3px; padding: 0 0.5em }
.small { color: #666; font-size: 0.85em }
"""

Cell = str  # already escaped


def page(report: Report, pictures: Sequence[Picture]) -> str:
    """A whole HTML document. What comes from the user's data or a server is escaped."""
    drawn = {picture.finding: picture for picture in pictures}
    title = f"{report.about.model} {report.about.version}"
    body = [f"<h1>Reward model {escape(title)}</h1>", _lead(report), _verdicts(report)]
    for finding, (heading, parts) in _SECTIONS.items():
        if getattr(report, finding):
            body += [f"<h2>{heading}</h2>", _image(drawn.get(finding), heading), *parts(report)]
    body += ["<h2>What the figures depend on</h2>", _about(report)]
    head = f'<meta charset="utf-8"><title>{escape(title)}: evaluation</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _lead(report: Report) -> str:
    found = report.ranking.accuracy
    gap = f", judged to differ by more than {report.about.min_gap:g}" if report.about.min_gap else ""
    odds = " Scores are probabilities, and are judged by their log-odds." if report.about.kind == "probability" else ""
    return (
        f"<p>On {found.num_pairs:,} pairs of {found.num_prompts:,} prompts of {escape(report.about.input)}{gap}. "
        "Intervals are of 95 % and count prompts, not pairs, since pairs of one prompt are not independent."
        f"{odds}</p>"
    )


def _verdicts(report: Report) -> str:
    rows = []
    for each in report.verdicts:
        band = f'<span class="band" style="background: {COLOURS[each.band]}">{each.band}</span>'
        unsure = "" if each.is_sure else '<br><span class="small">its interval reaches another band</span>'
        if each.low is None:
            unsure = '<br><span class="small">no interval</span>'
        marks = " / ".join(f"{mark:g}" for mark in each.marks)
        source = f'<br><span class="small">weak, usable, good from {marks}; {escape(each.source)}</span>'
        figures = [f"{each.value:.3f}", _range(each.low, each.high, 3)]
        rows.append([escape(each.figure), *figures, band + unsure, _with_options(each.reason) + source])
    return _table(["figure", "value#", "95 % interval#", "usual band", "why"], rows)


# -- the findings ------------------------------------------------------------------------------------------------------


def _ranking(report: Report) -> Iterator[str]:
    found = report.ranking
    yield "<p>How often the response that was judged better has the higher score. Ties count one half.</p>"
    named = {"all": found.accuracy, **(found.by_domain if len(found.by_domain) > 1 else {})}
    if found.spillover:
        named |= {"(in domain)": found.spillover.in_domain, "(out of domain)": found.spillover.out_of_domain}
    yield _shares(named)
    if found.spillover:
        difference = found.spillover.difference
        yield f"<p>In domain less out of domain: {_points(difference)}.</p>"


def _calibration(report: Report) -> Iterator[str]:
    found = report.calibration
    yield (
        "<p>Bradley and Terry's probability is sigmoid(margin). Pairs are looked at from the side of the higher score; "
        f"a point under the line is a model that is too sure. Expected calibration error {100 * found.raw.ece:.1f} % "
        f"({_range(found.ece.low, found.ece.high, 1, 100)}); a perfect model would show "
        f"{100 * found.ece_by_chance:.1f} % on so many pairs. The temperature that fits best is "
        f"{found.temperature:.3g}: above 1 the model is too sure, below 1 too shy.</p>"
    )
    rows = [
        [name, f"{each.ece:.4f}", f"{each.brier:.4f}", f"{each.log_loss:.4f}"]
        for name, each in {"as it is": found.raw, **found.fitted}.items()
    ]
    yield _table(["probability", "calibration error#", "Brier#", "log loss#"], rows)
    if found.fitted:
        yield '<p class="small">Fits are judged on prompts they have not seen.</p>'


def _agreement(report: Report) -> Iterator[str]:
    found = report.agreement
    assert found is not None
    yield "<p>Rank correlation of score and rating: of each prompt, averaged, and of all responses together.</p>"
    rows = [
        ["Spearman", _estimate(found.spearman), f"{found.spearman_across_prompts:.3f}"],
        ["Kendall's tau-b", _estimate(found.kendall), f"{found.kendall_across_prompts:.3f}"],
    ]
    yield _table(["", "within prompts#", "across prompts#"], rows)
    yield f"<p>{found.num_responses:,} responses to {found.spearman.num_prompts:,} prompts.</p>"


def _length(report: Report) -> Iterator[str]:
    found = report.length
    correlations = {
        "score and characters": found.score_with_characters,
        "score and tokens": found.score_with_tokens,
        "rating and characters": found.rating_with_characters,
    }
    rows = [[name, _estimate(each)] for name, each in correlations.items() if each]
    yield _table(["rank correlation within prompts", "Spearman#"], rows)
    yield (
        f"<p>A response twice as long scores {found.score_per_doubling:+.3f} more, compared with others to its prompt. "
        "Accuracy by which of the two is longer, 10 % of difference being alike:</p>"
    )
    accuracies = {
        "the preferred is longer": found.preferred_is_longer,
        "the preferred is shorter": found.preferred_is_shorter,
        "both are alike": found.alike,
        "all, length taken out of the score": found.length_removed,
        "all, by length alone: the longer one wins": found.longer_is_better,
    }
    yield _shares({name: each for name, each in accuracies.items() if each})
    if found.balanced:
        yield f"<p>Mean of the first two, where length alone would get 50 %: {_points(found.balanced)}.</p>"


def _suites(report: Report) -> Iterator[str]:
    yield (
        "<p>The best answer to each prompt against the same one spoilt. Adversarial changes add nothing but looks; "
        "known-bad ones break the answer.</p>"
    )
    rows = [
        [
            escape(each.name.replace("_", " ")),
            "adversarial" if each.kind == "adversarial" else "known bad",
            escape(each.description),
            *_share_cells(each.untouched_wins),
            f"{each.median_margin:+.3f}",
        ]
        for each in report.suites
    ]
    yield _table(["suite", "kind", "the answer", *SHARE_COLUMNS, "median margin#"], rows)


def _best_of_n(report: Report) -> Iterator[str]:
    assert report.best_of_n is not None
    curve, share = report.best_of_n.curve, report.best_of_n.share_of_oracle
    yield "<p>Expected rating of the best scored of n responses drawn without replacement, exactly.</p>"
    shown = [each for each in curve if each.n in (1, 2, 4, 8, 16, 32, len(curve))]
    rows = [
        [str(each.n), *(f"{value:.3f}" for value in (each.random, each.rating, each.oracle)), _estimate(each.gain)]
        for each in shown
    ]
    yield _table(["n#", "any#", "best scored#", "best rated#", "gain#"], rows)
    if share:
        yield f"<p>At n = {len(curve)} that is {_points(share)} of what the best choice gains.</p>"


def _disagreement(report: Report) -> Iterator[str]:
    found = report.disagreement
    assert found is not None
    yield (
        f"<p>About a wrong pair members differ more than about a right one, by the std of their probabilities, in "
        f"{100 * found.auroc_of_preferences:.1f} % of cases; it has the larger std of margins in "
        f"{100 * found.auroc_of_std:.1f} %, the larger std for its margin in {100 * found.auroc:.1f} %, and the "
        f"smaller margin, which a single model has too, in {100 * found.auroc_of_small_margin:.1f} %; 50 % is chance."
    )
    if found.auroc_beyond_margin is not None:
        yield (
            f" Of two pairs of about the same margin, one of them wrong, that one has the larger std in "
            f"{100 * found.auroc_beyond_margin:.1f} %: what the members tell besides."
        )
    yield "</p>"
    yield _shares({f"{100 * each.share_of_pairs:.0f} % of the pairs": each.accuracy for each in found.curve})


_SECTIONS = {
    "ranking": ("Ranking", _ranking),
    "calibration": ("Calibration", _calibration),
    "agreement": ("Agreement with ratings", _agreement),
    "length": ("Length", _length),
    "suites": ("Known-good against known-bad, and adversarial", _suites),
    "best_of_n": ("Best of n", _best_of_n),
    "disagreement": ("Disagreement of the ensemble", _disagreement),
}


def _about(report: Report) -> str:
    values = asdict(report.about) | {"in_domain": ", ".join(report.about.in_domain) or "-"}
    return _table(["", ""], [[escape(name.replace("_", " ")), escape(str(value))] for name, value in values.items()])


# -- the pieces --------------------------------------------------------------------------------------------------------

SHARE_COLUMNS = ("share#", "95 % interval#", "pairs#", "prompts#", "ties#")


def _shares(named: Mapping[str, Share]) -> str:
    rows = [[escape(name), *_share_cells(each)] for name, each in named.items()]
    return _table(["", *SHARE_COLUMNS], rows)


def _share_cells(each: Share) -> list[Cell]:
    counts = [f"{count:,}" for count in (each.num_pairs, each.num_prompts, each.num_ties)]
    return [f"{100 * each.value:.1f} %", _range(each.low, each.high, 1, 100), *counts]


def _with_options(text: str) -> Cell:
    """Options are not broken at their hyphens."""
    return re.sub(r"--[a-z][a-z-]*", r"<code>\g<0></code>", escape(text))


def _estimate(each: Estimate) -> Cell:
    return f"{each.value:z.3f}{_in_brackets(_range(each.low, each.high, 3))}"


def _points(each: Estimate) -> Cell:
    return f"{100 * each.value:.1f} %{_in_brackets(_range(each.low, each.high, 1, 100))}"


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def _range(low: float | None, high: float | None, places: int, times: float = 1.0) -> Cell:
    return "" if low is None or high is None else f"{times * low:z.{places}f} to {times * high:z.{places}f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A column whose name ends in # is of numbers."""
    kinds = [' class="n"' if name.endswith("#") else "" for name in columns]
    head = "".join(f"<th{kind}>{name.rstrip('#')}</th>" for kind, name in zip(kinds, columns, strict=True))
    lines = [
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    ]
    return "<table>" + (f"<tr>{head}</tr>" if any(columns) else "") + "\n".join(lines) + "</table>"


def _image(picture: Picture | None, heading: str) -> str:
    return "" if picture is None else f'<img src="{picture.data_uri}" alt="{escape(heading)}">'
