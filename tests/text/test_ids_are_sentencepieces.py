"""A checkpoint without a tokenizer.json, but with a SentencePiece model: texts become the pieces that SentencePiece
makes of them, without its package."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepieces
from rewardserve.errors import LoadFailed
from rewardserve.models.sentencepiece import read_model
from rewardserve.models.text_export import export_text
from rewardserve.models.tokenizer import load_tokenizer
from rewardserve.text.tokenizer import Tokenizer

TEXTS = ("hello world", " hello", "  hello  world\n", "é ▁x", "xhello<x>", "", "x  ")
# Of `sentencepieces.model(...)`, by sentencepiece 0.2.1
PIECES = {
    "Llama's": (
        {},
        "▁hello|▁world / ▁▁|hello / ▁▁|▁hello|▁▁|world|<0x0A> / ▁|<0xC3>|<0xA9>|▁▁|x / ▁|x|hello|<|x|> /  / ▁|x|▁▁",
    ),
    "no space before a text": (
        {"begins_with_space": False},
        "hello|▁world / ▁hello / ▁▁|hello|▁▁|world|<0x0A> / <0xC3>|<0xA9>|▁▁|x / x|hello|<|x|> /  / x|▁▁",
    ),
    "spaces are dropped": (
        {"drops_spaces": True},
        "▁hello|▁world / ▁hello / ▁hello|▁world|<0x0A> / ▁|<0xC3>|<0xA9>|▁▁|x / ▁|x|hello|<|x|> /  / ▁|x",
    ),
    "pieces that users defined": (
        {"user_defined": ("<x>", "▁▁▁")},
        "▁hello|▁world / ▁▁|hello / ▁▁▁|hello|▁▁|world|<0x0A> / ▁|<0xC3>|<0xA9>|▁▁|x / ▁|x|hello|<x> /  / ▁|x|▁▁",
    ),
}
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(model: dict[str, Any] | None = None, files: dict[str, Any] | None = None, **config: Any) -> Path:
        (tmp_path / "tokenizer.model").write_bytes(sentencepieces.model(**(model or {})))
        others = {"config.json": {"model_type": "llama"}, "tokenizer_config.json": {**SPECIALS, **config}}
        for name, content in (others | (files or {})).items():
            (tmp_path / name).write_text(json.dumps(content))
        return tmp_path

    return make


def pieces(folder: Path, text: str) -> list[str]:
    """As the front makes them."""
    spec, reason = export_text(folder)
    assert spec is not None, reason
    names = {i: piece.text for i, piece in enumerate(read_model(folder / "tokenizer.model").pieces)}
    (ids,) = Tokenizer(spec).encode([text])
    return [names.get(i, f"#{i}") for i in np.asarray(ids).tolist()]


@pytest.mark.parametrize("kind", PIECES)
def test_pieces_are_the_librarys(make: Make, kind: str) -> None:
    model, wanted = PIECES[kind]
    folder = make(model)
    assert " / ".join("|".join(pieces(folder, text)) for text in TEXTS) == wanted


@pytest.mark.parametrize("config", [{}, {"legacy": None}, {"legacy": True, "tokenizer_class": "LlamaTokenizer"}])
def test_a_space_is_put_before_each_text_between_special_tokens(make: Make, config: dict[str, Any]) -> None:
    """So it was in transformers 4 unless `legacy` was false; the class for Llama in transformers 5 wants to be told."""
    assert pieces(make(**config), "USER</s>USER</s> hello") == ["▁USER", "</s>", "▁USER", "</s>", "▁▁", "hello"]


def test_only_the_first_text_has_one_where_the_files_say_so(make: Make) -> None:
    assert pieces(make(legacy=False), "USER</s>USER</s> hello") == ["▁USER", "</s>", "USER", "</s>", "▁hello"]


def test_no_text_has_one_where_the_files_say_so(make: Make) -> None:
    assert pieces(make(add_prefix_space=False), "USER</s>USER") == ["USER", "</s>", "USER"]


def test_a_tokens_place_may_have_been_kept_free(make: Make) -> None:
    """As InternLM2's <|im_start|>, which its SentencePiece model calls by another name."""
    token = {"content": "<|im_start|>", "lstrip": False, "rstrip": False, "normalized": True, "special": True}
    place = [piece.text for piece in read_model(make() / "tokenizer.model").pieces].index("▁USER")
    folder = make(added_tokens_decoder={str(place): token}, additional_special_tokens=["<|im_start|>"])
    assert pieces(folder, "x<|im_start|>x") == ["▁", "x", "▁USER", "▁", "x"]


def test_added_tokens_follow_the_model(make: Make) -> None:
    size = len(read_model(make() / "tokenizer.model").pieces)
    files = {
        "added_tokens.json": {"<pad>": size, "<|tool|>": size + 1},
        "special_tokens_map.json": {"pad_token": {"content": "<pad>", "normalized": True}, "bos_token": "<pad>"},
    }
    folder = make(files=files)
    assert pieces(folder, "x<|tool|>x<pad>") == ["▁", "x", f"#{size + 1}", "▁", "x", f"#{size}"]
    assert load_tokenizer(folder).bos_token == "<pad>"


@pytest.mark.parametrize(
    ("config", "around"),
    [
        ({}, ["<s>", "▁hello"]),
        ({"add_bos_token": False}, ["▁hello"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<s>", "▁hello", "</s>"]),
        ({"bos_token": None}, ["▁hello"]),
    ],
)
def test_what_the_tokenizer_itself_would_add(make: Make, config: dict[str, Any], around: list[str]) -> None:
    """Texts are taken as they stand; the server says at load what is then missing."""
    tokenizer = load_tokenizer(make(**config))
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello")["input_ids"]) == around


def test_added_tokens_that_cannot_have_their_ids_are_refused(make: Make) -> None:
    size = len(read_model(make() / "tokenizer.model").pieces)
    folder = make(files={"added_tokens.json": {"<|tool|>": size + 7}})
    with pytest.raises(LoadFailed, match=r"<\|tool\|>"):
        load_tokenizer(folder)
    assert export_text(folder)[0] is None


def test_what_is_saved_again_has_the_same_ids(make: Make, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As after training."""
    folder, again = make(chat_template="{{ bos_token }}"), tmp_path_factory.mktemp("again")
    load_tokenizer(folder).save_pretrained(again)
    (again / "config.json").write_text((folder / "config.json").read_text())
    one, other = load_tokenizer(folder), load_tokenizer(again)
    for text in (*TEXTS, "USER</s>USER</s> hello"):
        assert one(text)["input_ids"] == other(text)["input_ids"]
    assert (one.eos_token, one.chat_template) == (other.eos_token, other.chat_template) == ("</s>", "{{ bos_token }}")


@pytest.mark.parametrize("content", [b"", b"x", b"\x0a\xff\xff\x03", b"aGVsbG8= 0\nd29ybGQ= 1\n"])
def test_other_files_are_no_models(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"protobuf|SentencePiece"):
        read_model(tmp_path / "tokenizer.model")
