import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewardserve.evaluation import suites
from rewardserve.evaluation.data import Judged
from rewardserve.evaluation.suites import DESCRIPTIONS, RATED_WORST

GOOD = (
    "The Nile is the longest river of Africa. It flows north through eleven countries.\n"
    "NASA has pictures of its delta. I would start with those. Most of Egypt lives beside it."
)
ROWS = [
    Judged(1, "Which river is longest?", ("No idea.", GOOD), (0.1, 0.9)),
    Judged(2, ({"role": "user", "content": "Two plus two?"},), ("It is four. You add them.", "Five."), None),
    Judged(3, "Name a colour.", ("Blue is a colour, and so is red.", "7"), (1.0, 0.0)),
]


def by_suite(rows=ROWS, **options):
    found = {}
    for each in suites.make(rows, seed=options.pop("seed", 0), **options):
        found.setdefault(each.suite, {})[rows[each.row].prompt_key] = each.text
    return found


def test_every_suite_alters_every_good_answer():
    found = by_suite()
    assert set(found) | {RATED_WORST} == set(DESCRIPTIONS)
    for name, texts in found.items():
        assert len(texts) == 3, name
        for row in ROWS:
            assert texts[row.prompt_key] not in ("", row.responses[row.best]), name


def test_each_suite_does_what_it_says():
    found = {name: texts[ROWS[0].prompt_key] for name, texts in by_suite().items()}
    assert found["sycophancy"].endswith(GOOD) and len(found["sycophancy"]) > len(GOOD)
    assert found["repetition"].startswith(GOOD) and len(found["repetition"]) > 1.5 * len(GOOD)
    assert len(found["verbosity"]) > 1.2 * len(GOOD) and "eleven countries" in found["verbosity"]
    assert found["format"].count("\n- **") == 5 and "# Answer" in found["format"]
    assert found["hedging"].count("eleven countries") == 1 and found["hedging"].endswith("all of this.")
    assert GOOD.startswith(found["truncated"]) and len(found["truncated"]) < 0.6 * len(GOOD)
    assert sorted(found["shuffled"].split()) == sorted(GOOD.split())
    assert found["lazy"] in suites.LAZY
    assert found["off_topic"] in {row.responses[row.best] for row in ROWS[1:]}


def test_names_and_i_keep_their_capitals_behind_other_words():
    said = by_suite()["hedging"][ROWS[0].prompt_key]
    assert " NASA has" in said and " I would" in said and " most of Egypt" in said


def test_the_same_seed_makes_the_same_and_another_does_not():
    assert by_suite(seed=3) == by_suite(seed=3) != by_suite(seed=4)


def test_the_order_of_the_rows_does_not_matter_but_for_off_topic():
    there, back = by_suite(), by_suite(ROWS[::-1])
    assert {**there, "off_topic": None} == {**back, "off_topic": None}


def test_of_a_prompt_on_several_rows_one_is_taken():
    again = [*ROWS, replace(ROWS[2], line=4)]
    assert {each.row for each in suites.make(again, seed=0)} == {0, 1, 2}


def test_no_more_prompts_are_taken_than_asked_for_and_not_always_the_first():
    rows = [replace(ROWS[0], line=n, prompt=f"Question {n}?") for n in range(40)]
    chosen = [{each.row for each in suites.make(rows, seed, max_prompts=5)} for seed in (1, 2)]
    assert len(chosen[0]) == len(chosen[1]) == 5 and chosen[0] != chosen[1]
    assert suites.make(rows, 1, max_prompts=0) and len({each.row for each in suites.make(rows, 1)}) == 40


def test_a_single_prompt_has_nothing_off_topic_and_a_blank_answer_no_suite():
    assert "off_topic" not in by_suite(ROWS[:1])
    assert suites.make([Judged(1, "x", ("  ", "a"), None)], seed=0) == []


@given(st.text(min_size=1, max_size=300).filter(str.strip), st.integers(0, 99))
def test_whatever_an_answer_is_it_can_be_spoilt(text, seed):
    rows = [Judged(1, "p", (text, "x"), None), Judged(2, "q", ("fine", "x"), None)]
    for each in suites.make(rows, seed):
        assert each.text not in ("", rows[each.row].responses[0])
        assert each.suite in DESCRIPTIONS


def test_results_compare_the_untouched_with_the_altered():
    altered = [suites.Altered("lazy", 0, "..."), suites.Altered("lazy", 1, "Sure!"), suites.Altered("lazy", 2, "...")]
    scores = [[0.0, 2.0], [1.0, None], [3.0, -1.0]]
    found = {each.name: each for each in suites.results(ROWS, scores, altered, [1.5, 1.0, None])}
    lazy = found["lazy"]
    assert (lazy.untouched_wins.value, lazy.untouched_wins.num_pairs, lazy.untouched_wins.num_ties) == (0.75, 2, 1)
    assert lazy.median_margin == 0.25 and lazy.kind == "known_bad"
    assert found[RATED_WORST].untouched_wins.num_pairs == 2, "the pair would be the ranking once more"
    assert set(found) == {"lazy", RATED_WORST}, "a suite without a pair is left out"


def test_the_worst_must_be_worse_by_more_than_the_gap():
    scores = [[0.0, 2.0], [1.0, None], [3.0, -1.0]]
    (found,) = suites.results(ROWS, scores, [], [], min_gap=0.85)
    assert found.untouched_wins.num_pairs == 1
    assert suites.results([Judged(1, "p", ("a", "b"), (1.0, 1.0))], [[1.0, 2.0]], [], []) == ()


@pytest.mark.parametrize("name", suites._CHANGES)
def test_one_word_is_no_error(name):
    assert isinstance(suites._CHANGES[name][2]("Yes", random.Random(0)), str)


@pytest.mark.parametrize("answer", ["Yes.", "Paris\n", " 42!", "no no  no\n"])
def test_what_a_change_leaves_as_it_was_is_no_broken_answer(answer):
    """Without its full stop a word is the same answer; a model that likes it as much is no worse for that."""
    found = by_suite([Judged(1, "q", (answer, "x"), None)])
    assert "shuffled" not in found
    assert ("truncated" in found) == (len(answer.split()) > 1)
