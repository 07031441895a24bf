"""Random tiny checkpoints in the true layouts, made where a test needs them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 400
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
WINDOW = 40  # shorter than the texts, so that it matters
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "llama": {},
    "mistral": {"head_dim": 16, "sliding_window": WINDOW},
    "gemma2": {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": WINDOW},
    "gpt_oss": {"head_dim": 32, "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "phi3": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 2048},
}
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "gemma": {"head_dim": 32},
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW},
    "smollm3": {},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "starcoder2": {},
    "stablelm": {},
    "phi": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,  # a query's is 32
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "glm4": {"head_dim": 32},
    "exaone4": {"sliding_window": WINDOW},
    "nemotron": {},
    "seed_oss": {"head_dim": 16},
}
NOT_PACKABLE: dict[str, dict[str, Any]] = {"falcon": {}, "bloom": {"n_layer": 3, "n_head": 4}}
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_model(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """Weights large enough that attention and every nonlinearity matter. `overrides` are of the config."""
    options = {**COMMON, **(FAMILIES | MORE_FAMILIES | NOT_PACKABLE)[family], **overrides}
    config = AutoConfig.for_model(family, **options)
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").float().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "sinks" in name:
            torch.nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 1.0)
    return model.to(dtype)


def save_checkpoint(
    folder: Path,
    family: str = "qwen3",
    dtype: torch.dtype = torch.float32,
    texts: Sequence[str] = (),
    template: str | None = TEMPLATE,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> PreTrainedModel:
    """Writes a checkpoint, with a tokenizer if there are `texts` to train it on, and returns the model."""
    model = make_model(family, dtype, **overrides)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if texts:
        make_tokenizer(texts, template).save_pretrained(folder)
    return model


def make_tokenizer(texts: Sequence[str], template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB_SIZE tokens: every string has ids, and none is out of the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>")
    fast.chat_template = template
    return fast


def padded_scores(folder: Path, rows: Sequence[Sequence[int]], dtype: torch.dtype) -> torch.Tensor:
    """What plain padded Hugging Face says, in `dtype`, reading the last true token: [len(rows)].

    Loaded from the folder: `model.to(dtype)` would round the rotary frequencies too, which `from_pretrained` does not.
    """
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model.score(_last_states(model, rows))[:, 0].float()


def padded_states(folder: Path, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Final hidden states of each row's last true token by plain padded Hugging Face, in fp32: [len(rows), hidden]."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return _last_states(model.eval(), rows)


def _last_states(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    backbone = getattr(model, model.base_model_prefix)
    hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[torch.arange(len(rows)), lengths - 1]
