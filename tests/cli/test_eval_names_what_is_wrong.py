import gzip
import json
import os

import pytest
from rewardserve.cli import eval as eval_
from rewardserve.options import ConfigError

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

GOOD = {"prompt": "two?", "chosen": "four", "rejected": "five"}


@pytest.fixture
def judge(cli, server, tmp_path):
    return lambda source, *arguments: cli("eval", source, server.endpoint, "--output", tmp_path / "out", *arguments)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": "x"', "Invalid JSON: EOF while parsing an object at column 14"),
        ({"chosen": "x", "rejected": "y"}, "prompt: is missing"),
        ({"promt": "x", "chosen": "y", "rejected": "z"}, "prompt: is missing; is 'promt' a misspelling?"),
        ({"prompt": "x"}, "responses: is missing"),
        ({"prompt": "x", "chosen": "y"}, "rejected: is missing, and chosen is there"),
        ({"prompt": "x", "choosen": "y", "rejected": "z"}, "responses: is missing; is 'choosen' a misspelling?"),
        ({"prompt": "x", "responses": ["a", "b"]}, "ratings: is missing; a number for each of the responses"),
        ({"prompt": "x", "responses": ["a", "b"], "ratings": [1]}, "ratings: there are 1, for 2 responses"),
        ({"prompt": "x", "responses": ["a"], "ratings": ["1"]}, "ratings[0]: Input should be a valid number"),
        ('{"prompt": "x", "responses": ["a"], "ratings": [NaN]}', "ratings[0]: Input should be a finite number"),
        ({"prompt": "x", "responses": ["a"], "ratings": [1], "chosen": "y"}, "responses and chosen: give one of them"),
        ({**GOOD, "ratings": [1, 0]}, "ratings: go with responses; chosen and rejected have none"),
        ({**GOOD, "domain": 3}, "domain: Input should be a valid string"),
        ({**GOOD, "margin": "big"}, "margin: Input should be a valid number"),
        ({**GOOD, "margin": -0.5}, "margin: Input should be greater than or equal to 0"),
        ({"messages": [{"role": "user"}], "chosen": "y", "rejected": "z"}, "messages[0].content: Field required"),
    ],
)
def test_a_bad_row_is_named_by_line_and_field_before_anything_is_scored(judge, rows_file, tmp_path, row, said):
    ran = judge(rows_file(GOOD, "", row))
    assert ran.code == 2 and f"INPUT line 3: {said}" in ran.err and ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_else_a_row_holds_is_left_alone_and_whole_numbers_are_ratings(judge, rows_file):
    row = {"prompt": "two?", "responses": ["four", "five"], "ratings": [5, 1], "domain": None, "source": "x"}
    assert judge(rows_file(row, {**GOOD, "domain": ""})).code == 0


def test_a_torn_gzip_file_is_named(judge, tmp_path):
    whole = gzip.compress(b'{"prompt": "x", "chosen": "a", "rejected": "b"}\n' * 200)
    for name, content in (("torn.gz", whole[: len(whole) // 2]), ("no.gz", b"plain text\n")):
        (tmp_path / name).write_bytes(content)
        ran = judge(tmp_path / name)
        assert ran.code == 2 and "is no whole gzip file" in ran.err


def test_a_domain_that_is_not_there_gets_the_nearest(judge, rows_file):
    source = rows_file({**GOOD, "domain": "code"}, {**GOOD, "domain": "law"})
    assert "did you mean 'code'?" in judge(source, "--in-domain=cod").err
    ran = judge(source, "--in-domain=medicine")
    assert ran.code == 2 and "no row of INPUT has this domain; there are code, law" in ran.err


def test_no_pair_says_what_would_make_one(judge, rows_file):
    ran = judge(rows_file({"prompt": "x", "responses": ["a", "b"], "ratings": [1, 1]}))
    assert ran.code == 2 and "lower it, or give rows of several rated responses" in ran.err


def test_what_could_not_be_scored_is_said_and_fails_a_strict_run(judge, rows_file, tmp_path):
    long = {**GOOD, "rejected": "word " * 200}
    source = rows_file(GOOD, long)
    ran = judge(source, "--no-suites")
    assert ran.code == 0 and "failed: 1 x OUT_OF_RANGE: prompt + response is" in ran.err and "see --overflow" in ran.err
    assert "1 pairs of 1 prompts" in ran.out
    assert judge(source, "--no-suites", "--strict").code == 1
    cut = judge(source, "--no-suites", "--strict", "--overflow=truncate-response-right")
    assert cut.code == 0 and "scored 2 rows" in cut.err, "scores of another overflow are others"


def test_where_no_row_could_be_scored_nothing_is_judged(judge, rows_file, tmp_path):
    ran = judge(rows_file({**GOOD, "chosen": "word " * 200}), "--no-suites")
    assert ran.code == 1 and "nothing to judge: no row could be scored" in ran.err
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_folder_that_cannot_be_made_is_named(cli, server, rows_file, tmp_path):
    (tmp_path / "file").write_text("")
    ran = cli("eval", rows_file(GOOD), server.endpoint, "--output", tmp_path / "file" / "out")
    assert ran.code == 2 and "--output" in ran.err and "Not a directory" in ran.err


@pytest.mark.parametrize("name", ["scipy", "matplotlib"])
def test_without_its_extra_it_is_said_before_anything_is_scored(monkeypatch, name):
    monkeypatch.setattr(eval_, "find_spec", lambda asked: None if asked == name else object())
    with pytest.raises(ConfigError, match=rf"eval needs {name}: pip install 'rewardserve\[eval\]'"):
        eval_.EvalOptions(input="in.jsonl").check()


def test_the_formats_of_a_picture_are_those_it_is_drawn_in():
    """Named twice, for drawing needs the extra and the check of the options does not."""
    from rewardserve.evaluation import picture

    assert eval_.PICTURES == picture.FORMATS


def test_a_file_may_have_any_name(judge, rows_file, tmp_path):
    """What is no formula, and bytes that are no text."""
    for name in ("$\\no{ $.jsonl", os.fsdecode(b"\xff.jsonl")):
        source = rows_file(GOOD).rename(tmp_path / name)
        assert judge(source, "--no-suites", "--picture", tmp_path / "p.png").code == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["about"]["input"] == "?.jsonl"


def test_no_server_says_what_to_do(cli, rows_file, tmp_path):
    ran = cli("eval", rows_file(GOOD), "--endpoint=127.0.0.1:1", "--timeout=1", "--output", tmp_path / "out")
    assert ran.code == 1 and "is a server there?" in ran.err


def test_help_is_readable(capsys):
    """No option takes more than 100 characters to explain."""
    long = [name for name, field in eval_.EvalOptions.model_fields.items() if len(field.description or "") > 100]
    assert long == []
    with pytest.raises(SystemExit):
        eval_.run(["--help"])
    said = capsys.readouterr().out
    assert "--no-suites" in said and "--fit-calibration" in said and '"rejected": "..."' in said
