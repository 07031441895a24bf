"""A line of the data is understood, or named with what is wrong in it."""

import gzip
import json

import pytest
from rewardserve.options import ConfigError
from rewardserve.training.rows import BadRow, Comparison, parse_rows, read_rows
from rewardserve.types import Conversation, Message, PlainText

PAIR = {"prompt": "two?", "chosen": "four", "rejected": "five"}
RATED = {"prompt": "two?", "responses": ["a", "b", "c"], "ratings": [1, 3, 3]}


def parse(row):
    (parsed,) = parse_rows([(row if isinstance(row, str) else json.dumps(row)).encode()], "DATA")
    return parsed


def test_a_pair_is_one_comparison():
    row = parse({**PAIR, "margin": 2, "domain": "sums"})
    assert (row.prompt, row.responses, row.domain) == (PlainText("two?"), ("four", "five"), "sums")
    assert row.comparisons == (Comparison(0, 1, 1.0, 2.0),) and row.ratings is None


def test_messages_are_a_conversation():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two?"}]
    prompt = parse({"messages": turns, "chosen": "a", "rejected": "b"}).prompt
    assert prompt == Conversation((Message("system", "Be brief."), Message("user", "two?")))


@pytest.mark.parametrize(
    ("label", "found"), [(1, (0, 1, 1.0)), (0.5, (0, 1, 0.5)), (0.25, (1, 0, 0.75)), (0, (1, 0, 1.0))]
)
def test_a_label_says_how_sure_it_is_and_below_a_half_turns_the_pair_round(label, found):
    (comparison,) = parse({**PAIR, "label": label}).comparisons
    assert (comparison.better, comparison.worse, comparison.label) == found
    assert comparison.is_tie == (label == 0.5)


def test_ratings_compare_every_two_and_equal_ones_are_ties():
    row = parse(RATED)
    assert row.ratings == (1.0, 3.0, 3.0)
    assert row.comparisons == (Comparison(1, 0), Comparison(2, 0), Comparison(1, 2, 0.5))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": "x"', "Invalid JSON: EOF while parsing an object at column 14"),
        ("[1]", "Input should be an object"),
        ({"chosen": "a", "rejected": "b"}, "prompt: is missing"),
        ({"promt": "x", "chosen": "a", "rejected": "b"}, "prompt: is missing; is 'promt' a misspelling?"),
        ({**PAIR, "messages": [{"role": "user", "content": "x"}]}, "prompt and messages: give one of them"),
        ({"prompt": "x"}, "chosen: is missing, and so are responses and ratings"),
        ({"prompt": "x", "chosen": "a"}, "rejected: is missing"),
        ({"prompt": "x", "chosen": "a", "rejcted": "b"}, "rejected: is missing; is 'rejcted' a misspelling?"),
        ({"prompt": "x", "responses": ["a"]}, "ratings: is missing"),
        ({"prompt": "x", "responses": ["a", "b"], "ratings": [1]}, "ratings: there are 1 for 2 responses"),
        ({**PAIR, "responses": ["a"], "ratings": [1]}, "chosen and responses: a row is a pair"),
        ({**PAIR, "label": 1.5}, "label: Input should be less than or equal to 1"),
        ({**PAIR, "label": "1"}, "label: Input should be a valid number"),
        ({**PAIR, "margin": -1}, "margin: Input should be greater than or equal to 0"),
        ({**PAIR, "chosen": ""}, "chosen: String should have at least 1 character"),
        ('{"prompt": "x", "responses": ["a"], "ratings": [NaN]}', "ratings[0]: Input should be a finite number"),
        ({**PAIR, "prompt": None, "messages": [{"role": "user"}]}, "messages[0].content: Field required"),
    ],
)
def test_a_bad_row_is_named_by_line_and_field(row, said):
    line = row if isinstance(row, str) else json.dumps(row)
    with pytest.raises(BadRow) as refused:
        list(parse_rows([json.dumps(PAIR).encode(), b"\n", line.encode()], "DATA"))
    assert str(refused.value).startswith(f"DATA line 3: {said}")


def test_a_file_may_be_gzip_whatever_its_name(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in (PAIR, RATED)).encode()
    (tmp_path / "plain").write_bytes(text)
    (tmp_path / "packed").write_bytes(gzip.compress(text))
    assert read_rows(str(tmp_path / "plain")) == read_rows(str(tmp_path / "packed"))
    assert len(read_rows(str(tmp_path / "plain"))) == 2


def test_a_file_that_is_not_there_cut_short_or_damaged_is_named(tmp_path):
    cut, damaged = tmp_path / "cut.gz", tmp_path / "damaged.gz"
    whole = gzip.compress(json.dumps(PAIR).encode() * 50)
    cut.write_bytes(whole[:-20])
    damaged.write_bytes(whole[:10] + b"\xff" * 20 + whole[30:])
    for path, said in ((tmp_path / "none", "No such file"), (cut, "ended before"), (damaged, "decompressing")):
        with pytest.raises(ConfigError, match=said) as refused:
            read_rows(str(path))
        assert str(path) in str(refused.value)
