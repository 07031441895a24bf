import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rewardserve.cli import bench
from rewardserve.options import ConfigError
from server_process import ServerProcess

DEMO_MODEL = Path(__file__).parents[2] / "examples" / "demo_model"
SHORT = ("--duration=0.3", "--warm-up=1", "--groups=8")
FAST = (*SHORT, "--workload=grpo_64", "--scale=32")  # 64 tokens with the prompt: the fake engine takes 128


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    def run_(*arguments: object) -> SimpleNamespace:
        capfd.readouterr()
        code = bench.run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run_


@pytest.fixture(scope="module")
def demo() -> Iterator[ServerProcess]:
    with ServerProcess(f"demo={DEMO_MODEL}") as server:
        yield server


@pytest.fixture
def rows(rows_file: Callable[..., Path]) -> Path:
    return rows_file(*({"id": n, "prompt": f"What is {n}?", "responses": ["A number.", "Blue."]} for n in range(6)))


def test_a_sweep_of_the_demo_model_ends_with_a_table_json_and_a_picture(run, demo, rows, tmp_path):
    pytest.importorskip("matplotlib")
    out, png = tmp_path / "bench.json", tmp_path / "bench.png"
    ran = run("--target", demo.endpoint, "--workload", rows, *SHORT, "--shares=50,80", "--out", out, "--picture", png)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("demo ") and "the 6 rows of a file; cold prefixes" in ran.out
    assert "4 callers" in ran.out and "50%: " in ran.out and "█ p50  ▓ p90  ░ p99, ms" in ran.out
    assert "at 80% of the capacity (" in ran.out and "p99 is " in ran.out
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 10_000
    read = json.loads(out.read_text())
    sweep = [row for row in read["rows"] if row["mode"] == "open"]
    assert [row["share_of_capacity"] for row in sweep] == [0.5, 0.8] and read["capacity_requests_per_s"] > 0
    assert all(row["num_failed"] == 0 and row["p50_ms"] <= row["p99_ms"] for row in read["rows"])
    assert {(row["model"], row["device"], row["workload"]) for row in read["rows"]} == {("demo", "cpu", "in.jsonl")}
    assert sweep[0]["offered"] == pytest.approx(0.5 * read["capacity_requests_per_s"])


def test_warm_prompts_are_cached_and_cold_ones_are_not(run, demo, tmp_path):
    arguments = ["--target", demo.endpoint, "--mode=closed", "--workload=ppo", "--groups=2", *SHORT[:2]]
    for prefixes in ("--warm", "--cold-fraction=1"):
        assert run(*arguments, prefixes, "--out", tmp_path / "out.csv").code == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        warm, cold = csv.DictReader(file)
    assert float(warm["cached_share"]) > 0.9 and float(warm["cold_fraction"]) == 0
    assert float(cold["cached_share"]) < 0.1 and float(cold["cold_fraction"]) == 1


def test_given_loads_are_measured_one_after_the_other(run, server, tmp_path):
    out = tmp_path / "out.json"
    assert run(server.endpoint, *FAST, "--mode=open", "--rate=40,80", "--rate=120", "--out", out).code == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["offered"] for row in rows] == [40, 80, 120] and {row["mode"] for row in rows} == {"open"}
    ran = run(server.endpoint, *FAST, "--mode=closed", "--concurrency=1,3", "--groups-per-request=4")
    assert ran.code == 0 and "1 caller " in ran.out and "3 callers" in ran.out
    assert "at 80%" not in ran.out


def test_pairs_per_request_are_those_that_were_sent(run, server, rows, tmp_path):
    """Of six groups four to a request the second has two; eight to a request is all six."""
    found = []
    for number in (4, 8):
        out = tmp_path / f"{number}.json"
        flags = ("--mode=closed", "--concurrency=1", "--max-requests=4", "--duration=60", "--warm-up=1")
        assert (
            run(server.endpoint, "--workload", rows, *flags, f"--groups-per-request={number}", "--out", out).code == 0
        )
        (row,) = json.loads(out.read_text())["rows"]
        found.append((row["pairs_per_request"], row["pairs_per_s"] / row["requests_per_s"]))
    assert found == [(6.0, pytest.approx(6.0)), (12.0, pytest.approx(12.0))]


def test_a_run_ends_with_its_number_of_requests(run, server, tmp_path):
    out = tmp_path / "out.json"
    assert run(server.endpoint, *FAST, "--duration=60", "--mode=closed", "--max-requests=25", "--out", out).code == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["num_answered"] == 25 and row["num_failed"] == 0


def test_ctrl_c_ends_the_measurement_and_reports_it(run, server, tmp_path, monkeypatch):
    show, presses = bench._Bar.show, iter([signal.SIGINT])

    def interrupt(bar, progress) -> None:
        show(bar, progress)
        if bar._name != "warm-up" and progress.num_answered:
            os.kill(os.getpid(), next(presses, 0))

    monkeypatch.setattr(bench._Bar, "show", interrupt)
    out = tmp_path / "out.json"
    ran = run(server.endpoint, *FAST, "--duration=60", "--mode=closed", "--concurrency=2,4", "--out", out)
    assert ran.code == 130 and "2 callers, cut" in ran.out and "4 callers" not in ran.out
    (row,) = json.loads(out.read_text())["rows"]
    assert row["interrupted"] and row["num_answered"] > 0 and row["duration_s"] < 60
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("mode", ["sweep", "closed"])
def test_ctrl_c_in_the_warm_up_measures_nothing_and_says_so(run, server, tmp_path, monkeypatch, mode):
    monkeypatch.setattr(bench._Bar, "__enter__", lambda bar: os.kill(os.getpid(), signal.SIGINT) or bar)
    out = tmp_path / "out.json"
    ran = run(server.endpoint, *FAST, "--duration=60", f"--mode={mode}", "--out", out)
    assert ran.code == 130 and "nothing was measured" in ran.out and not out.exists()


