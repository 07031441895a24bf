"""Tiny checkpoints' text handling twice: as transformers does it, and as the front does it without transformers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from checkpoints import TEMPLATE, VOCAB_SIZE
from rewardserve.models.text_export import export_text
from rewardserve.text.encoder import EncodedRequest, Encoder
from rewardserve.text.tokenizer import Tokenizer
from rewardserve.types import Overflow, Prompt, PromptGroup, Response, ScoreRequest, TextSpec, TokenIds
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Raw
from transformers import AutoTokenizer, PreTrainedTokenizerFast

BOS = "<s>"
SPECIALS = (
    "<|pad|>",
    BOS,
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "<start_of_turn>",
    "<end_of_turn>",
)
TRAINING = (
    "unhappy un happy the answer is 42. ",
    "def f(x):\n    return x  # ok\n\n",
    "It's an étude, isn't it? 👍🏽 ",
) * 20

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}\n"
    "    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\n"
    "    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
DATED = "{{ '<|im_start|>system\\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}" + TEMPLATE
JSON_AND_LOOPS = (
    "{% for m in messages %}{% if loop.index > 50 %}{% break %}{% endif %}"
    "{% if not m['role'] %}{% continue %}{% endif %}"
    "{{ '<|im_start|>' + ({'r': m['role'], 'c': m['content']} | tojson) + '<|im_end|>' }}\n{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}\n"
    "    {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "    {% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STRIPPING = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | upper + ': ' + m['content'].strip() }}"
    "{{ eos_token if m['role'] == 'assistant' else '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
THINKING = (  # like Qwen3's: earlier answers lose their thoughts, and the prompt opens an empty thought
    "{% for m in messages %}{% set c = m['content'] %}"
    "{% if not loop.last and '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + c + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
STYLES = {
    "chatml": TEMPLATE,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "dated": DATED,
    "json and loops": JSON_AND_LOOPS,
    "generation": GENERATION,
    "stripping": STRIPPING,
    "thinking": THINKING,
}


@dataclass(frozen=True)
class Text:
    """One checkpoint's text, both ways."""

    hf: PreTrainedTokenizerFast
    spec: TextSpec
    tokenizer: Tokenizer

    def encoder(self, max_length: int = 100_000) -> Encoder:
        return Encoder(self.tokenizer, VOCAB_SIZE, max_length)

    def ids(self, text: str) -> list[int]:
        """As Hugging Face tokenizes a text that needs nothing added, with a doubled BOS reduced to one."""
        ids = self.hf(text, add_special_tokens=False)["input_ids"]
        while len(ids) > 1 and ids[0] == ids[1] == self.hf.bos_token_id:
            ids = ids[1:]
        return ids

    def chat(self, messages: Sequence[tuple[str, str]], generate: bool) -> str:
        dicts = [{"role": role, "content": content} for role, content in messages]
        return self.hf.apply_chat_template(dicts, tokenize=False, add_generation_prompt=generate)


def text_of(folder: Path, hf: PreTrainedTokenizerFast) -> Text:
    hf.save_pretrained(folder)
    spec, reason = export_text(folder)
    assert spec is not None, reason
    return Text(AutoTokenizer.from_pretrained(folder), spec, Tokenizer(spec))


def byte_level(specials: Sequence[str | AddedToken] = SPECIALS) -> Raw:
    raw = Raw(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(TRAINING, trainer)
    return raw


MakeText = Callable[..., Text]


@pytest.fixture(scope="session")
def make_text(tmp_path_factory: pytest.TempPathFactory) -> MakeText:
    """`make_text(template=..., raw=...)`: a checkpoint's text, saved and read back."""

    def make(template: str | None = TEMPLATE, raw: Raw | None = None, bos: str | None = BOS) -> Text:
        named = {"bos_token": bos} if bos else {}
        hf = PreTrainedTokenizerFast(
            tokenizer_object=raw or byte_level(), pad_token="<|pad|>", eos_token="</s>", **named
        )
        hf.chat_template = template
        return text_of(tmp_path_factory.mktemp("text"), hf)

    return make


@pytest.fixture(scope="session")
def styles(make_text: MakeText) -> dict[str, Text]:
    return {name: make_text(template) for name, template in STYLES.items()}


@pytest.fixture(scope="session")
def plain(make_text: MakeText) -> Text:
    """Without a chat template."""
    return make_text(None)


def pack(ids: Sequence[int]) -> TokenIds:
    return TokenIds(np.array(ids, dtype="<i4").tobytes())


def request(*groups: tuple[Prompt, Sequence[Response]], overflow: Overflow = Overflow.ERROR) -> ScoreRequest:
    wrapped = tuple(PromptGroup(str(i), prompt, tuple(responses)) for i, (prompt, responses) in enumerate(groups))
    return ScoreRequest("r", "", wrapped, overflow)


def whole_ids(encoded: EncodedRequest, group: int, item: int) -> list[int]:
    """The ids that the engine scores for one response."""
    place = encoded.items[group][item]
    assert place.failure is None, place.failure
    target = encoded.groups[place.group]
    return np.frombuffer(target.prompt + target.responses[place.index], "<i4").tolist()


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Tools:
    """What tests need by name; this folder is no package."""

    BOS, SPECIALS, STYLES = BOS, SPECIALS, STYLES
    pack, request = staticmethod(pack), staticmethod(request)
    whole_ids, common, byte_level = staticmethod(whole_ids), staticmethod(common), staticmethod(byte_level)


@pytest.fixture(scope="session")
def tools() -> type[Tools]:
    return Tools
