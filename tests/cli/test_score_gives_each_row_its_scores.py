import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from rewardserve.client import TokenIds
from rewardserve.engine.fake import fake_score
from rewardserve.evaluation import calibration_file
from rewardserve.evaluation.calibration_file import BESIDE, Affine, Origin
from rewardserve.types import FINISHED

TOO_LONG = "word " * 200


def read_jsonl(path) -> dict:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    by_key = {row.get("id", row.get("line")): row for row in rows}
    assert len(by_key) == len(rows), "an id stands there twice"
    return by_key


def test_every_row_is_answered_once_under_its_id_or_its_line(cli, server, rows_file, out):
    source = rows_file(
        {"id": "a", "prompt": "two plus two?", "responses": ["four", "five"]},
        "",
        {"id": 7, "messages": [{"role": "user", "content": "two?"}], "response": "four", "more": None},
        {"rendered": "two plus two is", "responses": [" four"], "prompt": None},
        {"prompt_token_ids": [5, 6], "response_token_ids": [[7, 8, 9], [7]]},
    )
    ran = cli("score", source, out, server.endpoint)
    assert ran.code == 0, ran.err
    rows = read_jsonl(out)
    assert set(rows) == {"a", 7, 4, 5}
    assert [len(rows[key]["scores"]) for key in ("a", 7, 4, 5)] == [2, 1, 1, 2]
    wanted = [fake_score(TokenIds([5, 6]).data, TokenIds(ids).data) for ids in ([7, 8, 9], [7])]
    assert rows[5]["scores"] == pytest.approx(wanted, rel=1e-6)  # fp32 on the wire
    assert rows[5]["num_prompt_tokens"] == [2, 2] and rows[5]["num_response_tokens"] == [3, 1]
    assert rows[5]["model"] == "toy" and rows[5]["version"] == "v1"
    assert "scored 4 rows, 6 pairs" in ran.err and ran.err.count("\n") == 1


def test_more_rows_than_the_window_are_all_scored(cli, server, rows_file, out):
    rows = [{"id": i, "prompt": f"{i}", "responses": ["x", "y"]} for i in range(200)]
    assert cli("score", rows_file(*rows), out, "--window", 3, server.endpoint).code == 0
    assert set(read_jsonl(out)) == set(range(200))


def test_a_failed_response_is_null_with_its_reason_and_never_a_number(cli, server, rows_file, out):
    source = rows_file({"id": "x", "prompt": "two?", "responses": ["four", TOO_LONG]})
    ran = cli("score", source, out, server.endpoint)
    row = read_jsonl(out)["x"]
    assert ran.code == 0 and "1 failed" in ran.err
    assert math.isfinite(row["scores"][0]) and row["scores"][1] is None
    (error,) = row["errors"]
    assert error["index"] == 1 and error["code"] == "OUT_OF_RANGE" and "max_length 128" in error["message"]


def test_a_row_that_is_too_large_for_the_server_fails_alone(cli, small_server, rows_file, out):
    rows = [{"id": i, "prompt": "a", "response": "b"} for i in range(60)]
    rows[30]["prompt"] = "x" * (2 << 20)
    ran = cli("score", rows_file(*rows), out, small_server.endpoint)
    assert ran.code == 0
    answers = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert set(answers) == set(range(60))
    assert [i for i, row in answers.items() if row["scores"] == [None]] == [30]
    assert "larger than max" in json.dumps(answers[30])


def test_strict_fails_for_failed_responses_of_this_run_and_of_earlier_ones(cli, server, rows_file, out):
    source = rows_file({"prompt": "two?", "responses": ["four", TOO_LONG]})
    assert cli("score", source, out, "--strict", server.endpoint).code == 1
    again = cli("score", source, out, "--strict", server.endpoint)
    assert again.code == 1 and "1 row in OUTPUT already" in again.err


def test_a_run_that_scores_nothing_at_all_has_failed(cli, server, rows_file, out):
    source = rows_file({"prompt": "two?", "responses": [TOO_LONG]}, {"prompt_token_ids": [400], "response": "x"})
    assert cli("score", source, out, server.endpoint).code == 1
    outside = read_jsonl(out)[2]
    assert outside["scores"] == [None] and outside["errors"][0]["code"] == "INVALID_ARGUMENT"
    assert outside["errors"][0]["message"].startswith("prompt.token_ids: id 400")


def test_overflow_is_what_the_flag_says(cli, server, rows_file, out):
    source = rows_file({"prompt": TOO_LONG, "responses": ["four"]})
    assert cli("score", source, out, "--overflow", "truncate-prompt-left", server.endpoint).code == 0
    row = read_jsonl(out)[1]
    assert row["truncated"] == [True] and row["num_prompt_tokens"][0] + row["num_response_tokens"][0] == 128


