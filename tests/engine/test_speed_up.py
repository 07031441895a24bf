"""Compiling is kept where it works and pays; where it does not, the model is served as right as ever."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from built import why_not
from checkpoints import padded_scores, save_checkpoint
from rewardserve.engine.native import speed_up
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.options import NativeOptions
from rewardserve.errors import LoadFailed
from rewardserve.models.backbone import Backbone
from rewardserve_kernels.attention import chunked
from rewardserve_kernels.linear import avx512
from rewardserve_kernels.linear.avx512 import Avx512GatedMLP, Avx512Linear
from rewardserve_kernels.linear.fp8 import Fp8Linear
from rewardserve_kernels.linear.prepacked import PrepackedLinear
from safetensors.torch import load_file, save_file
from scoring import IdGroup, joined, native
from torch import nn

not_built = why_not(avx512.load)

SUPPORT = Path(__file__).parents[1] / "support"
GROUPS: list[IdGroup] = [(list(range(5, 155)), [list(range(10, 10 + n)) for n in (7, 40, 1, 90)])]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path)
    return tmp_path


def without_a_compiler(checkpoint: Path, compile_option: str) -> subprocess.CompletedProcess[str]:
    """What comes of GROUPS in a process of its own: torch looks for its compiler once."""
    code = f"""
import asyncio, logging, sys
from rewardserve.engine.native import speed_up
from scoring import native
logging.basicConfig()
speed_up.MIN_PARAMETERS_TO_COMPILE = 0

async def main():
    async with native({str(checkpoint)!r}, compile={compile_option!r}) as scorer:
        print(scorer.info.path, *(await scorer.scores({GROUPS!r})).tolist())

asyncio.run(main())
"""
    environment = {
        **os.environ,
        "CXX": "/nonexistent/g++",
        "TORCHINDUCTOR_CACHE_DIR": str(checkpoint / "inductor"),
        "PYTHONPATH": str(SUPPORT),
    }
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


async def is_right(checkpoint: Path, **options: object) -> None:
    wanted = padded_scores(checkpoint, joined(GROUPS), torch.float32)
    async with native(checkpoint, **options) as scorer:
        assert scorer.info.path == "packed"
        assert torch.allclose(await scorer.scores(GROUPS), wanted, rtol=1e-5, atol=1e-6)


def test_without_a_compiler_a_model_is_served_packed_and_uncompiled(checkpoint: Path) -> None:
    done = without_a_compiler(checkpoint, "auto")
    assert "layers run uncompiled: compiling failed" in done.stderr and "C++ compiler" in done.stderr
    path, *scores = done.stdout.split()
    assert path == "packed"
    wanted = padded_scores(checkpoint, joined(GROUPS), torch.float32)
    assert torch.allclose(torch.tensor([float(score) for score in scores]), wanted, rtol=1e-5, atol=1e-6)


def test_compile_on_refuses_to_start_without_a_compiler(checkpoint: Path) -> None:
    done = without_a_compiler(checkpoint, "on")
    assert done.returncode != 0
    assert "OptionsDoNotFit: compile = on, but compiling failed" in done.stderr
    assert "use compile = auto or off" in done.stderr


@pytest.mark.parametrize("faster", [True, False])
async def test_what_was_measured_decides_whether_layers_run_compiled(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, faster: bool
) -> None:
    """A clock that gives the second run of every pair (uncompiled) more time, or less."""
    times = iter([x for i in range(100) for x in ((0, 2, 0, 3) if faster else (0, 3, 0, 2))])
    final: list[bool] = []
    monkeypatch.setattr(speed_up, "MIN_PARAMETERS_TO_COMPILE", 0)
    monkeypatch.setattr(speed_up, "_clock", lambda: next(times))
    set_compiled = Backbone.set_compiled
    monkeypatch.setattr(
        Backbone, "set_compiled", lambda self, value: (final.append(value), set_compiled(self, value))[1]
    )
    caplog.set_level(logging.INFO)
    await is_right(checkpoint, compile="auto")
    assert final[-1] is faster
    assert ("compiled layers: 1.50 x as fast" if faster else "compiled layers: 0.67 x as fast") in caplog.text


async def test_int8_is_near_enough_says_so_and_gives_a_pair_the_same_bits_in_any_batch(checkpoint: Path) -> None:
    wanted = padded_scores(checkpoint, joined(GROUPS), torch.float32)
    async with native(checkpoint, quantize="int8") as scorer:
        assert scorer.info.dtype == "int8" and scorer.info.version.endswith("-int8")
        assert scorer.info.canary_error > 1e-3, "that of fp32 or bf16, not of what is served"
        together = await scorer.scores(GROUPS)
        prompt, responses = GROUPS[0]
        alone = [(await scorer.scores([(prompt, [response])])).item() for response in responses]
    assert together.tolist() == alone
    assert 1e-5 < (together - wanted).abs().max() < 0.2 * wanted.std()


async def test_fp8_is_near_enough_and_leaves_the_first_and_the_last_layer_as_they_are(tmp_path: Path, caplog) -> None:
    save_checkpoint(tmp_path, num_hidden_layers=4)
    wanted = padded_scores(tmp_path, joined(GROUPS), torch.float32)
    async with native(tmp_path, quantize="fp8") as scorer:
        assert scorer.info.dtype == "fp8" and scorer.info.version.endswith("-fp8")
        assert "fp8 on a CPU is slower" in caplog.text
        layers = scorer.engine._loop._loaded.model.backbone.decoder_layers
        assert [any(isinstance(m, Fp8Linear) for m in layer.modules()) for layer in layers] == [
            False,
            True,
            True,
            False,
        ]
        together = await scorer.scores(GROUPS)
        prompt, responses = GROUPS[0]
        alone = [(await scorer.scores([(prompt, [response])])).item() for response in responses]
    assert together.tolist() == alone
    assert 1e-5 < (together - wanted).abs().max() < 0.2 * wanted.std()


async def test_int8_refuses_what_cannot_be_packed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "falcon")
    with pytest.raises(LoadFailed, match="quantize = int8 is for packed models, and "):
        async with native(tmp_path, quantize="int8"):
            pass


async def test_int8_refuses_another_precision_beside_it(checkpoint: Path) -> None:
    with pytest.raises(LoadFailed, match="quantize = int8 runs in bfloat16, not float32"):
        async with native(checkpoint, quantize="int8", dtype="float32"):
            pass


@pytest.mark.skipif(bool(not_built), reason=not_built)
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_neox"])
async def test_a_bf16_model_runs_on_products_built_for_this_cpu_and_hands_on_what_they_give_in_fp32(
    tmp_path: Path, family: str
) -> None:
    """In every layer; those with torch's LayerNorm too, which does not take hidden states in fp32 as it is."""
    save_checkpoint(tmp_path, family, torch.bfloat16)
    async with native(tmp_path) as scorer:
        backbone = scorer.engine._loop._loaded.model.backbone
        assert backbone.residual_in_fp32
        for layer in backbone.decoder_layers:
            kinds = {type(module) for module in layer.modules()}
            assert Avx512Linear in kinds and nn.Linear not in kinds and PrepackedLinear not in kinds
            assert (Avx512GatedMLP in kinds) == (family != "gpt_neox")


