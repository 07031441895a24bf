"""A tiny SentencePiece model, a `tokenizer.model`, as the library would write it."""

import struct
from collections.abc import Sequence

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
MERGED = ("▁▁", "he", "ll", "llo", "hello", "▁hello", "wo", "wor", "ld", "world", "▁world", "US", "ER", "USER", "▁USER")
LETTERS = "▁helowrdUSERA:<x>"


def model(user_defined: Sequence[str] = (), begins_with_space: bool = True, drops_spaces: bool = False) -> bytes:
    """Llama's layout: three special pieces, the bytes, merged pieces by falling score, letters."""
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(text, 0.0, USER_DEFINED) for text in user_defined]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    pieces += [(text, -float(i), NORMAL) for i, text in enumerate(MERGED)]
    pieces += [(text, -1000.0 - i, NORMAL) for i, text in enumerate(dict.fromkeys(LETTERS))]
    trainer = _field(3, 2) + _field(35, 1) + _field(43, 2**64 - 1)  # BPE, bytes for what is unknown, no padding
    normalizer = (
        _field(1, b"identity") + _field(3, int(begins_with_space)) + _field(4, int(drops_spaces)) + _field(5, 1)
    )
    rows = [_field(1, text.encode()) + _field(2, score) + _field(3, kind) for text, score, kind in pieces]
    return b"".join(_field(1, row) for row in rows) + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])
