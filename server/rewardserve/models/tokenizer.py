"""A checkpoint's tokenizer, as its own file has it."""

import logging
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

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
    """What `tokenizer.json` says, where there is one; else what transformers makes of the other files. Runs no code of
    the checkpoint's. Raises whatever transformers does where there is no usable tokenizer.

    For several kinds of models AutoTokenizer puts a class's own rules in place of the file's, in silence: how digits
    are split, or what a space is (transformers 5, huggingface/transformers#45920). The model was trained by the file's.
    """
    auto = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if type(auto) is PreTrainedTokenizerFast or not (folder / "tokenizer.json").is_file():
        return auto
    own = PreTrainedTokenizerFast.from_pretrained(folder)
    vocabulary = own.get_vocab()
    for name, token in auto.special_tokens_map.items():  # a class may know some that no file names
        if isinstance(token, str) and token in vocabulary and getattr(own, name, None) is None:
            setattr(own, name, token)
    own.chat_template = own.chat_template or auto.chat_template
    for text in TELLING:
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