@pytest.mark.skipif(bool(not_built), reason=not_built)
async def test_a_bf16_model_without_a_compiler_to_be_used_runs_on_the_products_of_the_library(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "qwen3", torch.bfloat16)
    async with native(tmp_path, compile="off") as scorer:
        modules = list(scorer.engine._loop._loaded.model.backbone.module.modules())
        assert scorer.info.path == "packed"
        assert any(isinstance(module, PrepackedLinear) for module in modules)
        assert not any(isinstance(module, Avx512Linear) for module in modules)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gpt_oss", "stablelm", "gpt_neox"])
async def test_a_bf16_model_refreshed_in_place_has_the_bits_of_one_loaded_anew(tmp_path: Path, family: str) -> None:
    """Stored in fp32, with biases and norms (of stablelm) that rounding changes."""
    old, new = tmp_path / "old", tmp_path / "new"
    options = {"use_qkv_bias": True} if family == "stablelm" else {}
    save_checkpoint(old, family, **options)
    save_checkpoint(new, family, **options)
    torch.manual_seed(1)
    weights = {name: 1.25 * tensor + 0.01 * torch.randn(tensor.shape) for name, tensor in weights_of(new).items()}
    save_file(weights, new / "model.safetensors", {"format": "pt"})
    async with native(new, dtype="bfloat16") as scorer:
        wanted = await scorer.scores(GROUPS)
    async with native(old, dtype="bfloat16") as scorer:
        before = await scorer.scores(GROUPS)
        parts = {type(module) for module in scorer.engine._loop._loaded.model.backbone.module.modules()}
        assert bool(not_built) or Avx512Linear in parts
        await scorer.engine.update_weights(str(new))
        assert torch.equal(await scorer.scores(GROUPS), wanted)
    assert not torch.allclose(before, wanted, rtol=0.05)


async def test_experts_before_dense_layers_do_not_get_hidden_states_that_they_cannot_take(tmp_path: Path) -> None:
    """The last two layers, which are tried, take them."""
    save_checkpoint(tmp_path, "qwen3_moe", torch.bfloat16, mlp_only_layers=[1, 2])
    wanted = padded_scores(tmp_path, joined(GROUPS), torch.float32)
    async with native(tmp_path) as scorer:
        assert scorer.info.path == "packed"
        assert (await scorer.scores(GROUPS) - wanted).abs().max() < 0.1 * wanted.std()


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "gemma2"])
async def test_a_bf16_model_that_falls_back_is_as_exact_as_one_that_was_never_packed(
    tmp_path: Path, family: str
) -> None:
    save_checkpoint(tmp_path, family, torch.bfloat16)
    rows = joined(GROUPS)
    wanted = padded_scores(tmp_path, rows, torch.float32)
    errors = []
    for path in ("padded", "packed"):
        loaded = load_runner(NativeOptions(str(tmp_path), path=path, prefix_cache_bytes=16 << 20))
        model = loaded.fall_back("to try it").model if path == "packed" else loaded.model
        with torch.inference_mode():
            got = model.features_padded([torch.tensor(row) for row in rows], [[len(row) - 1] for row in rows])
        errors.append((got[:, 0] - wanted).abs().max() / wanted.abs().max())
    assert errors[1] <= 2 * errors[0], "in fp32 between layers it rounds less"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_our_kernels_torch_computes_all(tmp_path: Path, dtype: torch.dtype) -> None:
    save_checkpoint(tmp_path, dtype=dtype)
    loaded = load_runner(NativeOptions(str(tmp_path), num_threads=2, prefix_cache_bytes=16 << 20, own_kernels=False))
    backbone = loaded.model.backbone
    assert loaded.info.path == "packed" and backbone.attention is chunked
    ours = [module for module in backbone.module.modules() if type(module).__module__.startswith("rewardserve_kernels")]
    assert not ours