def test_failed_requests_are_named_and_without_any_answer_nothing_is_measured(run, server, rows_file):
    good, long = {"prompt": "a", "response": "b"}, {"prompt": "word " * 200, "response": "b"}
    ran = run(server.endpoint, *SHORT, "--mode=closed", "--workload", rows_file(good, long))
    assert ran.code == 0 and "x OUT_OF_RANGE: prompt + response is" in ran.out
    ran = run(server.endpoint, *SHORT, "--mode=closed", "--workload", rows_file(long))
    assert ran.code == 1 and "none of 1 requests was answered" in ran.err and "see --overflow" in ran.err
    cut = "--overflow=truncate-prompt-left"
    assert run(server.endpoint, *SHORT, "--mode=closed", "--workload", rows_file(long), cut).code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workload=short_items", "--scale=2"], "--scale goes with --workload grpo_64"),
        (["--workload=in", "--data=x"], "--data goes with workloads that have a name, not with a file"),
        (["--mode=open"], "--mode open needs --rate"),
        (["--rate=5"], "--rate goes with --mode open"),
        (["--mode=open", "--rate=0"], "--rate: 0: these are numbers above 0"),
        (["--mode=closed", "--concurrency=1.5"], "--concurrency: 1.5: these are whole numbers above 0"),
        (["--mode=open", "--rate=1", "--concurrency=2"], "--concurrency goes with"),
        (["--mode=closed", "--shares=50"], "--shares goes with --mode sweep"),
        (["--shares=half"], "--shares: half"),
        (["--warm", "--cold-fraction=0.5"], "give one of them"),
        (["--cold-fraction=2"], "--cold-fraction (or REWARDSERVE_BENCH_COLD_FRACTION)"),
        (["--duration=0"], "--duration"),
        (["--picture=curve.gif"], "its name ends in one of .png, .svg, .pdf"),
        (["--picture=/no/such/folder/curve.png"], "/no/such/folder is no folder to write to"),
        (["--out=/no/such/folder/out.json"], "/no/such/folder is no folder to write to"),
        (["--ratee=1"], "did you mean '--rate'?"),
        (["--target=http://x"], "an endpoint is a gRPC target"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2_before_anything_is_measured(run, arguments, said):
    ran = run(*arguments)
    assert ran.code == 2 and ran.err.count("\n") == 1 and not ran.out
    assert ran.err.startswith("rewardserve bench: ") and said in ran.err


@pytest.mark.parametrize(
    ("workload", "said"),
    [
        ("short_item", "no such workload, and no such file; did you mean 'short_items'?"),
        ("/no/such/file", "there are best_of_16"),
        ("pairs", "harmless_pairs.jsonl.gz is not in any folder given; this workload is real text, see --data"),
        (os.devnull, "there is no row in it"),
    ],
)
def test_a_workload_that_is_none_says_what_would_do(run, server, workload, said):
    ran = run(server.endpoint, "--workload", workload)
    assert ran.code == 2 and said in ran.err


def test_a_bad_row_is_named(run, server, rows_file):
    ran = run(server.endpoint, "--workload", rows_file({"prompt": "x", "response": "y"}, {"promt": "x"}))
    assert ran.code == 2 and "INPUT line 2: prompt: is missing" in ran.err


def test_other_columns_are_not_mixed(run, tmp_path):
    (tmp_path / "out.csv").write_text("a,b\n")
    ran = run("--out", tmp_path / "out.csv")
    assert ran.code == 2 and "has other columns" in ran.err


def test_without_matplotlib_it_is_said_before_measuring(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'rewardserve\[bench\]'"):
        bench.BenchOptions(picture=str(tmp_path / "x.png")).check()
    bench.BenchOptions().check()


def test_no_server_and_no_such_model_say_what_to_do(run, server):
    ran = run("--target=127.0.0.1:1", "--timeout=1")
    assert ran.code == 1 and "is a server there?" in ran.err
    ran = run(server.endpoint, "--model=nobody")
    assert ran.code == 1 and "no model 'nobody'" in ran.err and "choose with --name" in ran.err


def test_options_come_from_the_environment_and_a_file_too(run, server, tmp_path, monkeypatch):
    monkeypatch.setenv("REWARDSERVE_BENCH_ENDPOINT", server.endpoint.removeprefix("--endpoint="))
    monkeypatch.setenv("REWARDSERVE_BENCH_RATE", "30,60")
    (tmp_path / "c.toml").write_text('[bench]\nmode = "open"\nworkload = "grpo_64"\nscale = 32\nduration = 0.2\n')
    ran = run("--config", tmp_path / "c.toml", "--name=toy", "--groups=4")
    assert ran.code == 0 and "30.0/s" in ran.out and "60.0/s" in ran.out


def test_help_lists_the_workloads_and_the_verb_is_known(capsys):
    with pytest.raises(SystemExit) as exit_:
        bench.run(["--help"])
    said = capsys.readouterr().out
    assert exit_.value.code == 0 and "short_items" in said and "--target" in said and "--model" in said
    command = [sys.executable, "-m", "rewardserve", "--help"]
    assert "  bench " in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_measuring_loads_no_torch():
    heavy = ("torch", "transformers", "matplotlib")
    code = f"import sys, rewardserve.cli.bench; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
