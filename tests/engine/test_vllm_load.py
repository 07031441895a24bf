"""What is for vLLM imports without it: it is looked for when a model is loaded, after all that can be seen without."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from adapters import adapter_of, save_adapter
from checkpoints import save_checkpoint
from rewardserve.engine import vllm_load
from rewardserve.engine.vllm_environment import set_environment
from rewardserve.engine.vllm_options import VllmOptions
from rewardserve.errors import LoadFailed
from rewardserve.models.spec import read_spec
from safetensors.torch import load_file, save_file


async def refusal(folder: Path | str, reason: str = "asked for") -> str:
    with pytest.raises(LoadFailed) as refused:
        await vllm_load.load(VllmOptions(source=str(folder), reason=reason), lambda step: None)
    return str(refused.value)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM seems to be there; who imports it fails."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: object() if name == "vllm" else find(name, *rest)
    )


async def test_without_vllm_a_model_is_refused_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    asked = {"asked for": "engine = vllm", "tensor_parallel = 2": "tensor_parallel = 2"}
    for reason, option in asked.items():
        told = await refusal("/nowhere", reason)
        assert f"{option}, but vLLM is not installed; install it with pip install" in told


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("asked for", "leave out --engine vllm"),
        ("tensor_parallel = 2", "leave out --tensor-parallel"),
        ("vllm_quantization = mxfp8", "leave out --vllm-quantization"),
    ],
)
async def test_a_head_that_is_not_what_vllm_reads_is_refused_with_what_chose_it(
    pretended: None, tmp_path: Path, reason: str, said: str
) -> None:
    """It reads `score`, where there is one: a wrong number for each response."""
    save_checkpoint(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"my_head.weight": torch.ones(1, 64)}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "rewardserve.toml").write_text('[head]\nkind = "linear"\nweights = "my_head"\n')
    message = await refusal(tmp_path, reason)
    assert "this is by rewardserve.toml" in message and said in message


async def test_where_the_native_engine_has_refused_it_is_not_recommended(pretended: None, tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    (tmp_path / "rewardserve.toml").write_text('[head]\nkind = "linear"\nweights = "score"\nactivation = "sigmoid"\n')
    assert "leave out" not in await refusal(tmp_path, "the native engine cannot load it: weights of kind x")


async def test_short_inputs_are_not_computed_with_the_positions_of_long_ones(pretended: None, tmp_path: Path) -> None:
    """vLLM takes one kind for all, by the longest that is allowed; with that, no input may need the other."""
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 160}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    save_checkpoint(tmp_path, "phi3", rope_parameters=rope, original_max_position_embeddings=160)
    message = await refusal(tmp_path)
    assert "beyond 160 tokens" in message and "--max-length 160" in message and "--engine vllm" in message
    vllm_load._check_rope(VllmOptions(str(tmp_path), max_length=160), read_spec(str(tmp_path)))


@pytest.mark.parametrize("has_index", [False, True])
async def test_a_file_of_other_weights_beside_a_models_is_not_read_for_it(
    pretended: None, tmp_path: Path, has_index: bool
) -> None:
    """vLLM would: all of a folder, unless an index says which."""
    save_checkpoint(tmp_path, max_shard_size="200KB" if has_index else "5GB")
    save_file({"score.weight": torch.ones(1, 64)}, tmp_path / "model_old.safetensors", {"format": "pt"})
    torch.save({}, tmp_path / "training_args.bin")
    spec = read_spec(str(tmp_path))
    if has_index:
        vllm_load._check_files(spec)
        return
    assert "model_old.safetensors" in await refusal(tmp_path)
    (tmp_path / "model_old.safetensors").unlink()
    vllm_load._check_files(spec)


async def test_an_adapter_is_refused_with_what_to_do(pretended: None, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base")
    adapter = adapter_of(load_file(tmp_path / "base" / "model.safetensors"))
    save_adapter(tmp_path / "adapter", tmp_path / "base", adapter)
    assert "merge the adapter into its base" in await refusal(tmp_path / "adapter", "tensor_parallel = 2")


@pytest.mark.parametrize("is_torchs_own", [False, True])
def test_numbers_are_counted_of_a_quantized_checkpoint_in_files_of_any_kind(
    tmp_path: Path, is_torchs_own: bool
) -> None:
    save_checkpoint(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    weights = load_file(tmp_path / "model.safetensors")
    if is_torchs_own:
        (tmp_path / "model.safetensors").unlink()
        torch.save(weights, tmp_path / "pytorch_model.bin")
    spec = read_spec(str(tmp_path), any_quantization=True)
    assert vllm_load._check_weights(spec) == sum(tensor.numel() for tensor in weights.values())


def test_vllm_calls_our_plugin_though_it_is_told_which_it_may_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it one score that is not a number makes others so, and its processes outlive ours."""
    monkeypatch.setattr(os, "environ", {"VLLM_PLUGINS": "of_mine"})
    set_environment(VllmOptions("x"))
    assert os.environ["VLLM_PLUGINS"].split(",") == ["of_mine", "rewardserve"]
