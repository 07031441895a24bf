"""A LoRA adapter with a head of its own scores as its base with the product added; what cannot be merged is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from adapters import ALPHA, HIDDEN, RANK, adapter_of, merged_by_hand, save_adapter
from checkpoints import VOCAB_SIZE, padded_scores, padded_states, save_checkpoint
from rewardserve.errors import LoadFailed
from rewardserve.models.loader import load_sharing
from rewardserve.models.spec import read_spec
from safetensors.torch import load_file, save_file
from scoring import joined, native
from torch.nn import functional as F

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
        (
            {"alpha_pattern": {"proj": 3, r"layers\.\d.self_attn.q_proj": 16, "up_proj|down_proj": 16, "q_proj": 5}},
            16 / RANK,
            "base_model.model.score.weight",
        ),
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
        ({"use_dora": True}, "use_dora, and no lora_magnitude_vector of 128 numbers is beside"),
        ({"alpha_pattern": {"(q_proj": 4}}, "alpha_pattern in its adapter_config.json: missing \\)"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
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
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",  # without use_dora
        "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight",
        "base_model.model.model.layers.9.mlp.up_proj.base_layer.bias",
    ],
)
def test_a_weight_that_fits_nowhere_is_refused_by_name(base: Path, tmp_path: Path, key: str) -> None:
    save_adapter(tmp_path / "adapter", base, {key: torch.zeros(RANK, HIDDEN)})
    with pytest.raises(LoadFailed, match=key.replace(".", r"\.")):
        read_spec(str(tmp_path / "adapter"))


def of_head(prefix: str) -> dict[str, torch.Tensor]:
    """An MLP as `rewardserve train --head mlp` makes it."""
    shapes = {"0.weight": (16, HIDDEN), "0.bias": (16,), "2.weight": (1, 16), "2.bias": (1,)}
    return {f"{prefix}.{name}": torch.randn(shape) for name, shape in shapes.items()}


def mlp(h: torch.Tensor, t: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    hidden = F.relu(F.linear(h, t[f"{prefix}.0.weight"], t[f"{prefix}.0.bias"]))
    return F.linear(hidden, t[f"{prefix}.2.weight"], t[f"{prefix}.2.bias"])[:, 0]


async def test_an_adapters_own_head_takes_the_place_of_its_bases(base: Path, tmp_path: Path) -> None:
    """Of another form, so that no key of one is a key of the other; and without the base's normaliser."""
    config = json.loads((base / "config.json").read_text()) | {"mean": 3.0, "std": 2.0}
    (base / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    head = of_head("base_model.model.score.modules_to_save")
    save_adapter(tmp_path / "adapter", base, head)
    assert read_spec(str(base)).recipe.normalizer is not None
    async with native(tmp_path / "adapter") as scorer:
        got = await scorer.scores(GROUPS)
        assert (scorer.info.shift, scorer.info.scale) == (0.0, 1.0)
    states = padded_states(base, joined(GROUPS))
    wanted = mlp(states, head, "base_model.model.score.modules_to_save")
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("file", ["value_head.safetensors", "pytorch_model.bin"])
async def test_a_value_head_beside_an_adapter_is_its_head(base: Path, tmp_path: Path, file: str) -> None:
    """As LLaMA-Factory and TRL leave it, over a language model and over a base that has a head."""
    torch.manual_seed(2)
    head = {"v_head.summary.weight": torch.randn(1, HIDDEN), "v_head.summary.bias": torch.randn(1)}
    weights = load_file(base / "model.safetensors")
    tensors = {key: value for key, value in adapter_of(weights).items() if "score" not in key}
    save_adapter(tmp_path / "adapter", base, tensors)
    save = torch.save if file.endswith(".bin") else save_file
    save(head, tmp_path / "adapter" / file)
    versions = set()
    states = padded_states(
        merged_by_hand(base, tensors | {"score": torch.zeros(1, HIDDEN)}, 8 / RANK, tmp_path / "m"), joined(GROUPS)
    )
    wanted = F.linear(states, head["v_head.summary.weight"], head["v_head.summary.bias"])[:, 0]
    for has_head in (True, False):
        if not has_head:
            del weights["score.weight"]
            save_file(weights | {"lm_head.weight": torch.randn(VOCAB_SIZE, HIDDEN)}, base / "model.safetensors")
        async with native(tmp_path / "adapter") as scorer:
            got = await scorer.scores(GROUPS)
            versions.add(scorer.info.version)
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert len(versions) == 2


def test_a_whole_model_that_was_left_beside_an_adapter_is_none_of_it(base: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    save_adapter(tmp_path / "adapter", base, adapter_of(weights))
    torch.save(weights | {"v_head.summary.weight": torch.randn(1, HIDDEN)}, tmp_path / "adapter" / "pytorch_model.bin")
    assert "v_head.summary.weight" not in read_spec(str(tmp_path / "adapter")).checkpoint.where


async def test_lora_of_a_language_models_head_is_added_to_it(base: Path, tmp_path: Path) -> None:
    """PEFT keeps such a layer's own weight, as it was, beside what LoRA adds to it."""
    torch.manual_seed(4)
    weights, rows = load_file(base / "model.safetensors"), torch.randn(VOCAB_SIZE, HIDDEN)
    save_file(weights | {"lm_head.weight": rows}, base / "model.safetensors", metadata={"format": "pt"})
    down, up = torch.randn(RANK, HIDDEN) * 0.1, torch.randn(VOCAB_SIZE, RANK) * 0.1
    parts = {"base_layer.weight": rows, "lora_A.weight": down, "lora_B.weight": up}
    tensors = {f"base_model.model.lm_head.{name}": tensor for name, tensor in parts.items()}
    save_adapter(tmp_path / "adapter", base, tensors)
    (tmp_path / "adapter" / "rewardserve.toml").write_text('[head]\nkind = "lm_rows"\nids = [7]\n')
    wanted = padded_states(base, joined(GROUPS)) @ (rows + ALPHA / RANK * up @ down)[7]
    async with native(tmp_path / "adapter") as scorer:
        got = await scorer.scores(GROUPS)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


async def test_a_head_that_is_tied_to_an_embedding_is_not_trained_with_its_copy(tmp_path: Path) -> None:
    """So it is in PEFT's forward, where modules_to_save names the embedding and not the head."""
    base, by_hand = tmp_path / "base", tmp_path / "by-hand"
    save_checkpoint(base, tie_word_embeddings=True)
    save_checkpoint(by_hand)
    key, weights = "model.embed_tokens.weight", load_file(base / "model.safetensors")
    trained = torch.randn(weights[key].shape)
    save_file(weights | {key: trained}, by_hand / "model.safetensors", metadata={"format": "pt"})
    save_adapter(tmp_path / "adapter", base, {f"base_model.model.{key}": trained}, modules_to_save=["embed_tokens"])
    (tmp_path / "adapter" / "rewardserve.toml").write_text('[head]\nkind = "lm_rows"\nids = [7]\n')
    wanted = padded_states(by_hand, joined(GROUPS)) @ weights[key][7]
    async with native(tmp_path / "adapter") as scorer:
        got = await scorer.scores(GROUPS)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


async def test_biases_that_were_trained_beside_lora_are_taken_over(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", "llama", attention_bias=True)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    bias = "model.layers.1.self_attn.q_proj.bias"
    trained = torch.randn(weights[bias].shape)
    save_adapter(
        tmp_path / "adapter",
        tmp_path / "base",
        {f"base_model.model.{bias.replace('.bias', '.base_layer.bias')}": trained},
    )
    save_checkpoint(tmp_path / "by-hand", "llama", attention_bias=True)
    save_file(weights | {bias: trained}, tmp_path / "by-hand" / "model.safetensors", metadata={"format": "pt"})
    wanted = padded_scores(tmp_path / "by-hand", joined(GROUPS), torch.float32)
    plain = padded_scores(tmp_path / "base", joined(GROUPS), torch.float32)
    async with native(tmp_path / "adapter") as scorer:
        got = await scorer.scores(GROUPS)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max() and not torch.allclose(got, plain, rtol=1e-2)


async def test_an_adapter_that_brings_a_longer_vocabulary_reads_its_tokens(base: Path, tmp_path: Path) -> None:
    """PEFT keeps the embedding whole where a token was added to it, one of padding for instance."""
    weights, new = load_file(base / "model.safetensors"), VOCAB_SIZE
    tensors = adapter_of(weights)
    embedding = torch.cat([weights["model.embed_tokens.weight"], torch.randn(1, HIDDEN)])
    by_hand = merged_by_hand(base, tensors, 8 / RANK, tmp_path / "by-hand")
    merged = load_file(by_hand / "model.safetensors") | {"model.embed_tokens.weight": embedding}
    save_file(merged, by_hand / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((by_hand / "config.json").read_text())
    (by_hand / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB_SIZE + 1}))
    save_adapter(tmp_path / "adapter", base, tensors | {"base_model.model.model.embed_tokens.weight": embedding})
    groups = [([5, new, 7], [[8, new], [9, 10, 11]])]
    wanted = padded_scores(by_hand, joined(groups), torch.float32)
    async with native(tmp_path / "adapter") as scorer:
        assert scorer.info.vocab_size == VOCAB_SIZE + 1
        got = await scorer.scores(groups)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert read_spec(str(base)).config.vocab_size == VOCAB_SIZE


ON_THE_MEAN = '[head]\nkind = "linear"\nweights = "score"\n[read]\nat = "mean"\n'


async def test_an_adapter_is_scored_as_the_file_beside_its_base_says(base: Path, tmp_path: Path) -> None:
    """Unless it brings a head of its own; of one that was the base's, only a file of its own can tell."""
    weights = load_file(base / "model.safetensors")
    tensors = adapter_of(weights)
    lora = {key: tensor for key, tensor in tensors.items() if "score" not in key}
    by_hand = merged_by_hand(base, lora | {"score": weights["score.weight"]}, 8 / RANK, tmp_path / "by-hand")
    for folder in (base, by_hand):
        (folder / "rewardserve.toml").write_text(ON_THE_MEAN)
    save_adapter(tmp_path / "adapter", base, lora)
    async with native(by_hand) as scorer:
        wanted = await scorer.scores(GROUPS)
    async with native(tmp_path / "adapter") as scorer:
        assert (await scorer.scores(GROUPS)) == pytest.approx(wanted, rel=1e-5)
    assert (
        read_spec(str(tmp_path / "adapter")).texts["rewardserve.toml"] == read_spec(str(base)).texts["rewardserve.toml"]
    )

    save_adapter(tmp_path / "with-head", base, tensors)
    with pytest.raises(LoadFailed, match=r"brings 'score.weight', and .*base/rewardserve.toml says how its base's is"):
        read_spec(str(tmp_path / "with-head"))
    (tmp_path / "with-head" / "rewardserve.toml").write_text(ON_THE_MEAN)
    assert read_spec(str(tmp_path / "with-head")).recipe.family == "by rewardserve.toml"

    value_head = {"v_head.summary.weight": torch.randn(1, HIDDEN), "v_head.summary.bias": torch.randn(1)}
    save_file(value_head, tmp_path / "adapter" / "value_head.safetensors")
    assert read_spec(str(tmp_path / "adapter")).recipe.family == "scalar head"


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])  # whose layers are stored transposed
async def test_a_dora_adapter_gives_weights_the_norms_that_were_trained(family: str, tmp_path: Path) -> None:
    base, stored = tmp_path / "base", family == "gpt2"
    target = "transformer.h.1.mlp.c_fc" if stored else "model.layers.1.mlp.up_proj"
    save_checkpoint(base, family)
    weights = load_file(base / "model.safetensors")
    weight = weights[f"{target}.weight"].T if stored else weights[f"{target}.weight"]
    torch.manual_seed(3)
    down, up = torch.randn(RANK, weight.shape[1]) * 0.1, torch.randn(len(weight), RANK) * 0.1
    norms = torch.rand(len(weight)) + 0.5
    merged = weight + 8 / RANK * up @ down
    merged = norms[:, None] * merged / merged.square().sum(1, keepdim=True).sqrt()
    by_hand = tmp_path / "by-hand"
    save_checkpoint(by_hand, family)
    weights[f"{target}.weight"] = (merged.T if stored else merged).contiguous()
    save_file(weights, by_hand / "model.safetensors", metadata={"format": "pt"})
    parts = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": norms}
    tensors = {f"base_model.model.{target}.{name}": tensor for name, tensor in parts.items()}
    save_adapter(tmp_path / "adapter", base, tensors, use_dora=True, fan_in_fan_out=stored)
    wanted = padded_scores(by_hand, joined(GROUPS), torch.float32)
    async with native(tmp_path / "adapter") as scorer:
        got = await scorer.scores(GROUPS)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    spec = read_spec(str(tmp_path / "adapter"))
    with pytest.raises(LoadFailed, match="stored transposed" if stored else "trained with DoRA"):
        load_sharing([spec, spec], torch.float32, torch.device("cpu"))
