"""A checkpoint's tokenizer -> TextSpec: what the front needs to do the same without transformers and torch."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from rewardserve.models.checkpoint import first_line
from rewardserve.models.families import ONE_QUESTION
from rewardserve.models.reads import ReadAt, ReadPlan
from rewardserve.models.spec import ModelSpec
from rewardserve.models.tokenizer import load_tokenizer
from rewardserve.types import Probe, StepStyle, TextSpec, content_of

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
CONVERSATIONS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "What is 2 + 2?"), ("assistant", "It is 4.")),
    (
        ("user", "Hi"),
        ("assistant", "Hello, how can I help?"),
        ("user", " Écris\n\ndu code: `x = 1`  "),
        ("assistant", "ok 👍"),
    ),
    (("system", "Be brief."), ("user", "<b>1 < 2</b>"), ("assistant", "\n\tdef f():\n    return 'é'\n")),
)
PAIRS = (("What is 2 + 2?", "It is 4."), (" Écris du code: `x = 1`", "ok 👍\n\tdef f():"), ("<b>1 < 2</b>", "no"))
PAIR_TEMPLATE = (
    f"{ONE_QUESTION}{{{{ cls_token }}}}{{{{ messages[0].content }}}}"
    "{% if not add_generation_prompt %}{{ sep_token }}{{ messages[1].content }}{{ sep_token }}{% endif %}"
)


def text_of(spec: ModelSpec) -> tuple[TextSpec | None, str]:
    """`export_text` for a model as it is read; where Hugging Face would read the same texts otherwise, a warning."""
    text_config = spec.config.get_text_config()
    text, missing_reason = export_text(
        spec.checkpoint.text_folder,
        in_pairs=spec.recipe.reads.at is ReadAt.FIRST,
        num_token_types=getattr(text_config, "type_vocab_size", 0),
        template=spec.recipe.template,
    )
    recipe = spec.recipe
    is_plain = recipe.reads == ReadPlan() and recipe.appended is None and not recipe.steps and not recipe.judge
    looks_for_padding = is_plain and spec.architecture.endswith("ForSequenceClassification")
    adds_bos = recipe.steps is not None and recipe.steps.style is StepStyle.APART
    if text is not None:
        padding_id = getattr(text_config, "pad_token_id", None) if looks_for_padding else None
        for doubt in _doubts(text, padding_id, adds_bos):
            log.warning("%s: %s", spec.checkpoint.source, doubt)
    return text, missing_reason


def export_text(
    folder: Path, in_pairs: bool = False, num_token_types: int = 0, template: str | None = None
) -> tuple[TextSpec | None, str]:
    """The checkpoint's text handling, or None and why there is none: then only token ids can be scored.

    `in_pairs`: an encoder that is shown prompt and response as a pair of segments, by its tokenizer's own rule.
    `num_token_types`: how many kinds of segments it tells apart beside their ids.
    `template`: the model's own, which takes the place of the tokenizer's: a BOS, and a text tokenized by itself.
    """
    if in_pairs and num_token_types > 1:
        return None, f"its config's type_vocab_size is {num_token_types}: it tells a pair's halves apart by token types"
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):  # transformers would make one up, empty
        return None, f"none of {', '.join(TOKENIZER_FILES)} is in the checkpoint's folder"
    try:
        tokenizer = load_tokenizer(folder)
        _tokenize(tokenizer, "x")  # some of what its files may hold is only then stumbled over
    except Exception as error:  # a missing or unknown tokenizer fails in many ways, and none is fatal: ids still work
        return None, f"no usable tokenizer: {first_line(error).removeprefix('ValueError: ')[:200]}"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None, f"{type(tokenizer).__name__} is not a fast tokenizer"
    if in_pairs:
        return _pairs(tokenizer)
    if template is not None:
        tokenizer.chat_template = template
        if not _begins_alike(tokenizer):
            return None, "a text after its tokenizer's BOS does not become the tokens that it is without one"
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        return None, f"its chat templates are named {', '.join(tokenizer.chat_template)}, and none is 'default'"
    in_parts = _leaves_out_content(tokenizer, False) and not _leaves_out_content(tokenizer, True)
    return (
        TextSpec(
            tokenizer_json=backend.to_str(),
            chat_template=_template(tokenizer),
            special_tokens={k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)},
            bos_token_id=tokenizer.bos_token_id,
            probes=tuple(_probes(tokenizer, in_parts)),
            in_parts=in_parts,
        ),
        "",
    )


def _doubts(text: TextSpec, padding_id: int | None, adds_bos: bool) -> Iterator[str]:
    """Where Hugging Face's own classes would, of the same texts, read another number. `padding_id` is the config's.

    `adds_bos`: whether texts are given a BOS also without a template.
    """
    backend = Tokenizer.from_str(text.tokenizer_json)
    bare = backend.encode("x", add_special_tokens=False).ids
    whole = backend.encode("x", add_special_tokens=True).ids
    if text.chat_template is None and not adds_bos and whole != bare:
        added = " and ".join(backend.id_to_token(token) for token in whole if token not in bare)
        yield (
            f"without a chat template texts are tokenized as they stand, while the tokenizer itself would add {added}; "
            "a model that was trained with it is to be sent it, in the text or as token ids"
        )
    closed = [probe.token_ids for probe in text.probes if probe.messages and not probe.add_generation_prompt]
    if padding_id is not None and closed and all(ids[-1:] == (padding_id,) for ids in closed):
        yield (
            f"its chat template ends in the padding token (pad_token_id {padding_id}) and is read there; Hugging "
            "Face's class reads the last token before it. If that class trained it, send token ids that end there"
        )


def _pairs(tokenizer: PreTrainedTokenizerBase) -> tuple[TextSpec | None, str]:
    """The pair as a template. Tokenizers put a segment's first token together in ways of their own: it is tried."""
    specials = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    if not {"cls_token", "sep_token"} <= specials.keys():
        return None, "its tokenizer has no [CLS] and [SEP] to make pairs with"
    probes = []
    for question, answer in PAIRS:
        text = f"{specials['cls_token']}{question}{specials['sep_token']}{answer}{specials['sep_token']}"
        ids = tuple(tokenizer(question, answer)["input_ids"])
        if tuple(_tokenize(tokenizer, text)) != ids:
            return None, "its tokenizer's pairs cannot be written as one text"
        probes.append(Probe((("user", question), ("assistant", answer)), False, text, ids))
    spec = TextSpec(
        tokenizer.backend_tokenizer.to_str(), PAIR_TEMPLATE, specials, tokenizer.cls_token_id, tuple(probes)
    )
    return spec, ""


