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
from rewardserve.text.text_bound import TextBound
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


@dataclass(slots=True)
class PromptText:
    """A prompt whose responses are tokenized with it, in one batch or several."""

    text: str
    beginning: str  # of the text, and of most whole texts: tokenized once for all of them
    stem: Ids | None = None  # ids of the beginning; it and `ids` are set by the first batch
    ids: Ids | None = None  # of the text


@dataclass(frozen=True, slots=True)
class Whole:
    """Ids of prompt + response, without a copy of the prompt: its first `border` ids, then `tail`."""

    border: int
    tail: Ids
    steps: tuple[int, ...] = ()  # positions of steps' last tokens, where they are not the model's to find
    num_after: int = 0  # of the tail's ids, those after the response: what a judge is asked about it

    def __len__(self) -> int:
        return self.border + len(self.tail)


class Tokenizer:
    """Exactly the checkpoint's tokenizer. Thread-safe; encoding releases the interpreter lock."""

    def __init__(self, spec: TextSpec) -> None:
        """Raises LoadFailed for a template that is none, or if the checkpoint's own rendering of the probes is not
        reproduced token by token."""
        self._tokenizer = tokenizers.Tokenizer.from_str(spec.tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.bos_token_id = spec.bos_token_id
        self._bound = TextBound.of(spec.tokenizer_json, spec.bos_token_id)
        self.template = None
        if spec.chat_template:
            self.template = ChatTemplate(spec.chat_template, spec.special_tokens, spec.in_parts)
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

    def least_tokens(self, text: str) -> int:
        """No fewer tokens than these does the text have, found without tokenizing it; 0 where nothing is known."""
        return 0 if self._bound is None else self._bound.least_tokens(text)

    def prompt(self, text: str) -> PromptText:
        return PromptText(text, text[: self._cut(text)] if self.cuts_are_exact else "")

    def encode_after(self, prompt: PromptText, wholes: Sequence[str]) -> list[Whole]:
        """Prompt and response as if each whole text were tokenized by itself. Sets the prompt's own ids."""
        cuts = [len(prompt.beginning) if whole.startswith(prompt.beginning) else 0 for whole in wholes]
        own = [] if prompt.ids is not None else [prompt.beginning, prompt.text[len(prompt.beginning) :]]
        parts = self._encode([*own, *(whole[cut:] for whole, cut in zip(wholes, cuts, strict=True))])
        if own:
            stem, rest, *parts = parts
            prompt.stem = self._single_bos(stem)
            prompt.ids = self._single_bos(np.concatenate([prompt.stem, rest]))
        return [self._whole(prompt, part, cut > 0) for part, cut in zip(parts, cuts, strict=True)]

    def _whole(self, prompt: PromptText, part: Ids, after_stem: bool) -> Whole:
        assert prompt.stem is not None and prompt.ids is not None
        known = len(prompt.stem) if after_stem else 0
        if known < 2:  # a BOS on either side of the cut becomes one
            part, known = self._single_bos(np.concatenate([prompt.stem[:known], part])), 0
        same = common_length(prompt.ids[known:], part)
        return Whole(known + same, part[same:].copy())  # a view would keep all of `part`

    def encode_steps(self, prompt: PromptText, whole: str, ends: Sequence[int]) -> Whole:
        """As `encode_after`, and which token holds the last character before each of `ends`."""
        if prompt.ids is None:
            self.encode_after(prompt, [])
        assert prompt.ids is not None
        encoding = self._tokenizer.encode(whole, add_special_tokens=False)
        begins = np.array([begin for begin, _ in encoding.offsets])
        ids = np.array(encoding.ids, dtype=np.int32)
        single = self._single_bos(ids)
        dropped = len(ids) - len(single)
        steps = [int(np.flatnonzero(begins < end)[-1]) - dropped for end in ends]
        border = common_length(prompt.ids, single)
        return Whole(border, single[border:].copy(), tuple(steps))

    def encode_apart(self, question: str, steps: Sequence[str], tag: str) -> tuple[Ids, Whole]:
        """BOS, question and tag, and each step by itself, closed by the tag: the prompt's ids, prompt + response."""
        tag_id = self._encode([tag])[0][-1:]
        bos = [] if self.bos_token_id is None else [self.bos_token_id]
        prompt, *parts = self._encode([question + tag, *steps])
        prompt = self._single_bos(np.concatenate([np.array(bos, np.int32), prompt]))
        closed = [np.concatenate([part, tag_id]) for part in parts]
        tail = np.concatenate(closed) if closed else np.empty(0, np.int32)
        ends = len(prompt) + np.cumsum([len(part) for part in closed], dtype=int) - 1
        return prompt, Whole(len(prompt), tail, tuple(ends.tolist()))

    def render(self, messages: Sequence[Message], response: str | None = None) -> str:
        """What the response answers, or both. Raises one of TEMPLATE_ERRORS. There must be a template."""
        assert self.template is not None
        if response is None:
            return self.template.render(messages, add_generation_prompt=True)
        return self.template.render((*messages, Message("assistant", response)), add_generation_prompt=False)

    def _cut(self, prompt: str) -> int:
        """Where the prompt's last special token begins; 0: nowhere."""
        return max(0, *(prompt.rfind(special) for special in self._special))

    def _encode(self, texts: Sequence[str]) -> list[Ids]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _single_bos(self, ids: Ids) -> Ids:
        if len(ids) < 2 or ids[0] != self.bos_token_id or ids[1] != self.bos_token_id:
            return ids
        others = np.flatnonzero(ids != self.bos_token_id)
        return ids[(others[0] if len(others) else len(ids)) - 1 :]

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
        for text in ("Say it.", " leading and trailing ", "multi\n\nline\n", "word"):
            for special in self._special[:8]:
                if not self._cuts_exactly(text + special, [text + special + each for each in AWKWARD]):
                    return False
            if self.template is not None:
                with contextlib.suppress(*TEMPLATE_ERRORS):  # a template that wants a system turn, say
                    messages = [Message("user", text)]
                    wholes = [self.render(messages, each) for each in AWKWARD]
                    if not self._cuts_exactly(self.render(messages), wholes):
                        return False
        return True

    def _cuts_exactly(self, text: str, wholes: Sequence[str]) -> bool:
        prompt = PromptText(text, text[: self._cut(text)])
        found = self.encode_after(prompt, wholes)
        assert prompt.ids is not None
        ids = [prompt.ids, *(np.concatenate([prompt.ids[: whole.border], whole.tail]) for whole in found)]
        return all(map(np.array_equal, ids, self.encode([text, *wholes])))


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
