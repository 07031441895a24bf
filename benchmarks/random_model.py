"""Models of random weights in the true shapes of well-known ones, with a tokenizer trained on the benchmark's own text.

What a model answers does not matter for speed; its shape does, and that its scores differ as a trained model's do.
"""

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:  # torch is loaded only where a model is to be made
    from transformers import PreTrainedConfig

VOCAB_SIZE = 16_384
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SCORE_STD = 1.0  # of the scores of SAMPLE, once the head is scaled
SAMPLE = (64, 96)  # inputs, tokens each

# hidden, layers, intermediate, heads, heads of keys and values, size of a head
SHAPES = {
    "qwen3-100m": (768, 12, 2304, 12, 4, 64),
    "qwen3-0.6b": (1024, 28, 3072, 16, 8, 128),
    "qwen3-4b": (2560, 36, 9728, 32, 8, 128),
    "llama-3.1-8b": (4096, 32, 14336, 32, 8, 128),
    "qwen3-tiny": (64, 3, 160, 4, 2, 16),  # for the tests
}


def make(name: str, folder: Path, data: Path | None) -> Path:
    """The checkpoint's folder, made below `folder` if it is not there. Without `data` the tokens are bytes."""
    target = folder / (name if data else f"{name}-bytes")
    if (target / "done").exists():
        return target
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    tokenizer = _train(data)
    _save_tokenizer(tokenizer, target)
    _save_model(_config(name, max(64, tokenizer.get_vocab_size())), target)
    (target / "done").touch()
    return target


def _config(name: str, vocab_size: int) -> "PreTrainedConfig":
    from transformers import LlamaConfig, Qwen3Config

    hidden, layers, intermediate, heads, kv_heads, head_dim = SHAPES[name]
    kind = LlamaConfig if name.startswith("llama") else Qwen3Config
    return kind(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=16_384,
        num_labels=1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )


def _save_model(config: "PreTrainedConfig", folder: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(len(SPECIAL), config.vocab_size, SAMPLE)
    with torch.inference_mode():
        scores = torch.cat([model(input_ids=row[None], use_cache=False).logits[0].float() for row in ids])
        model.score.weight.mul_(SCORE_STD / scores.std())
    model.save_pretrained(folder)


def _train(data: Path | None) -> tokenizers.Tokenizer:
    """Byte-level BPE; each digit is a token, so that the numbers that make a prompt new do not change its length."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(data) if data else [], trainer)
    return tokenizer


def _texts(data: Path) -> Iterator[str]:
    with gzip.open(data / "candidates.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            yield row["prompt"]
            yield from (candidate["response"] for candidate in row["candidates"])
    with gzip.open(data / "harmless_pairs.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            yield from (message["content"] for message in row["messages"])
            yield from (row["chosen"], row["rejected"])


def _save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL[0],
        "eos_token": SPECIAL[2],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 16_384,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
