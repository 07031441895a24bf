"""Strings -> token ids, and where the prompt ends among them.

What counts is the tokenization of the joined text: tokenizing prompt and response apart changes the ids where a token
spans the border. Added special tokens ("<|im_start|>") are never part of a longer token, so the text may be cut in
front of one without changing anything; the part before the last one in the prompt is tokenized once for all
responses. Whether that holds for a tokenizer is not believed but tried at load, on strings chosen to break it; where
it does not, the whole text is tokenized for each response.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import tokenizers

from rewardserve.errors import LoadFailed
from rewardserve.text.chat_template import TEMPLATE_ERRORS, ChatTemplate
from rewardserve.types import Message, Probe, TextSpec

Ids = np.ndarray  # [tokens] int32

AWKWARD = (
    "",
    " ",
    "\n",
    "\n\nx",
    "  two  spaces",
    "'s",
    "é",
    "👍🏽",
    "\tcode\n\n\n",
    "The answer.",
    "<b>",
    "0123",
    "。中文",
)


@dataclass(frozen=True, slots=True)
class JoinedText:
    """One prompt and its responses as whole texts; `prompt` is a beginning of none, some or all of them."""

    prompt: str
    whole: tuple[str, ...]


class Tokenizer:
    """Exactly the checkpoint's tokenizer. Thread-safe; encoding releases the interpreter lock."""

    def __init__(self, spec: TextSpec) -> None:
        """Raises LoadFailed if the checkpoint's own rendering of the probes is not reproduced token by token."""
        self._tokenizer = tokenizers.Tokenizer.from_str(spec.tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.bos_token_id = spec.bos_token_id
        self.template = ChatTemplate(spec.chat_template, spec.special_tokens) if spec.chat_template else None
        added = list(self._tokenizer.get_added_tokens_decoder().values())
        cuttable = [t for t in added if t.special and not t.lstrip and not t.single_word]
        self._special = tuple(token.content for token in cuttable)
        self._check_probes(spec)
        self.cuts_are_exact = bool(self._special) and not _overlapping(cuttable, added) and self._prove_cuts()

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """No special tokens are added: a rendered text has all it needs. A doubled BOS is reduced to one."""
        return [self._single_bos(ids) for ids in self._encode(texts)]

    def encode_joined(self, text: JoinedText) -> tuple[Ids, list[Ids]]:
        """Ids of the prompt's text, and of every whole text, as if each were tokenized whole."""
        cut = self._cut(text) if self.cuts_are_exact else 0
        return self._encode_cut(text, cut)

    def render(self, messages: Sequence[Message], responses: Sequence[str]) -> JoinedText:
        """Raises one of TEMPLATE_ERRORS. There must be a template."""
        assert self.template is not None
        return JoinedText(
            self.template.render(messages, add_generation_prompt=True),
            tuple(
                self.template.render((*messages, Message("assistant", response)), add_generation_prompt=False)
                for response in responses
            ),
        )

    def _encode_cut(self, text: JoinedText, cut: int) -> tuple[Ids, list[Ids]]:
        stem = [text.prompt[:cut]] if cut else []
        parts = self._encode([*stem, text.prompt[cut:], *(whole[cut:] for whole in text.whole)])
        if stem:
            beginning, *parts = parts
            parts = [np.concatenate([beginning, part]) for part in parts]
        prompt, *wholes = [self._single_bos(ids) for ids in parts]
        return prompt, wholes

    def _cut(self, text: JoinedText) -> int:
        """Where the prompt's last special token begins, as far as all texts agree up to there; 0: nowhere."""
        cut = max(text.prompt.rfind(special) for special in self._special)
        beginning = text.prompt[: max(cut, 0)]
        return len(beginning) if all(whole.startswith(beginning) for whole in text.whole) else 0

    def _encode(self, texts: Sequence[str]) -> list[Ids]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _single_bos(self, ids: Ids) -> Ids:
        while len(ids) > 1 and ids[0] == ids[1] == self.bos_token_id:
            ids = ids[1:]
        return ids

    def _check_probes(self, spec: TextSpec) -> None:
        for probe in spec.probes:
            text = self._render_probe(probe)
            if text != probe.text or self._encode([text])[0].tolist() != list(probe.token_ids):
                raise LoadFailed(
                    "the checkpoint's chat template or tokenizer cannot be reproduced outside of transformers "
                    f"(it rendered {probe.text[:80]!r}, here it is {text[:80]!r}); send token ids, "
                    "and please report the model"
                )

    def _render_probe(self, probe: Probe) -> str:
        if self.template is None:
            return probe.text
        messages = [Message(role, content) for role, content in probe.messages]
        try:
            rendered_at = datetime.fromtimestamp(probe.rendered_at)
            return self.template.render(messages, probe.add_generation_prompt, rendered_at)
        except TEMPLATE_ERRORS as error:
            return f"<{error}>"

    def _prove_cuts(self) -> bool:
        """Tries cut against whole tokenization, over the template's own texts and bare special tokens."""
        for prompt in ("Say it.", " leading and trailing ", "multi\n\nline\n", "word"):
            texts = [JoinedText(prompt + s, tuple(prompt + s + r for r in AWKWARD)) for s in self._special[:8]]
            if self.template is not None:
                with contextlib.suppress(*TEMPLATE_ERRORS):  # a template that wants a system turn, say
                    texts.append(self.render([Message("user", prompt)], AWKWARD))
            for text in texts:
                prompt_ids, whole_ids = self._encode_cut(text, self._cut(text))
                wanted = self.encode([text.prompt, *text.whole])
                if not all(map(np.array_equal, [prompt_ids, *whole_ids], wanted)):
                    return False
        return True


def _overlapping(cuttable: Sequence[tokenizers.AddedToken], added: Sequence[tokenizers.AddedToken]) -> bool:
    """Whether finding a special token in a text may be finding a part of another one, or of itself shifted."""
    for token in cuttable:
        content = token.content
        if any(content in other.content and other.content != content for other in added):
            return True
        if any(content.endswith(content[:length]) for length in range(1, len(content))):
            return True
    return False


def common_length(prompt: Ids, whole: Ids) -> int:
    """Length of the longest common beginning, in tokens."""
    length = min(len(prompt), len(whole))
    differs = np.nonzero(prompt[:length] != whole[:length])[0]
    return int(differs[0]) if len(differs) else length
