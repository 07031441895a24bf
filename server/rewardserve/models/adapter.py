"""A PEFT adapter's folder -> what it changes of its base model: what LoRA adds to weights, and weights of its own."""

import math
import re
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rewardserve.errors import LoadFailed

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
NORMS = "lora_magnitude_vector"


def weights_of(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise LoadFailed(f"{folder}: neither {' nor '.join(WEIGHTS)} is there; is the download complete?")


@dataclass(frozen=True, slots=True)
class Delta:
    """What LoRA adds to a weight [out, in]: up @ down, both fp32."""

    down: torch.Tensor  # [rank, in]
    up: torch.Tensor  # [out, rank], scaled
    transposed: bool  # the weight is stored as [in, out]
    norms: torch.Tensor | None = None  # [out], that the sum's rows are given: DoRA

    def merged_into(self, weight: torch.Tensor) -> torch.Tensor:
        """In fp32."""
        merged = (weight.float().T if self.transposed else weight.float()) + self.up @ self.down
        if self.norms is not None:
            merged *= (self.norms / merged.norm(dim=1))[:, None]
        return merged.T if self.transposed else merged


@dataclass(frozen=True, slots=True)
class Changes:
    """By the names of the base's weights."""

    deltas: dict[str, Delta] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)  # trained whole, or not there in the base

    @property
    def keys(self) -> Set[str]:
        return self.deltas.keys() | self.whole.keys()


def changes_of(
    folder: Path,
    config: dict[str, Any],
    adapter: dict[str, torch.Tensor],
    base_keys: Set[str],
    base_shape: Callable[[str], tuple[int, ...]],
) -> Changes:
    """W + scale * B A, scale = alpha / r (Hu et al. 2021, arXiv:2106.09685, section 4.1), or alpha / sqrt(r) with
    rslora (Kalajdzievski 2023, arXiv:2312.03732); with DoRA its rows are given the norms that were trained (Liu et al.
    2024, arXiv:2402.09353, equation 5). `base_keys` are the base's weights. Raises LoadFailed.
    """
    changes = Changes()
    for key, tensor in adapter.items():
        name = re.sub(r"^(?:base_model\.)?model\.", "", key, count=1)
        if name.endswith(".lora_A.weight"):
            target = name.removesuffix(".lora_A.weight") + ".weight"
            other = adapter.get(key.replace(".lora_A.", ".lora_B."))
            if other is None or target not in base_keys:
                raise LoadFailed(f"{folder}: '{key}' has no counterpart, or the base model has no '{target}'")
            rank = len(tensor)
            alpha = _alpha(folder, config, target.removesuffix(".weight"), rank)
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            transposed = bool(config.get("fan_in_fan_out"))
            shape = (len(other), tensor.shape[1])[:: -1 if transposed else 1]
            if shape != base_shape(target):
                raise LoadFailed(f"{folder}: '{key}' is for {shape}, '{target}' is {base_shape(target)}")
            norms = _norms(folder, config, adapter, key, len(other))
            changes.deltas[target] = Delta(tensor.float(), other.float() * scale, transposed, norms)
        elif ".lora_" in name:
            if not name.endswith(".lora_B.weight") and not (config.get("use_dora") and name.endswith(f".{NORMS}")):
                raise LoadFailed(f"{folder}: '{key}' is of a kind that is not merged here; merge it with PEFT first")
        elif "original_module" not in name:  # what was trained whole: modules_to_save, and biases
            name = name.replace(".base_layer.", ".")
            if "layers." in name and re.sub(r"\.modules_to_save(\.default)?\.", ".", name) not in base_keys:
                raise LoadFailed(f"{folder}: '{key}' is of no layer that the base model has")
            changes.whole[re.sub(r"\.modules_to_save(\.default)?\.", ".", name)] = tensor
    return changes


def _norms(
    folder: Path, config: dict[str, Any], adapter: dict[str, torch.Tensor], key: str, num_rows: int
) -> torch.Tensor | None:
    """Those beside the LoRA matrix `key`, of an adapter that was trained with DoRA."""
    if not config.get("use_dora"):
        return None
    norms = adapter.get(key.replace("lora_A.weight", NORMS))
    if norms is None or norms.numel() != num_rows:
        raise LoadFailed(f"{folder}: use_dora, and no {NORMS} of {num_rows} numbers is beside '{key}'")
    return norms.float().flatten()


def _alpha(folder: Path, config: dict[str, Any], layer: str, rank: int) -> float:
    """A layer's own, if a pattern fits it: the first one that, as PEFT has it, is the end of its name from a dot on."""
    try:
        for pattern, alpha in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return float(alpha)
    except (re.error, AttributeError, TypeError, ValueError) as error:
        raise LoadFailed(f"{folder}: alpha_pattern in its adapter_config.json: {error}") from error
    return float(config.get("lora_alpha", rank))
