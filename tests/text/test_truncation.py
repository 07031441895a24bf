"""What happens to prompt + response longer than max_length, and where the pieces go."""

import itertools

import numpy as np
import pytest
from checkpoints import VOCAB_SIZE
from hypothesis import given, settings
from hypothesis import strategies as st
from rewardserve.text.encoder import Encoder
from rewardserve.types import ItemCode, Overflow, PlainText, Rendered, StepFormat, StepStyle

examples = settings(max_examples=60)

ERROR, LEFT, RIGHT = Overflow.ERROR, Overflow.TRUNCATE_PROMPT_LEFT, Overflow.TRUNCATE_RESPONSE_RIGHT
MAX = 10
ids = st.lists(st.integers(3, VOCAB_SIZE - 1), max_size=16)
prompts = ids.filter(bool)
overflows = st.sampled_from(Overflow)


@pytest.fixture(scope="module")
def encoder(plain) -> Encoder:
    return plain.encoder(MAX)


def only(encoder: Encoder, tools, prompt: list[int], response: list[int], overflow: Overflow):
    """(item, ids) of one pair."""
    encoded = encoder.encode(tools.request((tools.pack(prompt), [tools.pack(response)]), overflow=overflow))
    item = encoded.items[0][0]
    return item, None if item.failure else tools.whole_ids(encoded, 0, 0)


def expected(prompt: list[int], response: list[int], overflow: Overflow, bos: int) -> list[int] | None:
    """The slow truth: ids that are scored, or None."""
    whole = prompt + response
    excess = len(whole) - MAX
    if not response:
        return None
    if excess <= 0:
        return whole
    kept = prompt[:1] if prompt[0] == bos else []
    if overflow is LEFT and len(prompt) - len(kept) >= excess:
        return kept + prompt[len(kept) + excess :] + response
    if overflow is RIGHT and len(prompt) < MAX:
        return whole[:MAX]
    return None


@examples
@given(prompt=prompts, response=ids, overflow=overflows, with_bos=st.booleans())
def test_the_ids_are_those_of_the_slow_truth(plain, encoder, tools, prompt, response, overflow, with_bos) -> None:
    bos = plain.hf.bos_token_id
    prompt = [bos, *prompt] if with_bos else prompt
    item, got = only(encoder, tools, prompt, response, overflow)
    wanted = expected(prompt, response, overflow, bos)
    assert got == wanted
    if wanted is None:
        assert item.failure is not None
        assert (item.num_prompt_tokens, item.num_response_tokens) == (len(prompt), len(response))
    else:
        assert item.truncated == (len(prompt) + len(response) > MAX)
        assert item.num_prompt_tokens + item.num_response_tokens == len(wanted) <= MAX
        if overflow is not RIGHT:
            assert item.num_response_tokens == len(response)


@pytest.mark.parametrize("length", [MAX - 1, MAX, MAX + 1])
@pytest.mark.parametrize("overflow", Overflow)
def test_the_limit_itself_still_fits(encoder, tools, overflow: Overflow, length: int) -> None:
    item, got = only(encoder, tools, [9] * 4, [8] * (length - 4), overflow)
    if length <= MAX:
        assert len(got) == length and not item.truncated
    elif overflow is ERROR:
        assert item.failure.code is ItemCode.OUT_OF_RANGE
    else:
        assert len(got) == MAX and item.truncated


def test_a_failure_says_how_long_it_is_how_much_too_long_and_what_alone_is_too_long(encoder, tools) -> None:
    item, _ = only(encoder, tools, [9] * 7, [8] * 5, ERROR)
    assert item.failure.code is ItemCode.OUT_OF_RANGE
    assert all(number in item.failure.message for number in ("12 tokens", "2 more", "max_length 10"))
    item, _ = only(encoder, tools, [9] * 3, [8] * 11, LEFT)
    assert item.failure.code is ItemCode.OUT_OF_RANGE and "response alone is 11" in item.failure.message
    item, _ = only(encoder, tools, [9] * 10, [8], RIGHT)
    assert item.failure.code is ItemCode.OUT_OF_RANGE and "prompt alone is 10" in item.failure.message


