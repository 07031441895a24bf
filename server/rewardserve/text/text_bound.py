"""How few tokens a text can have, from its length alone: what cannot fit is then refused without tokenizing it.

A token stands for no more bytes than the vocabulary's longest one, where every byte of the text ends up in some token.
That is so for byte-level BPE and for BPE that falls back to bytes, unless a step before it drops or merges characters.
Of any other tokenizer nothing is known, and nothing is claimed.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Composition (NFC) leaves at least a ninth of the bytes: decomposing makes a third of them at worst (the Kelvin sign is
# three bytes, its K one), and putting together again another third (three jamo, nine bytes, are a syllable of three).
NFC_SHRINKS = 9


@dataclass(frozen=True, slots=True)
class TextBound:
    max_bytes: int  # of text in one token
    bos: str = ""  # any number of them at the beginning counts as one token

    @classmethod
    def of(cls, tokenizer_json: str, bos_token_id: int | None) -> "TextBound | None":
        """None if a token of this tokenizer may stand for any number of bytes."""
        tokenizer = json.loads(tokenizer_json)
        model, added = tokenizer["model"], tokenizer.get("added_tokens") or []
        shrinks = _shrinks(tokenizer.get("normalizer"))
        if shrinks is None or not _keeps_all(tokenizer.get("pre_tokenizer")) or not _tokens_for_all(tokenizer):
            return None
        if any(token.get("lstrip") or token.get("rstrip") for token in added):  # any number of spaces is part of it
            return None
        bos = [token for token in added if token["id"] == bos_token_id]
        if bos_token_id is not None and (not bos or bos[0].get("normalized")):
            return None
        longest = max(map(len, model["vocab"])) if _is_byte_level(tokenizer) else _most_bytes(model["vocab"])
        longest = max(longest, _most_bytes(token["content"] for token in added))
        return cls(shrinks * longest, bos[0]["content"] if bos else "")

    def least_tokens(self, text: str) -> int:
        if self.bos and text.startswith(self.bos):
            text = text[re.match(f"(?:{re.escape(self.bos)})*+", text).end() :]  # type: ignore[union-attr]
        return -(-len(text) // self.max_bytes)  # a character has one byte at least


def _tokens_for_all(tokenizer: dict[str, Any]) -> bool:
    """Whether there is a token for each byte, so that none is dropped or disappears into an unknown word."""
    model = tokenizer["model"]
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    if _is_byte_level(tokenizer):
        return model["vocab"].keys() >= _BYTES
    return bool(model.get("byte_fallback")) and {f"<0x{byte:02X}>" for byte in range(256)} <= model["vocab"].keys()


def _is_byte_level(tokenizer: dict[str, Any]) -> bool:
    """Whether each character of its vocabulary stands for one byte."""
    return any(step["type"] == "ByteLevel" for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))


def _most_bytes(tokens: Iterable[str]) -> int:
    return max((len(token.encode()) for token in tokens), default=1)


def _byte_symbols() -> frozenset[str]:
    """The characters that stand for bytes in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    return frozenset(map(chr, (*printable, *range(256, 256 + 256 - len(printable)))))


_BYTES = _byte_symbols()


def _shrinks(normalizer: dict[str, Any] | None) -> int | None:
    """How many bytes of text may become one; None if any number may."""
    factor = 1
    for step in _steps(normalizer, "normalizers"):
        pattern = step.get("pattern", {}).get("String")
        if step["type"] == "NFC":
            factor *= NFC_SHRINKS
        elif step["type"] == "Replace" and pattern and len(step["content"].encode()) >= len(pattern.encode()):
            pass
        elif step["type"] != "Prepend":
            return None
    return factor


def _keeps_all(pre_tokenizer: dict[str, Any] | None) -> bool:
    for step in _steps(pre_tokenizer, "pretokenizers"):
        if step["type"] == "Split" and step["behavior"] == "Removed":
            return False
        if step["type"] not in ("ByteLevel", "Digits", "Metaspace", "Split"):
            return False
    return True


def _steps(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for each in step[name] for inner in _steps(each, name)]
    return [step]