def _leaves_out_content(tokenizer: PreTrainedTokenizerBase, in_parts: bool) -> bool:
    """Whether other words make the same text: templates of models that see images may look for parts in a string."""
    if _template(tokenizer) is None:
        return False
    rendered = set()
    for word in ("yes", "no"):
        try:
            messages = [{"role": "user", "content": content_of(word, in_parts)}]
            rendered.add(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception:  # jinja's TemplateError and friends: it does not begin with a user's turn, say
            return False
    return len(rendered) == 1


def _begins_alike(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a BOS can be written in front of a text: some tokenizers have another space at a text's beginning."""
    texts = [f"{question} {answer}" for question, answer in PAIRS]
    ids = [(tokenizer.bos_token_id, *_tokenize(tokenizer, text)) for text in texts]
    return ids == [tuple(_tokenize(tokenizer, f"{tokenizer.bos_token}{text}")) for text in texts]


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    try:
        return tokenizer.get_chat_template()
    except ValueError:  # none at all
        return None


def _probes(tokenizer: PreTrainedTokenizerBase, in_parts: bool) -> list[Probe]:
    """How the tokenizer itself renders and tokenizes conversations; those its template refuses are left out."""
    if _template(tokenizer) is None:
        texts = ["".join(content for _, content in conversation) for conversation in CONVERSATIONS]
        return [Probe((), False, text, tuple(_tokenize(tokenizer, text))) for text in texts]
    probes = []
    now = time.time()
    for conversation in CONVERSATIONS:
        for messages, generate in ((conversation, False), (conversation[:-1], True)):
            dicts = [{"role": role, "content": content_of(content, in_parts)} for role, content in messages]
            try:
                text = tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=generate)
                text.encode()  # what holds a lone surrogate is no text
            except Exception:  # jinja's TemplateError and friends: e.g. "System role not supported"
                continue
            probes.append(Probe(messages, generate, text, tuple(_tokenize(tokenizer, text)), now))
    return probes


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
