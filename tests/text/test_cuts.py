"""A prompt is tokenized once for all its responses, where that changes no id."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rewardserve.types import Rendered
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Raw

examples = settings(max_examples=60)

CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}</s>{% endfor %}"
PIECES = ("un", "happy", " ", "  ", "\n", "▁", "x", "É", "<|im_start|>", "</s>", "<s>", "<mask>", "👍")
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join)


def piecewise(tools, prepend: str | None = None, normalizer: normalizers.Normalizer | None = None) -> Raw:
    """SentencePiece's manner: spaces are ▁."""
    raw = Raw(models.BPE(unk_token="<unk>", byte_fallback=True))
    if prepend:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
        raw.decoder = decoders.Metaspace(prepend_scheme=prepend)
    if normalizer:
        raw.normalizer = normalizer
    specials = ["<unk>", "<|pad|>", tools.BOS, "</s>", "<|im_start|>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=395, special_tokens=specials[:5], show_progress=False)
    raw.train_from_iterator(["unhappy un happy x É the answer"] * 9, trainer)
    return raw


def with_token(tools, token: AddedToken, name: str = "<mask>") -> Raw:
    assert token.content == name
    return tools.byte_level(["<|pad|>", tools.BOS, "</s>", "<|im_start|>", token])


MAKE = {
    "byte level": lambda tools: tools.byte_level(),
    "metaspace always": lambda tools: piecewise(tools, "always"),
    "metaspace first": lambda tools: piecewise(tools, "first"),
    "metaspace never": lambda tools: piecewise(tools, "never"),
    "old llama": lambda tools: piecewise(
        tools, None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
    "strips": lambda tools: piecewise(tools, "always", normalizers.Strip()),
    "lower case": lambda tools: piecewise(tools, "first", normalizers.Lowercase()),
    "joins spaces": lambda tools: piecewise(tools, "first", normalizers.Replace(Regex(" {2,}"), " ")),
    "lstrip": lambda tools: with_token(tools, AddedToken("<mask>", lstrip=True, special=True)),
    "rstrip": lambda tools: with_token(tools, AddedToken("<mask>", rstrip=True, special=True)),
    "both": lambda tools: with_token(tools, AddedToken("<mask>", lstrip=True, rstrip=True, special=True)),
    "no template": lambda tools: tools.byte_level(),
}


@pytest.fixture(scope="module")
def made(make_text, tools) -> dict:
    return {name: make_text(None if name == "no template" else CHAT, raw=make(tools)) for name, make in MAKE.items()}


@pytest.mark.parametrize("name", MAKE)
@examples
@given(prompt=texts, responses=st.lists(texts, min_size=1, max_size=3))
@example(prompt="x <mask>x", responses=["x", " "])
@example(prompt="<s>x </s> <|im_start|>", responses=[" x", "x"])
def test_the_ids_are_those_of_the_whole_text_whether_it_is_cut_or_not(made, tools, name, prompt, responses) -> None:
    text = made[name]
    encoded = text.encoder().encode(tools.request((Rendered(prompt), responses)))
    for number, response in enumerate(responses):
        item = encoded.items[0][number]
        if item.failure is None:
            assert tools.whole_ids(encoded, 0, number) == text.ids(prompt + response)
        else:
            assert item.num_prompt_tokens == len(text.ids(prompt + response))


def test_byte_level_bpe_with_special_tokens_is_cut(made, styles) -> None:
    assert made["byte level"].tokenizer.cuts_are_exact
    assert all(text.tokenizer.cuts_are_exact for text in styles.values())


@pytest.mark.parametrize("name", ["lstrip", "both"])
def test_no_cut_is_made_in_front_of_a_special_token_that_eats_the_space_before_it(made, name: str) -> None:
    tokenizer = made[name].tokenizer
    assert tokenizer.cuts_are_exact, "there are others to cut at"
    assert tokenizer.prompt("a</s> b <mask>").beginning == "a"


def test_without_special_tokens_there_is_nowhere_to_cut(make_text, tools) -> None:
    raw = tools.byte_level([])
    raw.add_tokens(["</s>", "<s>", "<|pad|>"])
    text = make_text(None, raw=raw, bos=None)
    special = [t for t in text.tokenizer._tokenizer.get_added_tokens_decoder().values() if t.special]
    assert text.tokenizer.cuts_are_exact == bool(special)


def test_the_beginning_is_tokenized_once_for_all_responses(made, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = made["byte level"].tokenizer
    seen: list[str] = []
    encode = tokenizer._encode
    monkeypatch.setattr(tokenizer, "_encode", lambda texts: seen.extend(texts) or encode(texts))
    long = "unhappy " * 100
    prompt = f"<|im_start|>{long}</s><|im_start|>"
    begun = tokenizer.prompt(prompt)
    for batch in (["a", "b"], ["c"]):
        tokenizer.encode_after(begun, [prompt + response for response in batch])
    assert sum(long in text for text in seen) == 1


def test_a_text_that_does_not_begin_like_the_prompt_is_tokenized_whole(made, tools) -> None:
    text = made["byte level"]
    prompt = text.tokenizer.prompt("aa</s>b")
    assert prompt.beginning == "aa"
    texts = ("ab</s>bc", "aa</s>bc")
    found = text.tokenizer.encode_after(prompt, texts)
    assert prompt.ids.tolist() == text.ids("aa</s>b")
    for whole, wanted in zip(found, texts, strict=True):
        ids = text.ids(wanted)
        assert [*prompt.ids.tolist()[: whole.border], *whole.tail.tolist()] == ids
        assert whole.border == tools.common(prompt.ids.tolist(), ids)


def check_exact(text, tools, prompt: str, response: str) -> None:
    encoded = text.encoder().encode(tools.request((Rendered(prompt), [response])))
    assert tools.whole_ids(encoded, 0, 0) == text.ids(prompt + response)


def test_the_ninth_special_token_eats_the_space_before_it_too(make_text, tools) -> None:
    many = [f"<|{i}|>" for i in range(6)]
    specials = ["<|pad|>", tools.BOS, "</s>", *many, AddedToken("<mask>", lstrip=True, special=True)]
    check_exact(make_text(None, raw=tools.byte_level(specials)), tools, "fill the  <mask>", " in")


def test_a_special_token_that_stands_for_whole_words_only_is_not_cut_out_of_one(make_text, tools) -> None:
    raw = with_token(tools, AddedToken("mask", single_word=True, special=True), "mask")
    check_exact(make_text(None, raw=raw), tools, "a unmask", " x")


def test_a_special_token_inside_of_a_longer_one_is_not_cut_out(make_text, tools) -> None:
    raw = tools.byte_level(["<|pad|>", tools.BOS, "</s>", "|>", "<|im_start|>"])
    check_exact(make_text(None, raw=raw), tools, "un<|im_start|>", "happy")


def test_a_special_token_inside_of_a_longer_token_that_is_not_special_is_not_cut_out(make_text, tools) -> None:
    raw = tools.byte_level(["<|pad|>", tools.BOS, "</s>", "~~"])
    raw.add_tokens([AddedToken("<~~", normalized=False)])
    check_exact(make_text(None, raw=raw), tools, "un<~~", "happy")


def test_a_special_token_that_overlaps_itself_is_not_cut_in_the_middle(make_text, tools) -> None:
    raw = tools.byte_level(["<|pad|>", tools.BOS, "</s>", "---"])
    check_exact(make_text(None, raw=raw), tools, "un----", "happy")
