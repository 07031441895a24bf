import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest


def ids(path) -> list:
    return [json.loads(line).get("id", json.loads(line).get("line")) for line in path.read_text().splitlines()]


@pytest.fixture
def source(rows_file):
    return rows_file(*({"id": f"r{i}", "prompt": f"{i}?", "responses": ["four", "five"]} for i in range(20)))


@pytest.mark.parametrize("cut", [1, 30, 100])
def test_a_torn_line_is_cut_off_and_its_row_scored_again(cli, server, source, out, cut):
    assert cli("score", source, out, server.endpoint).code == 0
    whole = out.read_bytes()
    torn = b"".join(whole.splitlines(keepends=True)[:8])[:-cut]
    out.write_bytes(torn)
    ran = cli("score", source, out, server.endpoint)
    assert ran.code == 0 and sorted(ids(out)) == sorted(f"r{i}" for i in range(20))
    assert out.read_bytes().startswith(torn[: torn.rindex(b"\n") + 1]), "what was whole stays as it was"
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_rows_without_an_id_are_known_by_their_line(cli, server, rows_file, out):
    rows = [{"prompt": f"{i}?", "response": "x"} for i in range(5)]
    assert cli("score", rows_file(*rows[:3]), out, server.endpoint).code == 0
    ran = cli("score", rows_file(*rows), out, server.endpoint)
    assert "scored 2 rows" in ran.err and "3 rows in OUTPUT already" in ran.err and sorted(ids(out)) == [1, 2, 3, 4, 5]


def test_after_a_kill_each_id_is_there_exactly_once(cli, server, rows_file, out):
    num_rows = 3000
    source = rows_file(*({"id": i, "prompt": f"{i}?", "responses": ["four", "five"]} for i in range(num_rows)))
    command = [sys.executable, "-m", "rewardserve", "score", str(source), str(out), "--window=4", server.endpoint]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stderr=subprocess.DEVNULL
    )
    while not out.exists() or out.stat().st_size < 5000:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(out.read_bytes().splitlines()) < num_rows
    assert cli("score", source, out, server.endpoint).code == 0
    assert sorted(ids(out)) == list(range(num_rows))


def test_no_resume_begins_anew(cli, server, source, out):
    out.write_text("something else\n")
    assert cli("score", source, out, "--no-resume", server.endpoint).code == 0
    assert len(ids(out)) == 20


@pytest.mark.parametrize(
    "content",
    [
        *("something else\n", '{"id": 1, "prompt": "x"}\n', '{"id": 1, "prompt": "x"}', "x"),
        *(f'{{"id": 1, "scores": {scores}, "version": "v"}}\n' for scores in ("1", "null", '"1"', '["1"]', "[[1]]")),
        pytest.param("[" * 100_000, id="too deep"),
    ],
)
def test_a_file_that_holds_no_scores_is_not_touched(cli, server, source, out, content):
    out.write_text(content)
    ran = cli("score", source, out, server.endpoint)
    assert ran.code == 2 and "OUTPUT line 1" in ran.err and out.read_text() == content


def test_input_is_never_its_own_output(cli, server, source):
    before = source.read_text()
    assert cli("score", source, source, "--no-resume", server.endpoint).code == 2
    assert source.read_text() == before


def test_scores_of_two_versions_do_not_mix(cli, server, checkpoint, source, out):
    assert cli("score", source, out, server.endpoint).code == 0
    before = out.read_bytes()
    ran = cli("score", source, out, "--model", checkpoint)
    assert ran.code == 2 and "holds scores of version v1" in ran.err and out.read_bytes() == before


def test_two_runs_do_not_write_one_file(cli, server, source, out):
    with open(out, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        ran = cli("score", source, out, server.endpoint)
    assert ran.code == 2 and "another run is writing it" in ran.err
