"""A config.json as transformers 4 wrote it describes the same model today: scores against the published formulas in
plain torch. The padded forward of transformers 5, to which all else is held, may come to read a file otherwise.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_models import (
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    SIZE,
    VOCABULARY,
    Decoder,
    Tensors,
    deberta_states,
    deberta_tensors,
    llama3,
    neox_states,
    neox_tensors,
    normal,
)
from safetensors.torch import save_file
from scoring import IdGroup, joined, native
from torch.nn import functional as F

SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "float32",
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
}
LLAMA31 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
GEMMA = {"head_dim": SIZE, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-06, "pad_token_id": 0}
WINDOWS = (24, None, 24, None)


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


@dataclass(frozen=True)
class Kind:
    config: dict[str, Any]
    plain: Decoder = field(default_factory=Decoder)


DECODERS = {
    "Llama 2": Kind({"model_type": "llama", "rope_scaling": None, "pretraining_tp": 1, "tie_word_embeddings": False}),
    "Llama, its positions closer together": Kind(
        {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}}, Decoder(slow_down=lambda f: f / 4)
    ),
    "Llama 3.1": Kind(
        {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": LLAMA31, "mlp_bias": False},
        Decoder(theta=500000.0, slow_down=llama3),
    ),
    "Mistral 0.1": Kind(
        {"model_type": "mistral", "sliding_window": 24, "rope_theta": 10000.0}, Decoder(windows=(24,) * LAYERS)
    ),
    "Mistral 0.2": Kind(
        {"model_type": "mistral", "sliding_window": None, "rope_theta": 1000000.0, "head_dim": None},
        Decoder(theta=1e6),
    ),
    "Qwen2, its window unused": Kind(
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 24, "max_window_layers": 2}
        | {"rope_theta": 1000000.0, "use_mrope": False},
        Decoder(theta=1e6, biases=True),
    ),
    "Qwen2, its window used in the upper layers": Kind(
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
        Decoder(biases=True, windows=(None, None, 24, 24)),
    ),
    "Qwen3": Kind(
        {"model_type": "qwen3", "head_dim": SIZE, "rope_theta": 1000000, "rope_scaling": None, "attention_bias": False}
        | {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28},
        Decoder(theta=1e6, norms_of_heads=True),
    ),
    "Gemma, by the activation's old name": Kind(
        GEMMA | {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None},
        Decoder(eps=1e-6, gemma=True, activation=tanh_gelu),
    ),
    "Gemma 2": Kind(
        GEMMA
        | {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 24}
        | {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, "cache_implementation": "hybrid"},
        Decoder(eps=1e-6, gemma=True, activation=tanh_gelu, norms_after=True, scale=20**-0.5, cap=2.0, windows=WINDOWS),
    ),
}


@pytest.fixture
def groups() -> list[IdGroup]:
    generator = random.Random(0)

    def ids(count: int) -> list[int]:
        return [generator.randrange(1, VOCABULARY) for _ in range(count)]

    return [(ids(200), [ids(40), ids(1), ids(90)]), (ids(5), [ids(30)])]


def write(folder: Path, tensors: Tensors, config: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


async def differing(folder: Path, groups: list[IdGroup], score: Callable[[list[int]], torch.Tensor]) -> dict[str, Any]:
    """Scores that are not the formula's, by the way they were computed."""
    wanted, found = torch.stack([score(ids) for ids in joined(groups)]), {}
    for path in ("auto", "padded"):
        async with native(folder, path=path) as scorer:
            found |= {f"{path}, {state}": await scorer.scores(groups) for state in ("cold", "warm")}
    assert len(found) == 4
    atol = 1e-4 * wanted.abs().max().item()
    return {way: got for way, got in found.items() if not torch.allclose(got, wanted, rtol=1e-4, atol=atol)}


@pytest.mark.parametrize("name", DECODERS)
async def test_a_decoder_has_the_scores_of_its_formula(name: str, tmp_path: Path, groups: list[IdGroup]) -> None:
    kind = DECODERS[name]
    torch.manual_seed(0)
    tensors = kind.plain.tensors() | {"score.weight": normal(1, HIDDEN)}
    model_type = kind.config["model_type"]
    architecture = f"{model_type.capitalize()}ForSequenceClassification"
    written = {"architectures": [architecture], "transformers_version": "4.43.1"}
    write(tmp_path, tensors, SHAPE | written | kind.config)
    head = tensors["score.weight"][0]
    assert not await differing(tmp_path, groups, lambda ids: kind.plain.states(ids, tensors)[-1] @ head)


async def test_a_pythia_has_the_scores_of_its_formula(tmp_path: Path, groups: list[IdGroup]) -> None:
    torch.manual_seed(0)
    tensors = neox_tensors() | {"out_proj.weight": normal(1, HIDDEN), "out_proj.bias": normal(1)}
    config = {
        "model_type": "gpt_neox_reward_model",
        "architectures": ["GPTNeoXRewardModel"],
        "pooling": "last",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-05,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "transformers_version": "4.26.0",
    }
    write(tmp_path, tensors, {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"} | config)
    head, bias = tensors["out_proj.weight"][0], tensors["out_proj.bias"][0]
    assert not await differing(tmp_path, groups, lambda ids: neox_states(ids, tensors)[-1] @ head + bias)


async def test_a_deberta_has_the_scores_of_its_formula(tmp_path: Path, groups: list[IdGroup]) -> None:
    torch.manual_seed(0)
    tensors = deberta_tensors() | {"classifier.weight": normal(1, HIDDEN), "classifier.bias": normal(1)}
    tensors |= {"pooler.dense.weight": normal(HIDDEN, HIDDEN), "pooler.dense.bias": normal(HIDDEN)}
    config = {
        "model_type": "deberta-v2",
        "architectures": ["DebertaV2ForSequenceClassification"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-07,
        "max_position_embeddings": 512,
        "max_relative_positions": -1,
        "norm_rel_ebd": "layer_norm",
        "pooler_hidden_act": "gelu",
        "pooler_hidden_size": HIDDEN,
        "pos_att_type": "p2c|c2p",
        "position_biased_input": False,
        "position_buckets": 8,
        "relative_attention": True,
        "share_att_key": True,
        "type_vocab_size": 0,
        "transformers_version": "4.26.0",
    }
    write(tmp_path, tensors, {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"} | config)

    def score(ids: list[int]) -> torch.Tensor:
        first = F.linear(deberta_states(ids, tensors)[0], tensors["pooler.dense.weight"], tensors["pooler.dense.bias"])
        return F.gelu(first) @ tensors["classifier.weight"][0] + tensors["classifier.bias"][0]

    assert not await differing(tmp_path, groups, score)
