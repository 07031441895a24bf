"""No prompt is both trained on and measured with, whatever the rows."""

from hypothesis import given
from hypothesis import strategies as st
from preferences import parsed
from rewardserve.training.split import position, prompt_key, split, without_prompts_of
from rewardserve.types import Conversation, Message, PlainText

prompts = st.lists(st.tuples(st.text(min_size=1, max_size=6), st.sampled_from(["", "a", "b"])), max_size=30)


def rows_of(found):
    """A row for each (prompt, domain)."""
    return parsed([{"prompt": p, "chosen": "a", "rejected": "b", "domain": domain} for p, domain in found])


def keys(rows):
    return {prompt_key(row.prompt) for row in rows}


@given(prompts, st.floats(0, 0.99), st.sets(st.sampled_from(["a", "b", "c"])))
def test_no_prompt_is_on_both_sides_and_no_row_is_lost(found, share, domains):
    rows = rows_of(found)
    train, held_out = split(rows, share, domains)
    assert not keys(train) & keys(held_out)
    assert sorted(row.line for row in (*train, *held_out)) == [row.line for row in rows]
    assert all(row.domain not in domains for row in train)


@given(prompts, st.floats(0, 0.99), st.randoms())
def test_a_prompts_side_depends_on_nothing_else_in_the_file(found, share, random):
    rows = rows_of(found)
    shuffled = random.sample(rows, len(rows))
    assert keys(split(rows, share)[1]) == keys(split(shuffled, share)[1])
    for row in rows:
        assert (row in split(rows, share)[1]) == bool(split([row], share)[1])


def test_about_the_share_asked_for_is_held_out():
    rows = rows_of([(f"prompt {index}", "") for index in range(4000)])
    assert 0.08 < len(split(rows, 0.1)[1]) / 4000 < 0.12
    assert split(rows, 0.0)[1] == []


def test_spacing_case_and_later_turns_make_no_other_prompt():
    user, answer, more = (Message("user", "What  is\nTEA?"), Message("assistant", "A drink."), Message("user", "And?"))
    same = [
        PlainText("what is tea?"),
        Conversation((user,)),
        Conversation((Message("system", "x"), user, answer, more)),
    ]
    assert len({prompt_key(prompt) for prompt in same}) == 1
    assert prompt_key(Conversation((answer,))) == "a drink."


def test_positions_are_those_of_every_run():
    """A split that moves would turn held-out prompts into ones that were trained on."""
    assert position("what is tea?", seed=2024) == 0.11861947238517699


@given(prompts, prompts)
def test_what_is_measured_with_is_left_out_of_training(ours, theirs):
    rows, others = rows_of(ours), rows_of(theirs)
    kept = without_prompts_of(rows, others)
    assert not keys(kept) & keys(others)
    assert keys(rows) - keys(kept) <= keys(others)
