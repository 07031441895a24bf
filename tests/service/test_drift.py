"""Drift is told by its formula, of the version it is known for, and of nothing that comes back as it was."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from rewardserve.errors import LoadFailed
from rewardserve.metrics import Metrics, ModelMetrics
from rewardserve.service.drift import MIN_SEEN, WINDOW, Drift, Reference, read_reference
from rewardserve.service.ensemble import Ensemble
from rewardserve.types import Aggregate, How


def written(path: Path, scores: Sequence[float | None], version: str = "v1") -> Path:
    rows = [{"line": n, "scores": [score], "version": version} for n, score in enumerate(scores, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    """Of standard normal scores."""
    return read_reference(written(tmp_path / "scores.jsonl", np.random.default_rng(0).normal(size=5000).tolist()))


def test_drift_is_the_index_by_its_formula(reference) -> None:
    drift, scores = Drift("m", reference), np.random.default_rng(1).normal(0.5, 1.5, WINDOW)
    drift.observe("v1", scores.tolist())
    now = (np.histogram(scores, [-np.inf, *reference.edges, np.inf])[0] + 0.5) / (WINDOW + 5)
    assert drift.value() == pytest.approx(np.sum((now - 0.1) * np.log(now / 0.1)), rel=1e-2)


def test_scores_as_they_were_are_no_drift_and_others_are(reference) -> None:
    drift, random = Drift("m", reference), np.random.default_rng(2)
    for _ in range(50):
        drift.observe("v1", random.normal(size=WINDOW).tolist())
        assert drift.value() < 0.05
    drift.observe("v1", random.normal(1.0, 1.0, WINDOW).tolist())
    assert drift.value() > 0.25
    drift.observe("v1", random.normal(size=WINDOW).tolist())  # all of those before are forgotten
    assert drift.value() < 0.05


def test_few_scores_tell_no_drift(reference) -> None:
    drift = Drift("m", reference)
    drift.observe("v1", [9.0] * (MIN_SEEN - 1))
    assert math.isnan(drift.value())
    drift.observe("v1", [9.0])
    assert drift.value() > 1


def test_another_version_tells_no_drift_and_is_told_of_once(reference, caplog: pytest.LogCaptureFixture) -> None:
    drift = Drift("m", reference)
    drift.observe("v1", [0.0] * WINDOW)
    for _ in range(3):
        drift.observe("v2", [0.0] * WINDOW)
        assert math.isnan(drift.value())
        drift.observe("v1", [0.0])  # of a request that began before
    assert math.isnan(drift.value())
    assert [record.message for record in caplog.records] == [
        "m: no drift is told: --drift-reference is of version v1, and this is v2"
    ]
    drift.observe("v1", [0.0] * MIN_SEEN)
    assert drift.value() > 1


def test_ratings_of_few_values_have_as_few_bins(tmp_path: Path) -> None:
    drift = Drift("m", read_reference(written(tmp_path / "ratings.jsonl", [1.0, 2.0, 2.0, 5.0] * 100)))
    drift.observe("v1", [1.0, 2.0, 2.0, 5.0] * 100)
    assert drift.value() == pytest.approx(0, abs=1e-12)
    drift.observe("v1", [5.0] * WINDOW)
    assert drift.value() > 1


def test_the_same_scores_are_no_drift_in_another_precision(tmp_path: Path) -> None:
    """A reply has them in fp32, and many are of one answer that is given again and again."""
    scores = [*np.random.default_rng(0).normal(size=500).tolist(), *[0.1] * 500, *[1 / 3] * 500]
    for stored in (np.float32(scores).tolist(), np.nextafter(scores, -9).tolist(), np.nextafter(scores, 9).tolist()):
        drift = Drift("m", read_reference(written(tmp_path / "scores.jsonl", stored)))
        drift.observe("v1", scores)
        assert drift.value() < 1e-3


@pytest.mark.parametrize("most", [1.0, 3.0, 5.0])
def test_where_most_scores_are_the_same_fewer_of_them_are_a_drift(tmp_path: Path, most: float) -> None:
    usual = [most] * 950 + [1.0, 2.0, 3.0, 4.0, 5.0] * 10
    drift = Drift("m", read_reference(written(tmp_path / "scores.jsonl", usual)))
    drift.observe("v1", usual)
    assert drift.value() == pytest.approx(0, abs=1e-9)
    drift.observe("v1", [1.0, 2.0, 3.0, 4.0, 5.0] * (WINDOW // 5))
    assert drift.value() > 0.25


@pytest.mark.parametrize(
    ("of", "served"), [("v1", "v1-adapted"), ("v1-adapted", "v1"), ("v1-finished-ab", "v1-adapted-finished-ab")]
)
def test_how_an_adapter_is_applied_is_no_other_version(tmp_path: Path, of: str, served: str) -> None:
    drift = Drift("m", read_reference(written(tmp_path / "scores.jsonl", [1.0, 2.0] * 200, of)))
    drift.observe(served, [1.0, 2.0] * 200)
    assert drift.value() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("num_others", [0, 1, 20])
def test_nor_is_how_members_of_an_ensemble_apply_theirs(tmp_path: Path, num_others: int) -> None:
    ensemble = Ensemble("e", (), Aggregate(How.MEAN), ModelMetrics(Metrics(CollectorRegistry()), "e"))
    merged, shared, another = [
        [*[(f"m{n}", f"v{n}") for n in range(num_others)], ("a", f"v1{how}"), ("b", f"{b}{how}-finished-ab")]
        for how, b in (("", "v2"), ("-adapted", "v2"), ("", "v3"))
    ]
    assert ensemble.version(merged) != ensemble.version(shared)
    for of, served, is_told in (
        *[(merged, shared, True), (another, merged, False)],
        (shared, merged, num_others < 20),  # of many members not every combination is tried
    ):
        reference = written(tmp_path / "scores.jsonl", [1.0, 2.0] * 200, ensemble.version(of))
        drift = Drift("e", read_reference(reference))
        drift.observe(ensemble.version(served), [1.0, 2.0] * 200, ensemble.alike(served))
        assert math.isnan(drift.value()) != is_told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds 0 scores; a reference has at least 200"),
        ('{"scores": [1.0], "version": "v1"}\n', "holds 1 scores; a reference has at least 200"),
        ('{"scores": [1.0], "version": "v1"}\nnothing\n', r"line 2 is no row of scores; rewardserve score writes"),
        ('{"scores": ["1"], "version": "v1"}\n', "line 1 is no row of scores"),
        ('{"scores": [1.0]}\n', "line 1 is no row of scores"),
        ('{"scores": "", "version": "v1"}\n', "line 1 is no row of scores"),
        ('{"scores": [1.0], "version": "v1", "version": "v2"}\n', "line 1 is no row of scores"),
        ('{"scores": [NaN], "version": "v1"}\n', "line 1 is no row of scores"),
        ('{"scores": [1' + "0" * 400 + '], "version": "v1"}\n', "line 1 is no row of scores"),
        ('{"scores": [2.5], "version": "v1"}\n' * 300, "all 300 scores are the same, 2.5"),
        ("[" * 100_000, "line 1 is no row of scores"),
        (
            '{"scores": [1.0], "version": "v1"}\n{"scores": [1.0], "version": "v2"}\n',
            "holds scores of several versions, v1, v2",
        ),
    ],
)
def test_a_reference_that_is_none_is_refused_by_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(text)
    with pytest.raises(LoadFailed, match=told):
        read_reference(path)


def test_a_reference_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match=r"gone.jsonl: No such file or directory; rewardserve score writes"):
        read_reference(tmp_path / "gone.jsonl")


def test_what_had_no_score_is_not_in_the_reference(tmp_path: Path) -> None:
    made = read_reference(written(tmp_path / "scores.jsonl", [float(n) for n in range(1000)] + [None] * 500))
    assert made.shares == pytest.approx([0.1] * 10, abs=2e-3)
