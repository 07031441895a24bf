"""What the front scores is, token by token, what transformers makes of the same conversation."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rewardserve.types import Conversation, Message, PlainText, Rendered

examples = settings(max_examples=60)

PIECES = (
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "un",
    "happy",
    "unhappy",
    "the",
    " the",
    "'s",
    "é",
    "e\u0301",
    "👍",
    "👍🏽",
    "\u200d",
    "。中文",
    "0123",
    "<b>",
    "\\",
    '"',
    "\x00",
    "{{ x }}",
    "</think>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "[INST]",
    " [/INST]",
    "<end_of_turn>",
    "<|im_",
    "start|>",
)
texts = st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(st.characters(exclude_categories=["Cs"]), max_size=4)), max_size=6
).map("".join)
responses = st.lists(texts, min_size=1, max_size=4)
NASTY = ("", " ", "\n", "\nx", "  x", "happy", " happy", "👍🏽", "<|im_end|>", "<s>", "<s><s>x", "</s>", "'s", "\n\n\n")


def check(text, tools, prompt, prompt_text: str, whole_texts: list[str], given_responses: list[str]) -> None:
    """Every item's ids are those of its joined text, cut at the longest common token prefix."""
    encoded = text.encoder().encode(tools.request((prompt, given_responses)))
    prompt_ids = text.ids(prompt_text)
    for number, whole in enumerate(whole_texts):
        item, wanted = encoded.items[0][number], text.ids(whole)
        border = tools.common(prompt_ids, wanted)
        assert item.num_prompt_tokens == border
        assert item.num_response_tokens == len(wanted) - border
        if border == len(wanted):
            assert item.failure is not None and "empty" in item.failure.message
        else:
            assert tools.whole_ids(encoded, 0, number) == wanted


def check_chat(text, tools, messages: list[tuple[str, str]], given_responses: list[str]) -> None:
    prompt = Conversation(tuple(Message(role, content) for role, content in messages))
    wholes = [text.chat([*messages, ("assistant", response)], False) for response in given_responses]
    check(text, tools, prompt, text.chat(messages, True), wholes, given_responses)


STYLE_NAMES = ("chatml", "llama3", "mistral", "gemma", "dated", "json and loops", "generation", "stripping", "thinking")


def test_all_styles_are_tested(tools) -> None:
    assert set(STYLE_NAMES) == set(tools.STYLES)


@pytest.mark.parametrize("style", STYLE_NAMES)
@examples
@given(prompt=texts, given_responses=responses)
@example(prompt="un", given_responses=["happy", "", "\n"])
@example(prompt="ends in a space ", given_responses=["x", " x", "\nx"])
@example(prompt="<s>begins with BOS", given_responses=["<s>", "x"])
def test_a_user_turn_and_its_responses(styles, tools, style: str, prompt: str, given_responses: list[str]) -> None:
    text = styles[style]
    wholes = [text.chat([("user", prompt), ("assistant", response)], False) for response in given_responses]
    check(text, tools, PlainText(prompt), text.chat([("user", prompt)], True), wholes, given_responses)


@pytest.mark.parametrize("style", STYLE_NAMES)
@examples
@given(turns=st.lists(texts, min_size=1, max_size=2), last=texts, given_responses=responses)
def test_a_conversation_of_several_turns(styles, tools, style: str, turns, last, given_responses) -> None:
    turns_so_far = [turn for text in turns for turn in (("user", text), ("assistant", text + "</think> ok"))]
    check_chat(styles[style], tools, [*turns_so_far, ("user", last)], given_responses)


@pytest.mark.parametrize("style", ["chatml", "llama3", "dated", "json and loops", "generation", "stripping"])
def test_a_system_turn(styles, tools, style: str) -> None:
    check_chat(styles[style], tools, [("system", " Be brief.\n"), ("user", "Hi")], list(NASTY))


@pytest.mark.parametrize("style", STYLE_NAMES)
@pytest.mark.parametrize("prompt", NASTY)
def test_nasty_borders(styles, tools, style: str, prompt: str) -> None:
    check_chat(styles[style], tools, [("user", prompt)], list(NASTY))