@pytest.mark.parametrize(("num_response", "fits"), [(8, True), (9, True), (10, False)])
def test_left_truncation_keeps_bos_and_the_whole_response(plain, encoder, tools, num_response: int, fits: bool) -> None:
    bos = plain.hf.bos_token_id
    item, got = only(encoder, tools, [bos, *range(20, 30)], [8] * num_response, LEFT)
    if fits:
        assert got[0] == bos and got[-num_response:] == [8] * num_response and len(got) == MAX
        assert item.num_prompt_tokens == MAX - num_response
    else:
        assert item.failure is not None


@pytest.mark.parametrize("num_extra", [0, 1])
def test_left_truncation_of_ids_may_leave_no_prompt_but_never_cuts_the_response(encoder, tools, num_extra: int) -> None:
    item, got = only(encoder, tools, [20, 21, 22], [8] * (MAX + num_extra), LEFT)
    if num_extra:
        assert item.failure is not None
    else:
        assert got == [8] * MAX and item.num_prompt_tokens == 0 and item.truncated


def test_left_truncation_drops_the_oldest_tokens(encoder, tools) -> None:
    assert only(encoder, tools, list(range(20, 30)), [8, 7], LEFT)[1] == [*range(22, 30), 8, 7]


def test_right_truncation_keeps_the_whole_prompt(encoder, tools) -> None:
    assert only(encoder, tools, list(range(20, 29)), [8, 7, 6], RIGHT)[1] == [*range(20, 29), 8]


@pytest.mark.parametrize("response", [[8, 7], [8, 7, 5], [8, 7, 6, 5]])
def test_right_truncation_leaves_of_the_response_more_than_what_is_appended(tools, response: list[int]) -> None:
    encoder = Encoder(None, VOCAB_SIZE, MAX, appended=5)
    assert only(encoder, tools, list(range(20, 28)), response, RIGHT)[1] == [*range(20, 28), 8, 5]
    item, _ = only(encoder, tools, list(range(20, 29)), response, RIGHT)
    assert item.failure is not None and item.failure.code is ItemCode.OUT_OF_RANGE
    assert "prompt alone is 9, before token 5" in item.failure.message


@pytest.mark.parametrize(("overflow", "prompt"), [(LEFT, "the answer " * 40), (RIGHT, "the answer")])
def test_steps_shown_apart_are_cut_as_was_asked_for(plain, tools, overflow: Overflow, prompt: str) -> None:
    how = StepFormat(StepStyle.APART, separator="\n", tag="\n")
    steps = ["x", "so " * 200] if overflow is RIGHT else ["x", "yy"]
    encoder = Encoder(plain.tokenizer, VOCAB_SIZE, 20, steps=how)
    ids = plain.ids(f"{prompt}\n"), *(plain.ids(f"{step}\n") for step in steps)
    whole = [*([] if ids[0][0] == plain.hf.bos_token_id else [plain.hf.bos_token_id]), *itertools.chain(*ids)]
    encoded = encoder.encode(tools.request((PlainText(prompt), ["\n".join(steps)]), overflow=overflow))
    assert encoded.items[0][0].truncated
    assert tools.whole_ids(encoded, 0, 0) == (whole[:20] if overflow is RIGHT else [whole[0], *whole[-19:]])


def test_a_template_that_emits_bos_keeps_it_when_its_prompt_is_cut(styles, tools) -> None:
    text = styles["llama3"]
    encoded = text.encoder(12).encode(tools.request((PlainText("the answer " * 9), ["x", "yy"]), overflow=LEFT))
    for number, response in enumerate(("x", "yy")):
        got = tools.whole_ids(encoded, 0, number)
        whole = text.ids(text.chat([("user", "the answer " * 9), ("assistant", response)], False))
        assert got == [text.hf.bos_token_id, *whole[-11:]]
        assert encoded.items[0][number].truncated


