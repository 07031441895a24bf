"""A SentencePiece model, a checkpoint's `tokenizer.model`, as rules of the tokenizers library.

Older tokenizers were saved without a tokenizer.json. Transformers 5 needs the sentencepiece package to make one, and
its Llama class then goes by rules of its own: after a special token, and where a text begins with a space, there are
other tokens than those of SentencePiece, by which the model was trained. The file is read here by its published layout
(sentencepiece_model.proto).
"""

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # kinds of pieces
BPE = 2  # kind of model
SPACE = "▁"


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    pieces: Sequence[Piece]
    is_bpe: bool
    byte_fallback: bool
    named: Mapping[str, str]  # unk_token, bos_token, eos_token
    charsmap: bytes
    begins_with_space: bool  # every text does, also one that has none
    drops_spaces: bool  # all but one between words
    escapes_spaces: bool


def read_model(file: Path) -> SentencePieceModel:
    """Raises ValueError for another kind of file."""
    pieces, trainer, normalizer = [], b"", b""
    for number, value in _fields(file.read_bytes()):
        if number == 1 and isinstance(value, bytes):
            pieces.append(_piece(value))
        elif number == 2 and isinstance(value, bytes):
            trainer = value
        elif number == 3 and isinstance(value, bytes):
            normalizer = value
    if not pieces or not trainer:
        raise ValueError(f"{file.name} is no SentencePiece model")
    trained, normalized = dict(_fields(trainer)), dict(_fields(normalizer))
    ids = {"unk_token": trained.get(40, 0), "bos_token": trained.get(41, 1), "eos_token": trained.get(42, 2)}
    return SentencePieceModel(
        pieces,
        is_bpe=trained.get(3, 1) == BPE,
        byte_fallback=bool(trained.get(35, False)),
        named={name: pieces[i].text for name, i in ids.items() if isinstance(i, int) and i < len(pieces)},
        charsmap=bytes(normalized.get(2, b"")),
        begins_with_space=bool(normalized.get(3, True)),
        drops_spaces=bool(normalized.get(4, True)),
        escapes_spaces=bool(normalized.get(5, True)),
    )


def build(model: SentencePieceModel, legacy: bool, add_prefix_space: bool, renamed: Mapping[int, str]) -> Tokenizer:
    """`legacy`: a space is put before the text after each special token too, not only before the first.
    `renamed`: pieces that were kept free for them, by id.
    """
    pieces = [
        Piece(renamed[i], 0.0, CONTROL) if renamed.get(i, piece.text) != piece.text else piece
        for i, piece in enumerate(model.pieces)
    ]
    whole = [piece.text for piece in pieces if piece.kind == USER_DEFINED]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece.text: i for i, piece in enumerate(pieces)},
            merges=_merges(pieces),
            unk_token=model.named.get("unk_token"),
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
            ignore_merges=bool(whole),
        )
    )
    prefixed = model.begins_with_space and add_prefix_space
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.drops_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefixed and legacy:
        steps.append(normalizers.Prepend(SPACE))
    if model.escapes_spaces:
        steps.append(normalizers.Replace(" ", SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    cuts: list[pre_tokenizers.PreTokenizer] = []
    if prefixed and not legacy:
        cuts.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False))
    if whole:  # these are never parts of other pieces
        either = "|".join(map(re.escape, sorted(whole, key=len, reverse=True)))
        cuts.append(pre_tokenizers.Split(Regex(either), behavior="isolated"))
    if cuts:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    back: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefixed else back)
    control = [piece.text for piece in pieces if piece.kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    return tokenizer


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """The pairs that make a piece, the piece of the highest score first."""
    normal = {piece.text for piece in pieces if piece.kind == NORMAL}
    pairs = [
        (piece.score, cut, piece.text[:cut], piece.text[cut:])
        for piece in pieces
        if piece.kind == NORMAL
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in normal and piece.text[cut:] in normal
    ]
    return [(left, right) for _, _, left, right in sorted(pairs, key=lambda pair: (-pair[0], -pair[1]))]


def _piece(message: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(message):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a protobuf message. Raises ValueError for what is none."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError("no protobuf message")
        if at + size > len(message):
            raise ValueError("no protobuf message, or a part of one")
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message):
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("no protobuf message, or a part of one")
