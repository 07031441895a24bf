"""LoRA adapters in PEFT's layout, with heads of their own, and the same merged by hand."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoints import save_checkpoint
from safetensors.torch import load_file, save_file

HIDDEN, RANK, ALPHA = 64, 4, 8
TARGETS = ("layers.0.self_attn.q_proj", "layers.2.mlp.up_proj", "layers.1.mlp.down_proj")


def save_adapter(folder: Path, base: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    told = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": RANK, "lora_alpha": ALPHA, **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    save_file(tensors, folder / "adapter_model.safetensors")


def adapter_of(
    base: dict[str, torch.Tensor],
    head: str = "base_model.model.score.weight",
    targets: Sequence[str] = TARGETS,
    rank: int = RANK,
    seed: str = "",
) -> dict[str, torch.Tensor]:
    """Random, and large enough to matter; other numbers for another `seed`."""
    torch.manual_seed(zlib.crc32(seed.encode()))
    tensors = {head: torch.randn(1, HIDDEN)}
    for target in targets:
        out_size, in_size = base[f"model.{target}.weight"].shape
        tensors[f"base_model.model.model.{target}.lora_A.weight"] = torch.randn(rank, in_size) * 0.1
        tensors[f"base_model.model.model.{target}.lora_B.weight"] = torch.randn(out_size, rank) * 0.1
    return tensors


def merged_by_hand(base: Path, tensors: dict[str, torch.Tensor], scale: float, folder: Path) -> Path:
    save_checkpoint(folder)
    weights = load_file(base / "model.safetensors")
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            target = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
            weights[target] = weights[target] + scale * (tensors[key.replace("lora_A", "lora_B")] @ down)
    weights["score.weight"] = next(tensor for key, tensor in tensors.items() if "score" in key)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
