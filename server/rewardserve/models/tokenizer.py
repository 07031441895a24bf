"""A checkpoint's tokenizer, as its own file has it."""

import json
import logging
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rewardserve.errors import LoadFailed
from rewardserve.models.sentencepiece import SentencePieceModel, build, read_model

log = logging.getLogger(__name__)

# What tokenizers differ in: digits, contractions, runs of spaces, line ends, accents, scripts without spaces.
TELLING = (
    "In 2023, 650841823 of 12 didn't",
    "  x =  1\n\n\tdef f():\r\n",
    "Écris l'été 👍🏽",
    "日本語のテキスト",
    "A.B-C_d, (e)!",
)
SPECIAL_TOKENS = (
    *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
    "additional_special_tokens",
    "extra_special_tokens",
)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """What `tokenizer.json` says, or a SentencePiece model where there is none; else what transformers makes of the
    other files. Runs no code of the checkpoint's. Raises whatever transformers does where there is no usable tokenizer.

    For several kinds of models AutoTokenizer puts a class's own rules in place of the file's, in silence: how digits
    are split, or what a space is (transformers 5, huggingface/transformers#45920). The model was trained by the file's.
    """
    has_file = (folder / "tokenizer.json").is_file()
    if not has_file and (model := _sentencepiece(folder / "tokenizer.model")) is not None:
        return _from_sentencepiece(folder, model)
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
            break
    return own


def _sentencepiece(file: Path) -> SentencePieceModel | None:
    """None where there is none, or one of another kind than Llama's."""
    try:
        model = read_model(file)
    except (OSError, ValueError):
        return None
    return model if model.is_bpe else None


def _from_sentencepiece(folder: Path, model: SentencePieceModel) -> PreTrainedTokenizerBase:
    """By the tokenizer.json that the folder lacks. Added tokens are looked for in the text as it stands."""
    config = _read(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # saved by a transformers before 4.34
        config |= _read(folder / "special_tokens_map.json")
        ids = _read(folder / "added_tokens.json")
        special = {_content(config.get(name)) for name in SPECIAL_TOKENS[:-2]}
        config["added_tokens_decoder"] = {i: {"content": text, "special": text in special} for text, i in ids.items()}
    config |= {name: _content(config[name]) for name in SPECIAL_TOKENS if name in config}
    added = {int(i): token | {"normalized": False} for i, token in config["added_tokens_decoder"].items()}
    config["added_tokens_decoder"] = added
    renamed = {i: token["content"] for i, token in added.items() if i < len(model.pieces)}
    with TemporaryDirectory() as place:
        made = build(model, config.get("legacy") is not False, config.get("add_prefix_space") is not False, renamed)
        config = dict(model.named) | config
        made.post_processor = _around(made, config)
        made.save(f"{place}/tokenizer.json")
        Path(place, "tokenizer_config.json").write_text(json.dumps(config))
        for template in folder.glob("chat_template*"):
            shutil.copy(template, place)
        own = PreTrainedTokenizerFast.from_pretrained(place)
    if wrong := [token["content"] for i, token in added.items() if own.convert_tokens_to_ids(token["content"]) != i]:
        raise LoadFailed(
            f"{folder}: its added tokens {', '.join(wrong[:5])} cannot have the ids that its files give them"
        )
    return own


def _around(made: Tokenizer, config: dict[str, Any]) -> TemplateProcessing:
    """What the tokenizer puts around a text unless told to take it as it stands: a BOS, if the config does not say."""
    bos = config.get("bos_token") if config.get("add_bos_token") is not False else None
    eos = config.get("eos_token") if config.get("add_eos_token") else None
    ids = {token: made.token_to_id(token) for token in (bos, eos) if token}
    ids = {token: i for token, i in ids.items() if i is not None}
    single = [token for token in (bos, "$A", eos) if token == "$A" or token in ids]
    return TemplateProcessing(single=single, special_tokens=list(ids.items()))


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def _content(token: Any) -> Any:
    """What a special token is, which is written in several ways."""
    if isinstance(token, list):
        return [_content(each) for each in token]
    return token["content"] if isinstance(token, dict) and "content" in token else token
