import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")


def rows(number: int) -> list[dict]:
    return [{"prompt": f"What is {n}?", "chosen": f"a number, {n}", "rejected": "blue"} for n in range(number)]


def ids(folder) -> list[str]:
    return [json.loads(line)["id"] for line in (folder / "scores.jsonl").read_text().splitlines()]


def accuracy(folder) -> dict:
    return json.loads((folder / "report.json").read_text())["ranking"]["accuracy"]


def test_after_ctrl_c_what_is_scored_stays_and_the_rest_is_scored(cli, slow_server, server, rows_file, tmp_path):
    num_rows, folder = 4000, tmp_path / "out"
    source = rows_file(*rows(num_rows))
    command = [sys.executable, "-m", "rewardserve", "eval", str(source), "--window=4", "--no-suites"]
    process = subprocess.Popen(
        [*command, slow_server.endpoint, f"--output={folder}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
        # Where these tests are run by a script's job in the background, SIGINT is ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    scores = folder / "scores.jsonl"
    while not scores.exists() or scores.stat().st_size < 5000:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    there = len(ids(folder))
    assert process.returncode == 130 and "rewardserve eval: interrupted" in err and "Traceback" not in err
    assert 0 < there < num_rows and not (folder / "report.json").exists()
    ran = cli("eval", source, "--no-suites", server.endpoint, "--output", folder)
    assert (
        ran.code == 0 and f"scored {num_rows - there} rows" in ran.err and f"{there} rows in OUTPUT already" in ran.err
    )
    assert len(set(ids(folder))) == num_rows == len(ids(folder))
    whole = tmp_path / "whole"
    assert cli("eval", source, "--no-suites", server.endpoint, "--output", whole).code == 0
    assert accuracy(folder) == accuracy(whole)


def test_an_edited_row_is_scored_again_and_a_moved_one_is_not(cli, server, rows_file, tmp_path):
    first = rows(6)
    arguments = ("--no-suites", server.endpoint, "--output", tmp_path / "out")
    assert cli("eval", rows_file(*first), *arguments).code == 0
    edited = [*first[:0:-1], {**first[0], "rejected": "green"}]
    ran = cli("eval", rows_file(*edited), *arguments)
    assert ran.code == 0 and "scored 1 row," in ran.err and "5 rows in OUTPUT already" in ran.err
    assert accuracy(tmp_path / "out")["num_pairs"] == 6, "what is no longer in INPUT does not count"


def test_suites_are_scored_on_top_of_what_is_there(cli, server, rows_file, tmp_path):
    source, folder = rows_file(*rows(5)), tmp_path / "out"
    assert cli("eval", source, "--no-suites", server.endpoint, "--output", folder).code == 0
    ran = cli("eval", source, server.endpoint, "--output", folder)
    assert ran.code == 0 and "scored 5 rows" in ran.err and "5 rows in OUTPUT already" in ran.err
    ran = cli("eval", source, server.endpoint, "--output", folder, "--suite-prompts=2", "--seed=9")
    assert "scored 2 rows" in ran.err


def test_equal_rows_are_scored_once_and_count_twice(cli, server, rows_file, tmp_path):
    ran = cli("eval", rows_file(*rows(3), *rows(3)), "--no-suites", server.endpoint, "--output", tmp_path / "out")
    assert ran.code == 0 and "scored 3 rows" in ran.err
    assert accuracy(tmp_path / "out")["num_pairs"] == 6 and accuracy(tmp_path / "out")["num_prompts"] == 3


def test_scores_of_two_versions_do_not_mix(cli, server, checkpoint, rows_file, tmp_path):
    source, arguments = rows_file(*rows(3)), ("--no-suites", "--output", tmp_path / "out")
    assert cli("eval", source, server.endpoint, *arguments).code == 0
    before = (tmp_path / "out" / "scores.jsonl").read_bytes()
    ran = cli("eval", source, "--model", checkpoint, *arguments)
    assert ran.code == 2 and "holds scores of version v1" in ran.err and "--no-resume" in ran.err
    assert (tmp_path / "out" / "scores.jsonl").read_bytes() == before
    assert cli("eval", source, "--model", checkpoint, "--no-resume", *arguments).code == 0
    assert len(ids(tmp_path / "out")) == 3


def test_a_file_that_holds_no_scores_is_not_touched(cli, server, rows_file, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "scores.jsonl").write_text("something else\n")
    ran = cli("eval", rows_file(*rows(3)), server.endpoint, "--output", folder)
    assert ran.code == 2 and "is no row of scores" in ran.err
    assert (folder / "scores.jsonl").read_text() == "something else\n"
