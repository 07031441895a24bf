"""A folder with a SentencePiece model, but without a tokenizer.json -> its tokenizer, by what its other files say."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rewardserve.errors import LoadFailed
from rewardserve.models.sentencepiece import SentencePieceModel, build

SPECIAL_TOKENS = (
    *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
    "additional_special_tokens",
    "extra_special_tokens",
)


def from_sentencepiece(folder: Path, model: SentencePieceModel) -> PreTrainedTokenizerBase:
    """By the tokenizer.json that the folder lacks. Added tokens are looked for in the text as it stands.

    Raises LoadFailed where they cannot have the ids that its files give them.
    """
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
    return json.loads(file.read_bytes()) if file.is_file() else {}


def _content(token: Any) -> Any:
    """What a special token is, which is written in several ways."""
    if isinstance(token, list):
        return [_content(each) for each in token]
    return token["content"] if isinstance(token, dict) and "content" in token else token
