"""The models that the gate's third part is about: one as it is served, and small ones with other heads."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from adapters import TARGETS, adapter_of, save_adapter
from checkpoints import save_checkpoint
from part import Part
from safetensors.torch import load_file, save_file
from served import TINY, made_model


def served(part: Part) -> AbstractContextManager[str]:
    return made_model(part, TINY if part.tiny else "qwen3-0.6b")


@contextlib.contextmanager
def means(part: Part) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield str(reads_means(Path(folder))[0])


@contextlib.contextmanager
def layered(part: Part) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), dtype=torch.bfloat16)
        weights = load_file(Path(folder) / "model.safetensors")
        last = weights.pop("score.weight")
        weights |= {"score.2.weight": last, "score.2.bias": last[:, 0].clone(), "score.0.bias": last[0].clone()}
        weights["score.0.weight"] = torch.randn(last.shape[1], last.shape[1]).bfloat16() / 8
        save_file(weights, Path(folder) / "model.safetensors")
        yield folder


def reads_means(folder: Path) -> list[Path]:
    """As OpenAssistant's Pythia: its config says so. A rewardserve.toml is read by what a bare machine has not."""
    made = folder / "mean"
    save_checkpoint(made, "gpt_neox", dtype=torch.bfloat16)
    config = json.loads((made / "config.json").read_text())
    said = {"model_type": "gpt_neox_reward_model", "architectures": ["GPTNeoXRewardModel"], "pooling": "mean"}
    (made / "config.json").write_text(json.dumps(config | said))
    weights = load_file(made / "model.safetensors")
    weights["out_proj.weight"] = weights.pop("score.weight")
    save_file(weights, made / "model.safetensors")
    return [made]


def over_one_backbone(folder: Path) -> list[Path]:
    save_checkpoint(folder / "base", dtype=torch.bfloat16)
    weights = load_file(folder / "base" / "model.safetensors")
    adapters = {"lora": TARGETS, "other": TARGETS[1:], "head": ()}
    for name, targets in adapters.items():
        save_adapter(folder / name, folder / "base", adapter_of(weights, targets=targets, seed=name))
    return [folder / name for name in adapters]
