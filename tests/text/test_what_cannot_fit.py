"""What is too long is found out before it is tokenized or copied, and what nobody waits for is given up."""

import sys
import threading
import tracemalloc
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rewardserve.text import encoder as encoding
from rewardserve.text.encoder import Abandoned, Encoder, is_quickly_encoded
from rewardserve.text.text_bound import NFC_SHRINKS, TextBound
from rewardserve.types import ItemCode, ItemFailure, Overflow, PlainText, Rendered
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Raw

examples = settings(max_examples=100)
MAX = 50
KELVIN, JAMO = "\u212a", "\u1100\u1161\u11a8"


def byte_fallback(tools, normalizer: normalizers.Normalizer, missing: int = 0) -> Raw:
    """SentencePiece's manner, with a token for each byte but for the first `missing`."""
    spaces, hexes = ["▁" * n for n in (1, 2, 4, 8)], [f"<0x{i:02X}>" for i in range(missing, 256)]
    tokens = ["<unk>", "<|pad|>", tools.BOS, "</s>", "a", *spaces, *hexes]
    merges = [(space, space) for space in spaces[:-1]]
    vocab = {token: i for i, token in enumerate(tokens)}
    raw = Raw(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer, raw.decoder = normalizer, decoders.ByteFallback()
    raw.add_special_tokens(["<|pad|>", tools.BOS, "</s>"])
    return raw


def composing(tools) -> Raw:
    raw = tools.byte_level()
    raw.normalizer = normalizers.NFC()
    return raw


LLAMA = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
BOUNDED = {
    "byte level": lambda tools: tools.byte_level(),
    "composing": composing,
    "byte fallback": lambda tools: byte_fallback(tools, LLAMA),
}


def pre_tokenized(tools, *steps) -> Raw:
    raw = tools.byte_level()
    raw.pre_tokenizer = pre_tokenizers.Sequence([*steps, raw.pre_tokenizer])
    return raw


def normalized(tools, normalizer: normalizers.Normalizer) -> Raw:
    raw = tools.byte_level()
    raw.normalizer = normalizer
    return raw


UNBOUNDED = {
    "bytes that have no token": lambda tools: byte_fallback(tools, LLAMA, missing=1),
    "a normalizer that drops": lambda tools: normalized(tools, normalizers.Strip()),
    "one that shortens": lambda tools: normalized(tools, normalizers.Replace("    ", " ")),
    "a cut that drops": lambda tools: pre_tokenized(tools, pre_tokenizers.Split(" ", "removed")),
    "whitespace is dropped": lambda tools: pre_tokenized(tools, pre_tokenizers.WhitespaceSplit()),
    "a token that eats spaces": lambda tools: tools.byte_level(
        ["<|pad|>", tools.BOS, "</s>", AddedToken("<mask>", rstrip=True, special=True)]
    ),
}


@pytest.fixture(scope="module")
def bounded(make_text, tools) -> dict:
    return {name: make_text(None, raw=make(tools)) for name, make in BOUNDED.items()}


pieces = st.sampled_from(["<s>", "the answer is 42. ", "\u1e69", KELVIN, JAMO, "👍🏽", " ", "\n\n\n", "a", "</s>", "▁"])
texts = st.lists(st.tuples(pieces, st.integers(1, 60)), max_size=8).map(lambda ps: "".join(p * n for p, n in ps))


@pytest.mark.parametrize("name", BOUNDED)
@examples
@given(text=st.one_of(texts, st.text(max_size=200)))
@example("<s>" * 500)
@example("<s>" * 500 + " " * 500)
@example(KELVIN * 1000)
@example(JAMO * 1000)
@example("▁" * 999)
def test_no_text_has_fewer_tokens_than_is_claimed(bounded, name: str, text: str) -> None:
    tokenizer = bounded[name].tokenizer
    least = tokenizer.least_tokens(text)
    assert least <= len(tokenizer.encode([text])[0])
    assert not text.strip("<s>") or least > 0


@pytest.mark.parametrize("name", UNBOUNDED)
def test_nothing_is_claimed_of_a_tokenizer_whose_tokens_may_be_of_any_length(tools, name: str) -> None:
    raw = UNBOUNDED[name](tools)
    assert TextBound.of(raw.to_str(), raw.token_to_id(tools.BOS)) is None


def test_nothing_is_claimed_where_a_repeated_bos_is_no_special_token(tools) -> None:
    raw = tools.byte_level()
    assert TextBound.of(raw.to_str(), raw.token_to_id("a")) is None


def test_composition_shrinks_no_more_than_is_said() -> None:
    """Text becomes its decomposition and then what that composes to: both steps, over all characters there are."""

    def size(text: str) -> int:
        return len(text.encode())

    characters = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
    changed = [(c, decomposed) for c in characters if (decomposed := unicodedata.normalize("NFD", c)) != c]
    shrinks = max(size(c) / size(decomposed) for c, decomposed in changed)
    composes = max(size(decomposed) / size(c) for c, decomposed in changed)
    assert shrinks * composes <= NFC_SHRINKS


@pytest.fixture
def seen(plain, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were tokenized."""
    found: list[str] = []
    encode = plain.tokenizer._encode
    monkeypatch.setattr(plain.tokenizer, "_encode", lambda texts: found.extend(texts) or encode(texts))
    return found


def failures(encoder: Encoder, tools, prompt, responses, overflow: Overflow = Overflow.ERROR) -> list[ItemFailure]:
    encoded = encoder.encode(tools.request((prompt, responses), overflow=overflow))
    return [item.failure for item in encoded.items[0]]


LONG = "unhappy " * 10_000


@pytest.mark.parametrize("prompt", [PlainText(LONG), Rendered(LONG)])
def test_a_text_that_cannot_fit_is_not_tokenized(plain, tools, seen, prompt) -> None:
    first, second = failures(plain.encoder(MAX), tools, prompt, ["x", tools.pack([5])])
    assert not seen
    for failure in (first, second):
        assert failure.code is ItemCode.OUT_OF_RANGE
        assert "at least" in failure.message and f"max_length {MAX}" in failure.message


def test_responses_that_cannot_fit_are_not_tokenized_and_the_others_are_scored(plain, tools, seen) -> None:
    for prompt in (Rendered("Hi"), tools.pack([5, 6])):
        first, long, last = failures(plain.encoder(MAX), tools, prompt, ["x", LONG, tools.pack([7])])
        assert first is None and last is None and long.code is ItemCode.OUT_OF_RANGE
    assert LONG not in "".join(seen)


def test_no_text_is_tokenized_behind_ids_that_are_too_many_already(plain, tools, seen) -> None:
    prompt = tools.pack([5] * (MAX + 1))
    text, ids, empty = failures(plain.encoder(MAX), tools, prompt, ["x", tools.pack([7, 8]), ""])
    assert seen == [""]
    assert text.code is ItemCode.OUT_OF_RANGE and "at least 52" in text.message
    assert ids.message == "prompt + response is 53 tokens, 3 more than max_length 50"
    assert empty.code is ItemCode.INVALID_ARGUMENT


def test_what_is_to_be_cut_is_tokenized_up_to_a_limit_that_it_names(plain, tools, monkeypatch) -> None:
    for overflow in (Overflow.TRUNCATE_PROMPT_LEFT, Overflow.TRUNCATE_RESPONSE_RIGHT):
        encoder = plain.encoder(MAX)
        long_prompt = overflow is Overflow.TRUNCATE_PROMPT_LEFT
        prompt, response = (Rendered(LONG), "x") if long_prompt else (Rendered("x"), LONG)
        monkeypatch.setattr(encoding, "MAX_CUT_CHARACTERS", len(LONG) + 1)
        assert failures(encoder, tools, prompt, [response], overflow) == [None]
        monkeypatch.setattr(encoding, "MAX_CUT_CHARACTERS", len(LONG))
        (failure,) = failures(encoder, tools, prompt, [response], overflow)
        assert failure.code is ItemCode.OUT_OF_RANGE and f"no more than {len(LONG)} may be truncated" in failure.message


def test_where_nothing_is_known_the_text_is_tokenized_and_counted(make_text, tools) -> None:
    text = make_text(None, raw=UNBOUNDED["a token that eats spaces"](tools))
    (failure,) = failures(text.encoder(MAX), tools, Rendered(LONG), ["x"])
    assert f"is {len(text.ids(LONG + 'x'))} tokens" in failure.message


# -- memory --------------------------------------------------------------------------------------------------------

NUM_RESPONSES = 4000
PROMPT_IDS = 100_000  # 0.4 MB; a copy of it for each response is 1.6 GB
PEAK_BYTES = 64 << 20


def peak_bytes(work) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("overflow", Overflow)
@pytest.mark.parametrize("max_length", [2048, 200_000])
@pytest.mark.parametrize("kind", ["ids", "text", "mixed"])
def test_one_long_prompt_of_ids_is_not_copied_for_each_response(plain, tools, kind, max_length, overflow) -> None:
    responses = {"ids": [tools.pack([5])], "text": ["x"], "mixed": [tools.pack([5, 6]), "x", "", tools.pack([])]}[kind]
    responses = responses * (NUM_RESPONSES // len(responses))
    request = tools.request((tools.pack([5] * PROMPT_IDS), responses), overflow=overflow)
    assert peak_bytes(lambda: plain.encoder(max_length).encode(request)) < PEAK_BYTES


@pytest.mark.parametrize("overflow", Overflow)
def test_one_long_prompt_of_text_is_not_copied_for_each_response(styles, tools, overflow) -> None:
    text = styles["chatml"]
    responses = ["x", tools.pack([5])] * 100
    request = tools.request((PlainText("happy " * 50_000), responses), overflow=overflow)
    for max_length in (2048, 200_000):
        assert peak_bytes(lambda limit=max_length: text.encoder(limit).encode(request)) < PEAK_BYTES


def test_prompts_that_are_cut_for_each_response_are_not_cut_on_the_event_loop(tools) -> None:
    group = (tools.pack([5] * 10_000), [tools.pack([5])] * 100)
    for overflow in Overflow:
        quick = is_quickly_encoded(tools.request(group, overflow=overflow))
        assert quick == (overflow is not Overflow.TRUNCATE_PROMPT_LEFT)


# -- nobody waits ----------------------------------------------------------------------------------------------------


def test_what_nobody_waits_for_is_given_up_after_one_batch(plain, tools, seen, monkeypatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 10)
    left = threading.Event()
    encode = plain.tokenizer._encode
    monkeypatch.setattr(plain.tokenizer, "_encode", lambda texts: left.set() or encode(texts))
    for prompt in (Rendered("Hi"), tools.pack([5])):
        left.clear()
        seen.clear()
        with pytest.raises(Abandoned):
            plain.encoder().encode(tools.request((prompt, ["unhappy"] * 50)), left)
        assert 0 < sum("unhappy" in text for text in seen) <= 2


def test_groups_that_nobody_waits_for_are_not_begun(plain, tools, seen) -> None:
    left = threading.Event()
    left.set()
    with pytest.raises(Abandoned):
        plain.encoder().encode(tools.request((Rendered("Hi"), ["x"]), (Rendered("Hi"), [tools.pack([5])])), left)
    assert not seen


@examples
@given(st.lists(texts, min_size=1, max_size=6))
def test_batches_change_nothing(plain, tools, responses: list[str]) -> None:
    request = tools.request((Rendered("unhappy <s>un"), responses), (tools.pack([5]), responses))
    whole = plain.encoder().encode(request)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BATCH_CHARACTERS", 1)
        assert plain.encoder().encode(request) == whole
