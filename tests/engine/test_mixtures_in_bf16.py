"""Which experts a token is sent to hangs on roundings, and does not decide how a mixture is served."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import adapter_of, save_adapter
from built import why_not
from checkpoints import save_checkpoint
from rewardserve.engine.native import load, speed_up
from rewardserve.engine.native.options import NativeOptions
from rewardserve.engine.native.speed_up import Subject, _of_every_kind
from rewardserve_kernels.attention import avx512 as attention
from rewardserve_kernels.linear import avx512
from rewardserve_kernels.linear.avx512 import Avx512Linear
from safetensors.torch import load_file
from torch import nn

not_built = why_not(attention.load) or why_not(avx512.load)


@pytest.fixture
def subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """A mixture on its packed path, none of whose parts has been exchanged."""
    subjects: list[Subject] = []
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(load, "speed_up", lambda subject, *_: subjects.append(subject))
        load.load_runner(NativeOptions(str(checkpoint(tmp_path)), num_threads=2, prefix_cache_bytes=16 << 20))
    return subjects[0]


def checkpoint(folder: Path) -> Path:
    """Whose many small weights of experts lie near one another."""
    save_checkpoint(folder, "gpt_oss", torch.bfloat16, num_hidden_layers=4, num_local_experts=32, num_experts_per_tok=4)
    return folder


def test_roundings_alone_are_more_than_the_canary_bears_and_are_told_from_a_mistake(subject: Subject) -> None:
    assert subject.canary.run(subject.model)[1] > subject.tolerance
    assert subject.flaw() is None
    sinks = [module.sinks for module in subject.model.backbone.module.modules() if hasattr(module, "sinks")]
    for each in sinks:
        each.data.zero_()
    flaw = subject.flaw()
    assert flaw is not None and flaw.startswith("it differs by")


def test_experts_that_give_no_number_are_a_mistake_though_a_fixed_routing_passes_them_by(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    for experts in subject.model.backbone.module.modules():
        if type(experts).__name__.endswith("Experts"):
            experts.down_proj.data[8:] = float("nan")
    assert subject.flaw() is not None
    monkeypatch.setattr(subject.model.backbone, "set_compiled", lambda compiled: None)
    assert speed_up._compile(subject) is not None


def test_routers_that_choose_the_wrong_experts_are_a_mistake_though_a_fixed_routing_hides_it(subject: Subject) -> None:
    for router in subject.model.backbone.module.modules():
        if type(router).__name__.endswith("Router"):
            for parameter in router.parameters():
                parameter.data = parameter.data.roll(1, 0)
    assert subject.flaw() is not None


def test_the_canary_leaves_no_hook_behind(subject: Subject) -> None:
    subject.flaw()
    assert not any(module._forward_pre_hooks for module in subject.model.backbone.module.modules())


def test_adapters_of_a_mixture_share_it_whatever_roundings_do_to_their_routing(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    for name in ("x", "y"):
        tensors = adapter_of(weights, targets=("layers.0.self_attn.q_proj", "layers.1.self_attn.o_proj"), seed=name)
        save_adapter(tmp_path / name, base, tensors)
    loaded = load.load_runner(
        NativeOptions(str(tmp_path / "x"), beside=(str(tmp_path / "y"),), num_threads=2, prefix_cache_bytes=16 << 20)
    )
    assert loaded.info.path == "packed" and len(loaded.model.heads) == 2


def test_layers_that_are_compiled_never_run_with_a_fixed_routing(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, compiled, seen = subject.model.backbone, [], []
    for layer in backbone.decoder_layers:
        monkeypatch.setattr(getattr(layer, "layer", layer), "compile", lambda **_: compiled.append(True))
    backbone.set_compiled(True)
    run_packed = backbone.run_packed

    def looking(*arguments: Any) -> torch.Tensor:
        fixed = any(module._forward_pre_hooks for module in backbone.module.modules())
        seen.append((fixed, backbone._compiled))
        return run_packed(*arguments)

    monkeypatch.setattr(backbone, "run_packed", looking)
    subject.canary.differs_by(subject.model, subject.tolerance)
    assert set(seen) == {(False, True), (True, False)}
    assert backbone._compiled and len(compiled) == 2 * len(backbone.decoder_layers)


@pytest.mark.skipif(bool(not_built), reason=not_built)
def test_it_runs_on_what_is_built_for_this_cpu(tmp_path: Path) -> None:
    loaded = load.load_runner(
        NativeOptions(str(checkpoint(tmp_path)), num_threads=2, prefix_cache_bytes=16 << 20, compile="auto")
    )
    assert loaded.info.path == "packed"
    assert loaded.model.backbone.attention is attention
    for layer in loaded.model.backbone.decoder_layers:
        kinds = {type(module) for module in layer.modules()}
        assert Avx512Linear in kinds and nn.Linear not in kinds


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])  # with routers in bf16, and in fp32
def test_its_routers_get_what_layers_hand_on_in_bf16(tmp_path: Path, family: str) -> None:
    save_checkpoint(tmp_path, family, torch.bfloat16)
    loaded = load.load_runner(NativeOptions(str(tmp_path), num_threads=2, prefix_cache_bytes=16 << 20))
    assert loaded.info.path == "packed" and not loaded.model.backbone.residual_in_fp32


@pytest.mark.parametrize(
    ("kinds", "on_trial"),
    [
        ("", []),
        ("a", [0]),
        ("aaaa", [2, 3]),
        ("dmmmmm", [0, 1, 4, 5]),  # dense, then a mixture
        ("ddmmmm", [0, 1, 2, 4, 5]),
        ("abababab", [5, 6, 7]),
        ("ab", [0, 1]),
    ],
)
def test_layers_on_trial_are_the_last_neighbours_of_every_two_kinds(kinds: str, on_trial: list[int]) -> None:
    assert _of_every_kind(kinds) == on_trial
