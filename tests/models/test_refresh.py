"""Weights are taken over in place from a checkpoint like the one that is loaded, as that was when it was loaded."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import make_tokenizer, save_checkpoint
from rewardserve.errors import LoadFailed
from rewardserve.models import refresh
from rewardserve.models.backbone import Backbone
from rewardserve.models.reward_model import RewardModel
from rewardserve.models.spec import read_spec
from safetensors.torch import load_file, save_file
from scoring import native
from texts import all_texts, groups
from transformers import AutoModel, Glm4MoeConfig

IDS = [((1, 2, 3), ((4, 5), (6, 7, 8)))]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints of a run, which differ in their weights."""
    old, new = tmp_path / "step-1", tmp_path / "step-2"
    save_checkpoint(old, texts=all_texts(groups(2, 2)))
    shutil.copytree(old, new)
    weights = {name: 1.25 * tensor for name, tensor in load_file(old / "model.safetensors").items()}
    save_file(weights, new / "model.safetensors", {"format": "pt"})
    return old, new


async def test_the_folder_that_was_loaded_may_be_gone(folders) -> None:
    """A trainer keeps its last checkpoints, and others go."""
    old, new = folders
    async with native(new, path="padded") as scorer:
        wanted = await scorer.scores(IDS)
    async with native(old, path="padded") as scorer:
        assert not torch.allclose(await scorer.scores(IDS), wanted)
        shutil.rmtree(old)
        await scorer.engine.update_weights(str(new))
        assert torch.equal(await scorer.scores(IDS), wanted)


async def test_where_one_weight_cannot_be_taken_over_none_is(folders) -> None:
    old, new = folders
    weights = load_file(new / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] = weights["model.layers.2.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    save_file(weights, new / "model.safetensors", {"format": "pt"})
    async with native(old, path="padded") as scorer:
        wanted = await scorer.scores(IDS)
        with pytest.raises(LoadFailed, match=r"layers\.2\.mlp\.up_proj\.weight' is stored in 8 bits"):
            await scorer.engine.update_weights(str(new))
        assert torch.equal(await scorer.scores(IDS), wanted)


async def test_whatever_is_stumbled_over_before_a_weight_is_changed_leaves_the_model_as_it_was(
    folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(source: str) -> None:
        raise RecursionError("nobody foresaw it")

    old, new = folders
    async with native(old, path="padded") as scorer:
        wanted = await scorer.scores(IDS)
        with monkeypatch.context() as patched, pytest.raises(LoadFailed, match="RecursionError: nobody foresaw it"):
            patched.setattr("rewardserve.engine.native.load.read_spec", stumble)
            await scorer.engine.update_weights(str(new))
        assert torch.equal(await scorer.scores(IDS), wanted)


async def test_the_files_in_which_texts_differ_are_named(folders) -> None:
    old, new = folders
    make_tokenizer(["other texts, and hence other tokens"], "{{ messages[0].content }}").save_pretrained(new)
    (new / "vocab.json").write_text("{}")
    async with native(old, path="padded") as scorer:
        (old / "vocab.json").write_text("{}")  # which was not there when it was loaded
        with pytest.raises(LoadFailed, match=r"chat_template\.jinja, tokenizer\.json, vocab\.json are not") as refused:
            await scorer.engine.update_weights(str(new))
        assert str(new) in str(refused.value)


def mixtures(folder: Path, family: str) -> tuple[Path, Path]:
    """Two checkpoints, with experts saved one by one."""
    old, new = folder / "old", folder / "new"
    save_checkpoint(old, family)
    shutil.copytree(old, new)
    torch.manual_seed(1)
    weights = load_file(old / "model.safetensors")
    assert sum("experts.3." in name for name in weights) >= 6
    weights = {name: 1.25 * tensor + 0.01 * torch.randn(tensor.shape) for name, tensor in weights.items()}
    save_file(weights, new / "model.safetensors", {"format": "pt"})
    return old, new


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("options", [{"path": "padded"}, {"dtype": "bfloat16"}])
async def test_a_mixture_whose_experts_are_saved_one_by_one_is_taken_over(
    tmp_path: Path, family: str, options: dict[str, str]
) -> None:
    old, new = mixtures(tmp_path, family)
    async with native(new, **options) as scorer:
        wanted = await scorer.scores(IDS)
    async with native(old, **options) as scorer:
        assert not torch.allclose(await scorer.scores(IDS), wanted)
        await scorer.engine.update_weights(str(new))
        assert torch.equal(await scorer.scores(IDS), wanted)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights, key: weights.pop(key), r"has no 'layers\.1\.mlp\.experts\.gate_up_proj' under a name"),
        (
            lambda weights, key: weights.update({key: weights[key][1:].clone()}),
            r"the experts that make 'layers\.1\.mlp\.experts\.gate_up_proj' do not have one shape",
        ),
    ],
)
async def test_experts_that_make_no_stack_are_named_and_nothing_is_taken_over(tmp_path: Path, change, reason) -> None:
    old, new = mixtures(tmp_path, "qwen3_moe")
    weights = load_file(new / "model.safetensors")
    change(weights, "model.layers.1.mlp.experts.2.up_proj.weight")
    save_file(weights, new / "model.safetensors", {"format": "pt"})
    async with native(old, path="padded") as scorer:
        wanted = await scorer.scores(IDS)
        with pytest.raises(LoadFailed, match=reason):
            await scorer.engine.update_weights(str(new))
        assert torch.equal(await scorer.scores(IDS), wanted)


def test_of_quantized_weights_which_have_scales_beside_them_nothing_is_taken_over(folders) -> None:
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    loaded, new = (read_spec(str(folder)) for folder in folders)
    model = RewardModel(Backbone(AutoModel.from_config(loaded.config)), [loaded.recipe.head])
    with pytest.raises(LoadFailed, match="quantized; use Swap"):
        refresh.check_refresh(model, new, loaded)


def test_a_bias_by_which_experts_are_chosen_is_a_weight_though_no_parameter(tmp_path: Path) -> None:
    config = Glm4MoeConfig(
        vocab_size=400,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    )
    module = AutoModel.from_config(config)
    bias = "layers.1.mlp.gate.e_score_correction_bias"
    for where, wanted in (({bias: tmp_path, "norm.weight": tmp_path}, {bias}), ({"norm.weight": tmp_path}, set())):
        spec = SimpleNamespace(
            config=config, checkpoint=SimpleNamespace(where=where), recipe=SimpleNamespace(head_keys=())
        )
        assert refresh._wanted(spec).keys() - dict(module.named_parameters()).keys() == wanted
    assert bias in Backbone(module).loaded_as
