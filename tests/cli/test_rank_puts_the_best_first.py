import json
import subprocess
import sys

import pytest
from rewardserve.cli.table import one_line

TOO_LONG = "word " * 200
RESPONSES = ["four", "five, [or] so", '"six"', "null", "-7", "a\nb"]


def flags(*responses: str) -> list[str]:
    return [f"--response={response}" for response in responses]


@pytest.fixture
def groups(rows_file):
    return rows_file(
        {
            "id": "sums",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "What is [bold]2 + 2?"},
            ],
            "responses": ["four", TOO_LONG, "It is \x1b[31mfour\x07" + " word by word" * 8, "five\n\nmore"],
            "labels": ["good", "long", "coloured", "wrong"],
        },
        *({"prompt": f"Number {i}?", "responses": ["a", "b"]} for i in range(30)),
    )


def test_the_order_is_that_of_the_scores_and_texts_arrive_as_they_were_given(cli, server):
    ran = cli("rank", "--prompt=a, b", *flags(*RESPONSES), "--json", server.endpoint)
    assert ran.code == 0, ran.err
    ranked = json.loads(ran.out)["ranked"]
    assert [each["rank"] for each in ranked] == [1, 2, 3, 4, 5, 6]
    assert sorted(each["index"] for each in ranked) == [0, 1, 2, 3, 4, 5]
    assert all(each["response"] == RESPONSES[each["index"]] for each in ranked)
    scores = [each["score"] for each in ranked]
    assert scores == sorted(scores, reverse=True)


def test_rank_agrees_with_score(cli, server, rows_file):
    source = rows_file({"prompt": "a, b", "responses": RESPONSES})
    (row,) = cli("score", source, "-", server.endpoint).rows
    ranked = json.loads(cli("rank", "--prompt=a, b", *flags(*RESPONSES), "--json", server.endpoint).out)["ranked"]
    assert {each["index"]: each["score"] for each in ranked} == dict(enumerate(row["scores"]))


def test_responses_may_stand_apart_from_the_equals_sign_and_in_a_file(cli, server, tmp_path):
    (tmp_path / "responses").write_text('plain, line\n\n"with\\nbreak"\n"no" JSON\na\u2028b\x0cc\x85d\n', "utf-8")
    (tmp_path / "prompt").write_text("two?\n")
    ran = cli(
        *("rank", "--prompt-file", tmp_path / "prompt", "--responses-file", tmp_path / "responses"),
        *("--response", "one, two", "--json", server.endpoint),
    )
    texts = {each["response"] for each in json.loads(ran.out)["ranked"]}
    assert texts == {"one, two", "plain, line", "with\nbreak", '"no" JSON', "a\u2028b\x0cc\x85d"}


def test_failed_responses_have_no_rank_and_say_why(cli, server):
    arguments = ["rank", "--prompt=x", *flags("four", TOO_LONG), server.endpoint]
    answer = json.loads(cli(*arguments, "--json").out)
    assert [each["index"] for each in answer["ranked"]] == [0]
    assert [(each["index"], each["code"]) for each in answer["failed"]] == [(1, "OUT_OF_RANGE")]
    table = cli(*arguments)
    assert table.code == 0 and "failed: response 1: OUT_OF_RANGE: prompt + response is" in table.out
    assert cli("rank", "--prompt=x", *flags(TOO_LONG), server.endpoint).code == 1


def test_top_k_shows_the_first_of_the_whole_order(cli, server):
    arguments = ["rank", "--prompt=x", *flags(*RESPONSES), "--json", server.endpoint]
    whole = json.loads(cli(*arguments).out)["ranked"]
    assert json.loads(cli(*arguments, "--top-k=2").out)["ranked"] == whole[:2]


def test_a_pipe_gets_plain_lines_no_wider_than_100_columns(cli, server, groups):
    ran = cli("rank", "--input", groups, server.endpoint)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert "\x1b" not in ran.out and "\x07" not in ran.out and "\r" not in ran.out
    assert all(len(line) <= 100 for line in lines if "failed: " not in line)
    assert lines[0].startswith("What is [bold]2 + 2?") and lines[0].endswith("sums")
    assert lines[1].split() == ["rank", "score", "tokens", "label", "response"]
    assert {line.split()[3] for line in lines[3:6]} == {"good", "coloured", "wrong"}
    assert any(line.startswith("  failed: response 1 (long): OUT_OF_RANGE") for line in lines)
    assert "31 groups, 64 pairs (1 failed), scored by toy v1 in " in lines[-1]


def test_groups_come_in_the_order_of_the_file(cli, server, groups):
    ran = cli("rank", "--input", groups, "--window=8", server.endpoint)
    titles = [line.strip() for line in ran.out.splitlines() if line.startswith("Number ")]
    assert titles == [f"Number {i}?" for i in range(30)]
    answer = json.loads(cli("rank", "--input", groups, "--json", server.endpoint).out)
    assert [group.get("line", group.get("id")) for group in answer["groups"]] == ["sums", *range(2, 32)]
    assert {each["label"] for each in answer["groups"][0]["ranked"]} == {"good", "coloured", "wrong"}


def test_a_checkpoint_ranks_without_a_server(cli, checkpoint, groups):
    ran = cli("rank", "--input", groups, "--model", checkpoint, "--json")
    answer = json.loads(ran.out)
    assert ran.code == 0 and answer["model"] == "tiny" and answer["num_pairs"] == 64
    for group in answer["groups"]:
        scores = [each["score"] for each in group["ranked"]]
        assert scores == sorted(scores, reverse=True)


def modules_after(code: str) -> set[str]:
    command = [sys.executable, "-c", f"{code}; import sys; print(); print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1].split())


def test_asking_a_server_loads_no_torch(server):
    for verb, arguments in (("rank", ["--prompt=x", "--response=y"]), ("models", [])):
        code = f"from rewardserve.cli import {verb}; assert {verb}.run({[*arguments, server.endpoint]}) == 0"
        assert "torch" not in modules_after(code)


def test_scoring_offline_loads_no_server(checkpoint):
    arguments = ["--prompt=x", "--response=y", f"--model={checkpoint}"]
    loaded = modules_after(f"from rewardserve.cli import rank; assert rank.run({arguments}) == 0")
    assert "torch" in loaded and not {"rewardserve.app", "rewardserve.transport.grpc_server"} & loaded


@pytest.mark.parametrize(
    ("text", "shown"), [("\n\n a\tb \nc", "a b"), ("\x1b[2Jx", "[2Jx"), ("é 👍", "é 👍"), ("", "")]
)
def test_a_response_cannot_steer_the_terminal(text, shown):
    assert one_line(text) == shown
