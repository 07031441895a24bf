import csv
import dataclasses
import json

import pytest
from rewardserve.client import ModelInfo
from rewardserve.loadtest import picture, report
from rewardserve.loadtest.loadgen import ClosedLoop, Failure, Load, OpenLoop, Run

MODEL = ModelInfo("rm", "v1", "serving", "127.0.0.1:1", architecture="Fake", dtype="float32", device="cpu")


def run(load: Load, latency_s: float, failures: dict | None = None, lag_s: float = 0.0, count: int = 100) -> Run:
    latencies = [latency_s * (1 + number / 25) for number in range(count)]
    rate = load.requests_per_s if isinstance(load, OpenLoop) else 120.0
    return Run(
        load, count / rate, latencies, [lag_s] * count, failures or {}, rate, rate, rate * 9, count, 50, 25, False
    )


@pytest.fixture
def sweep() -> report.Report:
    about = report.circumstances(MODEL, "ppo", 64, 1.0, groups_per_request=1, cold_fraction=1.0, seed=0)
    runs = [report.figures(run(ClosedLoop(4), 0.01))]
    runs += [report.figures(run(OpenLoop(share * 120), 0.004 / (1 - share)), share) for share in (0.2, 0.5, 0.8, 0.95)]
    return report.Report(about, tuple(runs), 120.0)


def test_figures_are_those_of_the_run():
    figures = report.figures(run(OpenLoop(10.0), 0.001, {"UNAVAILABLE": Failure(3, "gone")}), 0.8)
    assert (figures.p50_ms, figures.p99_ms) == (pytest.approx(2.96), pytest.approx(4.92))
    assert figures.p99_over_p50 == pytest.approx(4.92 / 2.96)
    assert (figures.num_answered, figures.num_failed, figures.failures) == (100, 3, {"UNAVAILABLE": 3})
    assert figures.cached_share == 0.5 and figures.mode == "open" and not figures.generator_fell_behind


def test_where_nothing_was_answered_there_is_no_latency():
    nothing = dataclasses.replace(run(OpenLoop(10.0), 0.001), latencies_s=[], num_prompt_tokens=0)
    figures = report.figures(nothing)
    assert figures.p50_ms is figures.p99_ms is figures.p99_over_p50 is figures.cached_share is None


def test_each_row_of_json_stands_for_itself(sweep, tmp_path):
    report.write_rows(sweep, tmp_path / "out.json")
    read = json.loads((tmp_path / "out.json").read_text())
    assert read["capacity_requests_per_s"] == 120 and len(read["rows"]) == 5
    for row in read["rows"]:
        assert row["model"] == "rm" and row["model_version"] == "v1" and row["workload"] == "ppo"
        assert row["cpu"] and row["date"] and row["grpcio"] and row["rewardserve"]


def test_rows_of_csv_are_added_and_never_to_other_columns(sweep, tmp_path):
    path = tmp_path / "out.csv"
    report.write_rows(sweep, path)
    assert report.can_append(path) and report.can_append(tmp_path / "new.csv")
    report.write_rows(sweep, path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and list(rows[0]) == list(sweep.rows()[0])
    assert json.loads(rows[0]["failures"]) == {} and float(rows[4]["share_of_capacity"]) == 0.95
    path.write_text("a,b\n")
    assert not report.can_append(path)


def test_the_verdict_is_of_the_promised_share(sweep):
    (line,) = report.verdict(sweep)
    assert line.startswith("at 80% of the capacity (96.0 of 120 requests/s): p50 59.2 ms, p99 98.4 ms")
    assert line.endswith("p99 is 1.7 x p50, under 5 x")
    worse = dataclasses.replace(sweep.at(0.8), p99_ms=1000.0, num_answered=7)
    line, few = report.verdict(dataclasses.replace(sweep, runs=(worse,)))
    assert line.endswith("NOT under 5 x") and "7 requests" in few and "--duration 2 gives 100" in few
    assert not list(report.verdict(dataclasses.replace(sweep, capacity=None)))


def test_in_a_growing_queue_the_promise_is_neither_kept_nor_broken(sweep):
    slow = dataclasses.replace(sweep.at(0.8), num_answered=480, requests_per_s=50.0, duration_s=5.0)  # of 96 a second
    queued = dataclasses.replace(sweep, runs=(slow,))
    (line,) = report.verdict(queued)
    assert line.endswith("which says nothing, for the server did not keep up")
    (remark,) = report.remarks(queued, {})
    assert remark.startswith("the server did not keep up at 80%: 96.0/s")
    refused = dataclasses.replace(slow, num_answered=250, num_failed=230)
    assert refused.kept_up and not slow.kept_up


def test_what_failed_and_a_late_generator_are_said(sweep):
    late = report.figures(run(OpenLoop(50.0), 0.001, {"UNAVAILABLE": Failure(3, "gone")}, lag_s=0.1))
    lines = list(report.remarks(dataclasses.replace(sweep, runs=(late, late)), {"UNAVAILABLE": "gone"}))
    assert lines[0] == "failed: 6 x UNAVAILABLE: gone"
    assert lines[1].startswith("the generator fell behind at 50.0/s")
    assert not list(report.remarks(sweep, {}))
    assert list(report.remarks(dataclasses.replace(sweep, runs=()), {})) == ["nothing was measured"]


def test_the_curve_is_the_open_loop_by_load(sweep):
    assert [run.offered for run in picture.curve(sweep)] == [24, 60, 96, 114]
    closed = dataclasses.replace(sweep, runs=sweep.runs[:1])
    assert picture.curve(closed) == list(closed.runs)


def test_the_terminal_gets_bars_that_grow_with_latency_and_fit(sweep):
    lines = picture.terminal_picture(sweep, 60).splitlines()
    assert len(lines) == 5 and all(len(line) <= 60 for line in lines)
    solid, whole = ([sum(line.count(shade) for shade in shades) for line in lines[1:]] for shades in ("█", "█▓░"))
    assert solid == sorted(solid) and whole == sorted(whole) and whole[-1] > 3 * whole[0]
    assert "80% 96.0" in lines[3] and lines[3].endswith("98.4")


def test_a_terminal_that_knows_ascii_only_gets_that(sweep):
    assert picture.terminal_picture(sweep, 60, "ascii").isascii()


def test_nothing_answered_is_no_picture(sweep):
    assert picture.terminal_picture(dataclasses.replace(sweep, runs=()), 60) == ""


@pytest.mark.parametrize("suffix", picture.FORMATS)
def test_the_picture_is_drawn(sweep, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    failed = dataclasses.replace(sweep.runs[-1], num_failed=2)
    picture.draw(dataclasses.replace(sweep, runs=(*sweep.runs, failed)), tmp_path / f"curve{suffix}")
    assert (tmp_path / f"curve{suffix}").stat().st_size > 3000
