"""Every form a prompt and a response may have, together and wrong."""

import pytest
from checkpoints import VOCAB_SIZE
from hypothesis import given, settings
from hypothesis import strategies as st
from rewardserve.errors import InvalidRequest
from rewardserve.text.encoder import Encoder
from rewardserve.types import Conversation, ItemCode, Message, PlainText, Rendered, TokenIds

examples = settings(max_examples=60)

HI = Conversation((Message("user", "Hi"),))
ids = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20)


def refusal(encoder: Encoder, request) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        encoder.encode(request)
    return refused.value


@examples
@given(prompt=ids, responses=st.lists(ids, min_size=1, max_size=5))
def test_ids_are_scored_exactly_as_they_stand(plain, tools, prompt: list[int], responses: list[list[int]]) -> None:
    for encoder in (plain.encoder(), Encoder(None, VOCAB_SIZE, 1000)):
        encoded = encoder.encode(tools.request((tools.pack(prompt), [tools.pack(r) for r in responses])))
        assert len(encoded.groups) == 1 and encoded.groups[0].prompt == tools.pack(prompt).data
        for number, response in enumerate(responses):
            assert tools.whole_ids(encoded, 0, number) == prompt + response
            assert encoded.items[0][number].num_prompt_tokens == len(prompt)
            assert encoded.items[0][number].num_response_tokens == len(response)
        assert encoded.num_tokens == len(prompt) + sum(map(len, responses))


@examples
@given(ids)
def test_ids_after_a_text_prompt_are_appended_to_its_ids(styles, tools, response: list[int]) -> None:
    text = styles["llama3"]
    for prompt in (PlainText("Hi"), HI):
        encoded = text.encoder().encode(tools.request((prompt, [tools.pack(response), "x", tools.pack(response)])))
        prompt_ids = text.ids(text.chat([("user", "Hi")], True))
        assert tools.whole_ids(encoded, 0, 0) == tools.whole_ids(encoded, 0, 2) == prompt_ids + response
        assert tools.whole_ids(encoded, 0, 1) == text.ids(text.chat([("user", "Hi"), ("assistant", "x")], False))


def test_text_after_prompt_ids_is_tokenized_alone_and_appended(styles, tools) -> None:
    text = styles["llama3"]
    encoded = text.encoder().encode(tools.request((tools.pack([70, 71]), [" happy", tools.pack([72]), "un"])))
    assert tools.whole_ids(encoded, 0, 0) == [70, 71, *text.ids(" happy")]
    assert tools.whole_ids(encoded, 0, 1) == [70, 71, 72]
    assert tools.whole_ids(encoded, 0, 2) == [70, 71, *text.ids("un")]


def test_all_forms_together_keep_the_order_sent(styles, tools) -> None:
    text = styles["chatml"]
    ids_response = tools.pack([80])
    groups = [(prompt, ["a", ids_response, "b"]) for prompt in (PlainText("p"), HI, Rendered("r"), tools.pack([9]))]
    encoded = text.encoder().encode(tools.request(*groups))
    assert [len(items) for items in encoded.items] == [3, 3, 3, 3]
    for number, group in enumerate(groups):
        alone = text.encoder().encode(tools.request(group))
        for item in range(3):
            assert tools.whole_ids(encoded, number, item) == tools.whole_ids(alone, 0, item)


def test_rendered_text_gets_no_template_and_no_bos(styles, tools) -> None:
    text = styles["llama3"]
    encoded = text.encoder().encode(tools.request((Rendered("Hi "), ["there"])))
    assert tools.whole_ids(encoded, 0, 0) == text.ids("Hi there")


def test_a_conversation_without_a_chat_template_is_refused_by_name(plain, tools) -> None:
    error = refusal(plain.encoder(), tools.request((PlainText("p"), ["x"]), (HI, ["x"])))
    assert error.field == "groups[1].prompt.conversation"
    assert "no chat template" in error.description