responses = st.lists(ids, min_size=1, max_size=6)


@examples
@given(prompt=prompts, given_responses=responses, overflow=overflows)
def test_no_response_depends_on_its_siblings(encoder, tools, prompt, given_responses, overflow) -> None:
    packed = [tools.pack(response) for response in given_responses]
    encoded = encoder.encode(tools.request((tools.pack(prompt), packed), overflow=overflow))
    for number, response in enumerate(given_responses):
        item, wanted = only(encoder, tools, prompt, response, overflow)
        together = encoded.items[0][number]
        assert (together.failure, together.truncated) == (item.failure, item.truncated)
        assert together.num_prompt_tokens == item.num_prompt_tokens
        assert together.num_response_tokens == item.num_response_tokens
        if wanted is not None:
            assert tools.whole_ids(encoded, 0, number) == wanted


pieces = st.lists(st.sampled_from(["un", "happy", "unhappy", " ", "x", "\n", "<s>", "👍🏽"]), max_size=8).map("".join)


@examples
@given(prompt=pieces.filter(bool), given_responses=st.lists(pieces, min_size=1, max_size=5), overflow=overflows)
def test_no_text_response_depends_on_its_siblings(encoder, tools, prompt, given_responses, overflow) -> None:
    encoded = encoder.encode(tools.request((Rendered(prompt), given_responses), overflow=overflow))
    for number, response in enumerate(given_responses):
        alone = encoder.encode(tools.request((Rendered(prompt), [response]), overflow=overflow))
        together, item = encoded.items[0][number], alone.items[0][0]
        assert (together.failure, together.truncated) == (item.failure, item.truncated)
        assert (together.num_prompt_tokens, together.num_response_tokens) == (
            item.num_prompt_tokens,
            item.num_response_tokens,
        )
        if item.failure is None:
            assert tools.whole_ids(encoded, 0, number) == tools.whole_ids(alone, 0, 0)


@examples
@given(groups=st.lists(st.tuples(prompts, responses), min_size=1, max_size=4), overflow=overflows)
def test_every_scored_response_has_its_own_place_and_no_place_is_left_over(encoder, tools, groups, overflow) -> None:
    encoded = encoder.encode(
        tools.request(*((tools.pack(p), [tools.pack(r) for r in rs]) for p, rs in groups), overflow=overflow)
    )
    places = [(i.group, i.index) for items in encoded.items for i in items if i.failure is None]
    offered = [(g, r) for g, group in enumerate(encoded.groups) for r in range(len(group.responses))]
    assert sorted(places) == offered
    assert all(response for group in encoded.groups for response in group.responses)
    for (prompt, given_responses), items in zip(groups, encoded.items, strict=True):
        assert len(items) == len(given_responses)
        fitting = {
            item.group
            for item, response in zip(items, given_responses, strict=True)
            if item.failure is None and not item.truncated
        }
        assert len(fitting) <= 1, "responses scored as they are share one prompt"
        prompts_used = [encoded.groups[g].prompt for g in {item.group for item in items if item.failure is None}]
        assert len(prompts_used) == len(set(prompts_used)), "the same prompt ids are one group"
        for item in items:
            if item.failure is None and not item.truncated:
                assert encoded.groups[item.group].prompt == np.array(prompt, "<i4").tobytes()


def test_groups_of_different_requests_groups_are_never_merged(encoder, tools) -> None:
    same = (tools.pack([5, 6]), [tools.pack([7])])
    encoded = encoder.encode(tools.request(same, same))
    assert len(encoded.groups) == 2
    assert [items[0].group for items in encoded.items] == [0, 1]


def test_responses_cut_alike_share_their_shortened_prompt(encoder, tools) -> None:
    prompt = tools.pack(list(range(20, 28)))
    responses = [tools.pack([i] * 5) for i in range(3, 6)]
    encoded = encoder.encode(tools.request((prompt, responses), overflow=LEFT))
    assert len(encoded.groups) == 1 and len(encoded.groups[0].responses) == 3
