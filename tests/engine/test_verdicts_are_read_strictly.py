"""A judge's verdict is one number in the range for each criterion, as the last thing it wrote; else there is none."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewardserve.engine.judge import SHOWN_CHARACTERS, Unreadable, read_verdict
from rewardserve.types import VerdictFormat

RUBRIC = VerdictFormat(("correct", "clear"), (0.75, 0.25), 1.0, 10.0, 64)
SINGLE = replace(RUBRIC, criteria=("score",), weights=(1.0,), pattern=r"\[\[(?P<score>[^\]]*)\]\]")
WORDS = replace(SINGLE, pattern=r"Verdict: (?P<score>\w+)\.?", words=(("Yes", 1.0), ("No", 0.0)))


@pytest.mark.parametrize(
    "text",
    [
        '{"correct": 8, "clear": 4}',
        'It is {"correct": 1} or so. Let me see.\n\n{ "clear": 4.0,\n  "correct": 8 }\n\n',
        'So:\n```json\n{"correct": 8, "clear": 4}\n```\n',
        "x" * 100_000 + '{"correct": 8, "clear": 4}',
    ],
)
def test_a_json_verdict_is_the_last_object_whatever_came_before(text: str) -> None:
    verdict = read_verdict(text, RUBRIC)
    assert verdict.criteria == (8.0, 4.0)
    assert verdict.score == 0.75 * 8 + 0.25 * 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON object"),
        ("I would say 8 of 10.", "no JSON object"),
        ('{"correct": 8, "clear": 4} I am sure.', "no JSON object"),
        ('{"correct": 8, "clear": 4', "no JSON object"),
        ('{"correct": 8, clear: 4}', "malformed"),
        ('{"correct": ' + "[" * 3000 + "}", "malformed"),
        ('{"correct": 8}', "no value for clear"),
        ('{"correct": 8, "clear": 4, "kind": 3}', "no criterion is named 'kind'"),
        ('{"correct": 8, "clear": 4, "correct": 9}', "'correct' is there twice"),
        ('{"correct": "8", "clear": 4}', "correct is '8', not a number"),
        ('{"correct": true, "clear": 4}', "correct is True, not a number"),
        ('{"correct": null, "clear": 4}', "correct is None, not a number"),
        ('{"correct": NaN, "clear": 4}', "NaN is no number"),
        ('{"correct": 1e999, "clear": 4}', "correct is inf, not from 1 to 10"),
        ('{"correct": 0.99, "clear": 4}', "correct is 0.99, not from 1 to 10"),
        ('{"correct": 8, "clear": 11}', "clear is 11, not from 1 to 10"),
        ('{"correct": ' + "1" * 310 + ', "clear": 4}', r"correct is 1{40}, not from 1 to 10"),
        (r'{"correct": 8, "clear": 4, "\ud800": 1}', r"no criterion is named '\\ud800'"),
        (r'{"correct": 8, "\ud800": 4, "\ud800": 1}', "is there twice"),
        (r'{"correct": "\udfff", "clear": 4}', "not a number"),
    ],
)
def test_anything_else_is_no_verdict_and_says_why(text: str, words: str) -> None:
    with pytest.raises(Unreadable, match=words) as caught:
        read_verdict(text, RUBRIC)
    assert repr(text[-SHOWN_CHARACTERS:]) in str(caught.value)
    str(caught.value).encode()  # it must be possible to send


def test_a_pattern_must_end_what_was_written() -> None:
    assert read_verdict("First [[3]], but then again:\n[[7.5]]\n", SINGLE).score == 7.5
    for text, words in (
        ("[[7]] or so", "as the pattern says"),
        ("[[seven]]", "score is 'seven', not a number"),
        ("[[nan]]", "score is nan, not from 1 to 10"),
        ("[[11]]", "score is 11.0, not from 1 to 10"),
    ):
        with pytest.raises(Unreadable, match=words):
            read_verdict(text, SINGLE)


def test_a_pattern_that_tries_ever_more_ways_is_stopped() -> None:
    """Meanwhile nothing else is judged. Python's own takes a minute for thirty letters, and each doubles the time."""
    how = replace(SINGLE, pattern=r"(\w+\s?)+= (?P<score>\d+)")
    assert read_verdict("The verdict = 7", how).score == 7.0
    assert read_verdict("a" * 30 + " = x\n a = 7", how).score == 7.0
    with pytest.raises(Unreadable, match=r"the pattern came to no end within .* what it wrote ends in 'a{76} = x'"):
        read_verdict("a" * 3900 + " = x", how)


def test_words_that_stand_for_numbers_are_those_that_were_told() -> None:
    assert [read_verdict(f"Hm.\nVerdict: {word}", WORDS).score for word in ("Yes.", "No")] == [1.0, 0.0]
    with pytest.raises(Unreadable, match="score is 'yes', not a number"):
        read_verdict("Verdict: yes", WORDS)


numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers() | st.booleans() | st.text() | st.none()


@given(st.dictionaries(st.sampled_from(["correct", "clear", "kind"]), numbers), st.text())
def test_a_verdict_is_within_the_range_or_there_is_none(found: dict[str, object], before: str) -> None:
    try:
        verdict = read_verdict(before + json.dumps(found), RUBRIC)
    except Unreadable:
        return
    assert all(1 <= value <= 10 for value in (*verdict.criteria, verdict.score))
    assert verdict.criteria == (found["correct"], found["clear"])


@given(st.text())
def test_no_text_raises_anything_but_that_it_is_no_verdict(text: str) -> None:
    for how in (RUBRIC, SINGLE, WORDS):
        with pytest.raises(Unreadable):
            read_verdict(text + " .", how)
