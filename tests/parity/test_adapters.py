"""A LoRA adapter with a head of its own scores as its base with the product added; what cannot be merged is refused."""

import math
from pathlib import Path

import pytest
import torch
from adapters import HIDDEN, RANK, adapter_of, merged_by_hand, save_adapter
from checkpoints import VOCAB_SIZE, padded_scores, save_checkpoint
from rewardserve.errors import LoadFailed
from rewardserve.models.spec import read_spec
from safetensors.torch import load_file, save_file
from scoring import joined, native

GROUPS = [([5, 6, 7] * 60, [[8] * 5, [9, 10, 11]]), ([3], [[4, 5]])]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("config", "scale", "head"),
    [
        ({}, 8 / RANK, "base_model.model.score.weight"),
        ({"use_rslora": True}, 8 / math.sqrt(RANK), "base_model.model.score.modules_to_save.weight"),
    ],
)
async def test_an_adapter_scores_as_its_base_merged_by_hand(base: Path, tmp_path: Path, config, scale, head) -> None:
    tensors = adapter_of(load_file(base / "model.safetensors"), head)
    save_adapter(tmp_path / "adapter", base, tensors, **config)
    by_hand = merged_by_hand(base, tensors, scale, tmp_path / "by-hand")
    wanted = padded_scores(by_hand, joined(GROUPS), torch.float32)
    plain = padded_scores(base, joined(GROUPS), torch.float32)
    async with native(tmp_path / "adapter") as scorer:
        got = await scorer.scores(GROUPS)
        assert scorer.info.path == "packed"
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max() and not torch.allclose(got, plain, rtol=1e-2)


async def test_a_language_model_with_an_adapter_that_brings_the_head(base: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    tensors = adapter_of(weights)
    by_hand = merged_by_hand(base, tensors, 8 / RANK, tmp_path / "by-hand")
    del weights["score.weight"]
    save_file(weights | {"lm_head.weight": torch.randn(VOCAB_SIZE, HIDDEN)}, base / "model.safetensors")
    save_adapter(tmp_path / "adapter", Path("../base"), tensors)  # beside the adapter
    async with native(tmp_path / "adapter") as scorer:
        got = await scorer.scores(GROUPS)
    wanted = padded_scores(by_hand, joined(GROUPS), torch.float32)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_versions_tell_adapters_and_bases_apart(base: Path, tmp_path: Path) -> None:
    tensors = adapter_of(load_file(base / "model.safetensors"))
    save_adapter(tmp_path / "one", base, tensors)
    save_adapter(tmp_path / "other", base, {key: tensor * 1.5 for key, tensor in tensors.items()})
    versions = {read_spec(str(folder)).version for folder in (base, tmp_path / "one", tmp_path / "other")}
    assert len(versions) == 3


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "use_dora cannot be merged"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type is 'PREFIX_TUNING'"),
        ({"base_model_name_or_path": ""}, "base_model_name_or_path is missing"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(base: Path, tmp_path: Path, config, words: str) -> None:
    save_adapter(tmp_path / "adapter", base, adapter_of(load_file(base / "model.safetensors")), **config)
    with pytest.raises(LoadFailed, match=words):
        read_spec(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight",
    ],
)
def test_a_weight_that_fits_nowhere_is_refused_by_name(base: Path, tmp_path: Path, key: str) -> None:
    save_adapter(tmp_path / "adapter", base, {key: torch.zeros(RANK, HIDDEN)})
    with pytest.raises(LoadFailed, match=key.replace(".", r"\.")):
        read_spec(str(tmp_path / "adapter"))