def test_offline_scores_are_those_of_a_server(cli, real_server, checkpoint, rows_file, out, tmp_path):
    source = rows_file(
        {"id": "a", "prompt": "What is two plus two?", "responses": ["It is four.", "word by word", TOO_LONG * 11]},
        {"id": "b", "messages": [{"role": "user", "content": "two?"}], "responses": ["four"]},
        {"id": "c", "rendered": "two", "response": " four"},
        {"id": "d", "prompt_token_ids": [400], "response_token_ids": [[1]]},
    )
    offline = cli("score", source, tmp_path / "offline.jsonl", "--model", checkpoint, "--dtype=float32", "--threads=2")
    assert offline.code == 0, offline.err
    assert cli("score", source, out, real_server.endpoint).code == 0
    served = read_jsonl(out)
    for key, row in read_jsonl(tmp_path / "offline.jsonl").items():
        scores = [None if score is None else pytest.approx(score, rel=1e-4) for score in row.pop("scores")]
        assert served[key].pop("scores") == scores  # not bitwise: in fp32 they depend a little on the batch
        assert served[key] == row
    assert served["a"]["errors"][0]["index"] == 2 and served["d"]["errors"][0]["code"] == "INVALID_ARGUMENT"


@pytest.fixture
def calibration(request, checkpoint) -> Iterator[None]:
    """Beside the checkpoint."""
    from rewardserve.models.spec import read_spec  # loads torch

    version, curve = read_spec(str(checkpoint)).version + "-fp32", getattr(request, "param", Affine(2.0, 100.0))
    calibration_file.write(checkpoint / BESIDE, curve, Origin("tiny", version, "pairs.jsonl", 10, 5))
    yield
    (checkpoint / BESIDE).unlink()


def test_offline_the_calibration_beside_a_checkpoint_is_applied_as_a_server_does(
    cli, calibration, real_server, checkpoint, rows_file, out, tmp_path
):
    source = rows_file({"id": "a", "prompt": "What is two plus two?", "responses": ["It is four.", "word by word"]})
    assert cli("score", source, tmp_path / "offline.jsonl", "--model", checkpoint).code == 0
    assert cli("score", source, out, real_server.endpoint).code == 0
    offline, served = read_jsonl(tmp_path / "offline.jsonl")["a"], read_jsonl(out)["a"]
    assert min(offline["scores"]) > 50 and offline["kind"] == "normalized"
    assert offline.pop("scores") == pytest.approx(served.pop("scores"), rel=1e-4)
    assert offline == served and FINISHED in served["version"]
    ranked = json.loads(cli("rank", "--input", source, "--model", checkpoint, "--json").out)
    assert ranked["version"] == served["version"]
    assert min(each["score"] for each in ranked["groups"][0]["ranked"]) > 50


@pytest.mark.parametrize("calibration", [Affine(1e-7, 100.0)], indirect=True)
def test_what_is_equal_in_a_servers_reply_is_equal_offline_and_ranked_as_sent(
    cli, calibration, real_server, checkpoint, rows_file
):
    source = rows_file({"prompt": "What is two plus two?", "responses": ["four", "It is", "word by word", "is It"]})
    for where in ([f"--model={checkpoint}"], [real_server.endpoint]):
        (group,) = json.loads(cli("rank", "--input", source, "--json", *where).out)["groups"]
        assert [each["index"] for each in group["ranked"]] == [0, 1, 2, 3]
        assert {each["score"] for each in group["ranked"]} == {100.0}


def test_offline_a_calibration_that_is_none_is_said_in_one_line(cli, calibration, checkpoint, rows_file, out):
    (checkpoint / BESIDE).write_text("{}")
    ran = cli("score", rows_file({"prompt": "x", "response": "y"}), out, "--model", checkpoint)
    assert ran.code == 1 and BESIDE in ran.err and ran.err.count("\n") == 1


@pytest.mark.parametrize("folder", ["/nowhere", "."])
def test_a_folder_that_is_no_checkpoint_is_said_in_one_line(cli, rows_file, out, folder):
    ran = cli("score", rows_file({"prompt": "x", "response": "y"}), out, "--model", folder)
    assert ran.code == 1 and ran.err.startswith("rewardserve score: ") and ran.err.count("\n") == 1


def test_no_server_is_said_in_one_line_with_what_to_do(cli, rows_file, out):
    ran = cli("score", rows_file({"prompt": "x", "response": "y"}), out, "--endpoint=127.0.0.1:1")
    assert ran.code == 1 and ran.err.count("\n") == 1
    assert "[127.0.0.1:1]" in ran.err and "rewardserve serve --model FOLDER" in ran.err


def test_a_name_nobody_serves_is_refused_before_anything_is_scored(cli, server, rows_file, out):
    ran = cli("score", rows_file({"prompt": "x", "response": "y"}), out, "--name=other", server.endpoint)
    assert ran.code == 1 and "served are: toy" in ran.err and out.read_text() == ""


def test_a_pipe_gets_each_answer_before_it_has_sent_the_next_row(server):
    """Whoever writes a row and waits for its scores must not wait for ever."""
    command = [sys.executable, "-m", "rewardserve", "score", "-", "-", server.endpoint]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, **pipes) as process:
        for number in range(3):
            process.stdin.write(json.dumps({"id": number, "prompt": "two?", "response": "four"}) + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["id"] == number
        process.stdin.close()
        assert process.stdout.read() == "" and "scored 3 rows" in process.stderr.read()
    assert process.returncode == 0
