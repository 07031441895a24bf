"""A logit that is a score, or an odd, is the one that the language model's own class gives, whatever it does to it."""

from pathlib import Path

import pytest
import torch
from checkpoints import COMMON
from rewardserve.errors import LoadFailed
from rewardserve.models.loader import load
from rewardserve.models.spec import read_spec
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

ROW, IDS = [5, 6, 7, 8, 250, 3], (30, 40)
ODDS = f'[head]\nkind = "lm_odds"\nids = {list(IDS)}\n'
ROWS = f'[head]\nkind = "lm_rows"\nids = {list(IDS)}\n[score]\nattributes = ["yes", "no"]\nweights_of = [1.0, -1.0]\n'
KINDS = {
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "granitemoe": {"logits_scaling": 6.0, "num_local_experts": 2, "num_experts_per_tok": 1},
    "cohere2": {"logit_scale": 0.0625, "head_dim": 16},
    "hyperclovax": {"logits_scaling": 0.25},
    "phi": {},
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
}


def save_language_model(folder: Path, kind: str, **options) -> torch.Tensor:
    """What its own class says comes after ROW, logits of IDS."""
    config = AutoConfig.for_model(kind, **{**COMMON, **KINDS[kind], **options})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(folder)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ROW]), use_cache=False).logits[0, -1, list(IDS)]


def features(folder: Path, told: str) -> torch.Tensor:
    (folder / "rewardserve.toml").write_text(told)
    model = load(read_spec(str(folder)), torch.float32, torch.device("cpu"))
    return model.features_padded([torch.tensor(ROW)], [[len(ROW) - 1]])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_odds_are_those_of_the_models_own_class(kind: str, tmp_path: Path) -> None:
    wanted = save_language_model(tmp_path, kind)
    assert features(tmp_path, ROWS)[1:].tolist() == pytest.approx(wanted.tolist(), rel=1e-5, abs=1e-6)
    assert features(tmp_path, ODDS).item() == pytest.approx(wanted.softmax(-1)[0].item(), rel=1e-5)


def test_an_embedding_is_a_language_models_head_only_where_the_config_ties_them(tmp_path: Path) -> None:
    save_language_model(tmp_path, "qwen2", tie_word_embeddings=False)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadFailed, match="tie_word_embeddings"):
        features(tmp_path, ODDS)
