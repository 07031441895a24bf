"""Texts become the tokens that a checkpoint's tokenizer.json says, also where transformers' AutoTokenizer goes by a
class of its own: it does so in silence for several kinds of models (huggingface/transformers#45920)."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import sentencepieces
from checkpoints import make_tokenizer
from rewardserve.models.sentencepiece import build, read_model
from rewardserve.models.text_export import export_text
from rewardserve.models.tokenizer import TELLING, load_tokenizer
from rewardserve.text.tokenizer import Tokenizer
from tokenizers import Tokenizer as Raw
from transformers import AutoTokenizer

TEXTS = [
    "In 2023 they were 12 of 650841823 in 2023.",
    "don't didn't",
    "def f():\n    x =  1\n\n",
    "Écris l'été 日本語",
] * 9
KINDS = {  # model_type, tokenizer_class
    "of no class of its own": ("qwen3", "PreTrainedTokenizerFast"),
    "a distilled Qwen": ("qwen2", "LlamaTokenizerFast"),
    "a Qwen of another's tokens": ("qwen2", "PreTrainedTokenizerFast"),
    "GPT-2's class": ("gpt2", "GPT2TokenizerFast"),
    "Llama's class": ("llama", "LlamaTokenizerFast"),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A byte-level file that keeps numbers whole; what the config and tokenizer_config.json call it."""
    model_type, tokenizer_class = request.param
    make_tokenizer(TEXTS).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": tokenizer_class}))
    return tmp_path


def test_ids_are_the_files(folder: Path) -> None:
    spec, reason = export_text(folder)
    assert spec is not None, reason
    file = Raw.from_file(str(folder / "tokenizer.json"))
    for text, ids in zip(TELLING, Tokenizer(spec).encode(TELLING), strict=True):
        assert np.frombuffer(ids, "<i4").tolist() == file.encode(text, add_special_tokens=False).ids
    (rendered,) = {probe.text for probe in spec.probes if len(probe.messages) == 1}
    assert rendered == "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"


def test_that_autotokenizer_gives_others_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, auto = Raw.from_file(str(folder / "tokenizer.json")), AutoTokenizer.from_pretrained(folder)
    differs = any(
        file.encode(text, add_special_tokens=False).ids != auto(text, add_special_tokens=False)["input_ids"]
        for text in TELLING
    )
    with caplog.at_level(logging.WARNING, logger="rewardserve"):
        load_tokenizer(folder)
    assert (f"AutoTokenizer takes its {type(auto).__name__}" in caplog.text) == differs


def test_a_space_after_special_tokens_is_the_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Llama 2's file puts one before the text after each special token, its class in transformers 5 does not."""
    (tmp_path / "model").write_bytes(sentencepieces.model())
    build(read_model(tmp_path / "model"), True, True, {}).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, logger="rewardserve"):
        own, auto = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert own.tokenize("USER</s>USER") == ["▁USER", "</s>", "▁USER"]
    assert auto.tokenize("USER</s>USER") == ["▁USER", "</s>", "USER"]
    assert "AutoTokenizer takes its LlamaTokenizer" in caplog.text


def test_a_file_beside_code_that_is_not_run_is_enough(tmp_path: Path) -> None:
    make_tokenizer(TEXTS).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    file = tmp_path / "tokenizer_config.json"
    own_code = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own_code))
    spec, reason = export_text(tmp_path)
    assert spec is not None, reason
    raw = Raw.from_file(str(tmp_path / "tokenizer.json"))
    for text, ids in zip(TELLING, Tokenizer(spec).encode(TELLING), strict=True):
        assert np.frombuffer(ids, "<i4").tolist() == raw.encode(text, add_special_tokens=False).ids
    assert spec.special_tokens["eos_token"] == "<|im_end|>"


def test_what_is_saved_again_has_the_same_ids(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As after training."""
    again = tmp_path_factory.mktemp("again")
    load_tokenizer(folder).save_pretrained(again)
    (again / "config.json").write_text((folder / "config.json").read_text())
    one, other = (load_tokenizer(each) for each in (folder, again))
    assert all(one(text)["input_ids"] == other(text)["input_ids"] for text in TELLING)
    assert (one.eos_token, one.pad_token, one.chat_template) == (other.eos_token, other.pad_token, other.chat_template)