def test_without_a_tokenizer_text_is_refused_with_the_reason(tools) -> None:
    encoder = Encoder(None, VOCAB_SIZE, 100, "none of tokenizer.json, ... is there")
    for prompt in (PlainText("p"), HI, Rendered("r")):
        error = refusal(encoder, tools.request((tools.pack([1]), [tools.pack([2])]), (prompt, [tools.pack([2])])))
        assert error.field == "groups[1].prompt"
        assert "token_ids only" in error.description and "tokenizer.json" in error.description
    error = refusal(encoder, tools.request((tools.pack([1]), [tools.pack([2]), "text"])))
    assert error.field == "groups[0].responses[1].text"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_bytes_that_are_no_whole_ids_are_refused(plain, tools, size: int) -> None:
    error = refusal(plain.encoder(), tools.request((TokenIds(bytes(size)), [tools.pack([1])])))
    assert error.field == "groups[0].prompt.token_ids" and str(size) in error.description
    error = refusal(plain.encoder(), tools.request((tools.pack([1]), ["ok", TokenIds(bytes(size))])))
    assert error.field == "groups[0].responses[1].token_ids" and str(size) in error.description
    error = refusal(plain.encoder(), tools.request((PlainText("p"), [TokenIds(bytes(size))])))
    assert error.field == "groups[0].responses[0].token_ids"


@pytest.mark.parametrize("wrong", [-1, -100, -(2**31), VOCAB_SIZE, 2**31 - 1])
@pytest.mark.parametrize("position", [0, 3])
def test_ids_outside_the_vocabulary_are_refused_with_id_and_position(plain, tools, wrong: int, position: int) -> None:
    bad = [5] * 6
    bad[position] = wrong
    for prompt, response, field in (
        (bad, [1], "groups[0].prompt.token_ids"),
        ([1], bad, "groups[0].responses[0].token_ids"),
    ):
        error = refusal(plain.encoder(), tools.request((tools.pack(prompt), [tools.pack(response)])))
        assert error.field == field
        assert str(wrong) in error.description and f"position {position}" in error.description
        assert str(VOCAB_SIZE) in error.description


def test_the_first_and_the_last_id_of_the_vocabulary_are_in_it(plain, tools) -> None:
    edge = [0, VOCAB_SIZE - 1]
    encoded = plain.encoder().encode(tools.request((tools.pack(edge), [tools.pack(edge)])))
    assert tools.whole_ids(encoded, 0, 0) == edge + edge


def test_text_with_tokens_the_model_does_not_know_is_refused(plain, tools) -> None:
    encoder = Encoder(plain.tokenizer, vocab_size=20, max_length=100)
    assert refusal(encoder, tools.request((PlainText("zzz"), ["<s>"]))).field == "groups[0].prompt"
    assert refusal(encoder, tools.request((PlainText("<s>"), ["zzz"]))).field == "groups[0].responses[0].text"
    assert refusal(encoder, tools.request((tools.pack([1]), ["zzz"]))).field == "groups[0].responses[0].text"


def test_an_empty_response_fails_alone_where_nothing_closes_it(plain, styles, tools) -> None:
    for prompt in (tools.pack([1, 2]), PlainText("p"), Rendered("p")):
        encoded = plain.encoder().encode(tools.request((prompt, ["", "x", TokenIds(b"")])))
        empty, scored, no_ids = encoded.items[0]
        assert scored.failure is None
        for item in (empty, no_ids):
            assert item.failure is not None and item.failure.code is ItemCode.INVALID_ARGUMENT
            assert item.num_response_tokens == 0 and (item.group, item.index) == (-1, -1)
    closed = styles["chatml"].encoder().encode(tools.request((PlainText("p"), [""])))
    assert closed.items[0][0].failure is None, "the template closes the turn: there is something to score"


def test_no_engine_group_has_an_empty_response(plain, tools) -> None:
    encoded = plain.encoder().encode(tools.request((PlainText("p"), ["", ""]), (PlainText("q"), ["x", ""])))
    assert all(response for group in encoded.groups for response in group.responses)
    assert len(encoded.groups) == 1
