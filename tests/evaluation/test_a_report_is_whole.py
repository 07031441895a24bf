import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from judged import ABOUT, pair, rated
from rewardserve.evaluation import html, picture, report, suites
from rewardserve.evaluation.data import Judged
from rewardserve.evaluation.report import NothingToJudge, Report, build

PARTS = ("ranking", "calibration", "agreement", "length", "suites", "best_of_n", "disagreement", "verdicts", "about")


@pytest.fixture(scope="module")
def full() -> Report:
    """Of an ensemble, with everything there is."""
    rng = np.random.default_rng(0)
    prompts, rows = [], []
    for number in range(40):
        ratings = rng.random(6)
        scores, lengths = ratings + rng.normal(0, 0.4, 6), rng.integers(50, 900, 6).tolist()
        domain = "code" if number % 3 else "<law & order> $1"
        prompts.append(
            rated(scores, ratings, str(number), domain, lengths, members=[tuple(each) for each in rng.random((6, 3))])
        )
        rows.append(Judged(number, str(number), tuple(f"{n} a. b c." for n in range(6)), tuple(ratings)))
    altered = suites.make(rows, seed=0)
    scores = [[item.score for item in prompt.responses] for prompt in prompts]
    found = suites.results(rows, scores, altered, rng.normal(0, 1, len(altered)).tolist())
    return build(replace(ABOUT, model="<b>rm</b>", input="<i>.jsonl", in_domain=("code",)), prompts, found, ["code"])


@pytest.fixture(scope="module")
def pictures(full: Report) -> tuple[picture.Picture, ...]:
    pytest.importorskip("matplotlib")
    return tuple(picture.pictures(full))


def test_the_json_has_every_part_and_only_finite_numbers(full):
    read = json.loads(json.dumps(full.as_dict(), allow_nan=False))
    assert read["format"] == "rewardserve.evaluation.v1" and all(read[part] for part in PARTS)
    assert set(read["ranking"]["by_domain"]) == {"code", "<law & order> $1"}
    assert {"value", "low", "high", "num_pairs", "num_prompts", "num_ties"} == set(read["ranking"]["accuracy"])
    assert len(read["best_of_n"]["curve"]) == 6 and {each["kind"] for each in read["suites"]} == {
        "adversarial",
        "known_bad",
    }


def test_every_figure_that_has_a_scale_gets_a_verdict(full):
    from rewardserve.evaluation.bands import SCALES

    assert [each.figure for each in full.verdicts] == list(SCALES)
    by_figure = {each.figure: each for each in full.verdicts}
    assert by_figure["ranking accuracy"].value == full.ranking.accuracy.value
    worst = min(each.untouched_wins.value for each in full.suites if each.kind == "adversarial")
    assert by_figure["worst adversarial suite"].value == worst


def test_the_page_holds_every_picture_and_points_nowhere(full, pictures):
    page = html.page(full, pictures)
    assert {each.finding for each in pictures} == set(PARTS[:7]) - {"agreement"}
    assert re.findall(r'<img src="(data:image/png;base64,)', page) == ["data:image/png;base64,"] * 6
    assert page.count("<img") == 6
    for pointer in ("http:", "https:", "href=", "<script", "@import", "url(", "<link"):
        assert pointer not in page, pointer


def test_what_comes_from_elsewhere_is_escaped(full, pictures):
    page = html.page(full, pictures)
    assert "<b>rm</b>" not in page and "&lt;b&gt;rm&lt;/b&gt;" in page
    assert "<i>" not in page and page.count("&lt;i&gt;.jsonl") == 2
    assert "<law" not in page and "&lt;law &amp; order&gt; $1" in page


def test_the_page_is_well_formed(full, pictures):
    from html.parser import HTMLParser

    class Checker(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "br", "img"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    checker = Checker()
    checker.feed(html.page(full, pictures))
    assert checker.open == []


def test_pictures_are_png_of_a_readable_size(pictures):
    for each in pictures:
        assert each.png.startswith(b"\x89PNG") and 8_000 < len(each.png) < 150_000
        width = int.from_bytes(each.png[16:20], "big")
        assert width >= 700


@pytest.mark.parametrize("suffix", picture.FORMATS)
def test_the_overview_is_drawn_in_each_format(full, tmp_path: Path, suffix):
    pytest.importorskip("matplotlib")
    picture.overview(full, tmp_path / f"overview{suffix}")
    assert 5_000 < (tmp_path / f"overview{suffix}").stat().st_size < 150_000


def test_letters_that_the_font_does_not_have_are_no_warnings(tmp_path):
    """A warning is an error here."""
    pytest.importorskip("matplotlib")
    found = build(ABOUT, [pair((-1.0) ** (n % 3), str(n), domain=("日本語", "ไทย")[n % 2]) for n in range(8)])
    picture.overview(found, tmp_path / "overview.png")
    assert {each.finding for each in picture.pictures(found)} >= {"ranking"}


def test_pairs_alone_make_a_report_without_what_needs_ratings(tmp_path):
    pytest.importorskip("matplotlib")
    found = build(ABOUT, [pair((-1.0) ** (n % 3), str(n), lengths=(20 + n, 30)) for n in range(30)])
    assert found.agreement is found.best_of_n is found.disagreement is None and found.suites == ()
    page = html.page(found, tuple(picture.pictures(found)))
    assert "Best of n" not in page and page.count("<img") == 3
    picture.overview(found, tmp_path / "overview.png")


def test_a_single_pair_is_a_report_without_intervals():
    pytest.importorskip("matplotlib")
    found = build(ABOUT, [pair(1.0)])
    assert found.ranking.accuracy.low == 0.0 and not any(each.is_sure for each in found.verdicts)
    assert html.page(found, tuple(picture.pictures(found)))


def test_where_no_two_responses_differ_it_is_said_what_would_help():
    with pytest.raises(NothingToJudge, match="--min-gap"):
        build(replace(ABOUT, min_gap=0.5), [rated([1, 2], [0.1, 0.2])])
    with pytest.raises(NothingToJudge):
        build(ABOUT, [])


def test_the_mean_score_is_of_prompts():
    assert report.mean_score([rated([0, 0, 0], [1, 2, 3]), pair(2.0)]) == 0.5