@examples
@given(prompt=texts.filter(bool), given_responses=responses)
@example(prompt="un", given_responses=["happy", "", " happy"])
@example(prompt="ends in a space ", given_responses=["the", "\n", ""])
@example(prompt="👍", given_responses=["🏽", "", "x"])
@example(prompt="<s>", given_responses=["<s>", "<s><s>x"])
@example(prompt="<|im_", given_responses=["start|>", "x"])
@example(prompt="x<|im_start|>a", given_responses=["b", " b"])
def test_rendered_text_is_joined_before_it_is_tokenized(styles, tools, prompt: str, given_responses: list[str]) -> None:
    wholes = [prompt + response for response in given_responses]
    check(styles["llama3"], tools, Rendered(prompt), prompt, wholes, given_responses)


@examples
@given(prompt=texts.filter(bool), given_responses=responses)
def test_without_a_template_plain_text_is_verbatim(plain, tools, prompt: str, given_responses: list[str]) -> None:
    wholes = [prompt + response for response in given_responses]
    check(plain, tools, PlainText(prompt), prompt, wholes, given_responses)


def test_a_merge_across_the_border_moves_the_border_back(plain, tools) -> None:
    encoded = plain.encoder().encode(tools.request((PlainText("the unh"), ["appy"])))
    item = encoded.items[0][0]
    assert tools.whole_ids(encoded, 0, 0) == plain.ids("the unhappy")
    assert item.num_prompt_tokens < len(plain.ids("the unh")), "the prompt's last token is not in the joined text"


def test_a_template_that_emits_bos_and_a_text_that_begins_with_it_give_one(styles, tools) -> None:
    text = styles["llama3"]
    bos = text.hf.bos_token_id
    for prompt in ("<s>hi", "<s><s>hi"):
        encoded = text.encoder().encode(tools.request((Rendered(prompt), ["x"])))
        assert tools.whole_ids(encoded, 0, 0) == [bos, *text.ids("hix")]


@pytest.mark.parametrize("prompt", ["<s>hi", "<s><s>hi"])
def test_a_user_turn_that_begins_with_the_bos_its_template_emits_gives_one(make_text, tools, prompt: str) -> None:
    text = make_text("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    encoded = text.encoder().encode(tools.request((PlainText(prompt), ["x"])))
    assert tools.whole_ids(encoded, 0, 0) == [text.hf.bos_token_id, *text.ids("hix")]


def test_a_rendered_prompt_of_bos_alone_keeps_it(styles, tools) -> None:
    text = styles["llama3"]
    encoded = text.encoder().encode(tools.request((Rendered("<s>"), ["x"])))
    assert tools.whole_ids(encoded, 0, 0) == [text.hf.bos_token_id, *text.ids("x")]


def test_a_doubled_bos_among_the_callers_ids_is_left_alone(styles, tools) -> None:
    text = styles["llama3"]
    bos = text.hf.bos_token_id
    ids = [bos, bos, 50, 51]
    encoded = text.encoder().encode(tools.request((tools.pack(ids), [tools.pack([bos, 60])])))
    assert tools.whole_ids(encoded, 0, 0) == [*ids, bos, 60]
    encoded = text.encoder().encode(tools.request((tools.pack([bos]), [tools.pack([bos, 60])])))
    assert tools.whole_ids(encoded, 0, 0) == [bos, bos, 60]


def test_a_bos_inside_the_text_is_left_alone(styles, tools) -> None:
    text = styles["llama3"]
    encoded = text.encoder().encode(tools.request((Rendered("a<s><s>b"), ["c"])))
    assert tools.whole_ids(encoded, 0, 0).count(text.hf.bos_token_id) == 2


def test_a_checkpoint_without_bos_loses_no_token(make_text, tools) -> None:
    text = make_text(None, bos=None)
    encoded = text.encoder().encode(tools.request((PlainText("<s><s>a"), ["b"])))
    assert tools.whole_ids(encoded, 0, 0) == text.hf("<s><s>ab", add_special_tokens=False)["input_ids"]
