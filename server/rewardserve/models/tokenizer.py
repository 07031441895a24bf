"""A checkpoint's tokenizer, as its own file has it."""

import json
import logging
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rewardserve.models.sentencepiece import SentencePieceModel, read_model
from rewardserve.models.sentencepiece_tokenizer import from_sentencepiece

log = logging.getLogger(__name__)

# What tokenizers differ in: digits, contractions, runs of spaces, line ends, accents, scripts without spaces.
TELLING = (
    "In 2023, 650841823 of 12 didn't",
    "  x =  1\n\n\tdef f():\r\n",
    "Écris l'été 👍🏽",
    "日本語のテキスト",
    "A.B-C_d, (e)!",
)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """What `tokenizer.json` says, or a SentencePiece model where there is none; else what transformers makes of the
    other files. Runs no code of the checkpoint's. Raises whatever transformers does where there is no usable tokenizer.

    For several kinds of models AutoTokenizer puts a class's own rules in place of the file's, in silence: how digits
    are split, or what a space is (transformers 5, huggingface/transformers#45920). The model was trained by the file's.
    """
    tokenizer = _tokenizer(folder)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processors_template(folder / "chat_template.json")
    return tokenizer


def _processors_template(file: Path) -> str | None:
    """Where transformers 4 left the template of a model that sees images too; its tokenizer class looks elsewhere."""
    if not file.is_file():
        return None
    saved = json.loads(file.read_bytes())
    template = saved.get("chat_template") if isinstance(saved, dict) else None
    if not isinstance(template, str):
        raise ValueError(f"{file.name} holds no chat_template")
    return template


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    has_file = (folder / "tokenizer.json").is_file()
    if not has_file and (model := _sentencepiece(folder / "tokenizer.model")) is not None:
        return from_sentencepiece(folder, model)
    try:
        auto = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # of a class that is not known here, or of a package that is not there
        if not has_file:
            raise
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if type(auto) is PreTrainedTokenizerFast or not has_file:
        return auto
    own = PreTrainedTokenizerFast.from_pretrained(folder)
    vocabulary = own.get_vocab()
    for name, token in auto.special_tokens_map.items():  # a class may know some that no file names
        if isinstance(token, str) and token in vocabulary and getattr(own, name, None) is None:
            setattr(own, name, token)
    own.chat_template = own.chat_template or auto.chat_template
    _tell_what_is_other(folder, own, auto)
    return own


def _tell_what_is_other(folder: Path, own: PreTrainedTokenizerBase, auto: PreTrainedTokenizerBase) -> None:
    for text in (*TELLING, f"{own.eos_token or ''}x"):
        ours, theirs = (tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (own, auto))
        if ours != theirs:
            log.warning(
                "%s: texts become the %d tokens that its tokenizer.json says, of %r for one; AutoTokenizer takes its "
                "%s for them, and gives %d others",
                folder,
                len(ours),
                text,
                type(auto).__name__,
                len(theirs),
            )
            return


def _sentencepiece(file: Path) -> SentencePieceModel | None:
    """None where there is none, or one of another kind than Llama's."""
    try:
        model = read_model(file)
    except (OSError, ValueError):
        return None
    return model if model.is_bpe else None
