"""A PEFT adapter's folder -> the checkpoint it makes of its base model: LoRA merged in, heads of its own put in."""

import json
import math
import re
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import torch

from rewardserve.errors import LoadFailed

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Options of PEFT that change what a layer computes in a way that is not merged here
NOT_MERGED = ("use_dora", "lora_bias", "alora_invocation_tokens", "trainable_token_indices", "alpha_pattern")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Raises LoadFailed for what cannot be merged."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise LoadFailed(f"{path}: {error}") from error
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        raise LoadFailed(f"{path}: peft_type is '{kind}'; LORA is what can be served, merge others first")
    if asked := [name for name in NOT_MERGED if config.get(name)]:
        raise LoadFailed(f"{path}: {', '.join(asked)} cannot be merged here; merge it with PEFT first")
    if not config.get("base_model_name_or_path"):
        raise LoadFailed(f"{path}: base_model_name_or_path is missing; it names the model to adapt")
    return config


def base_of(folder: Path, config: dict[str, Any]) -> str:
    """A path beside the adapter, any other path, or a hub name."""
    base = str(config["base_model_name_or_path"])
    beside = folder / base
    return str(beside.resolve()) if beside.is_dir() else base


def weights_of(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise LoadFailed(f"{folder}: neither {' nor '.join(WEIGHTS)} is there; is the download complete?")


def merged(
    folder: Path,
    config: dict[str, Any],
    adapter: dict[str, torch.Tensor],
    base_keys: Set[str],
    base: Callable[[str], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Weights that differ from the base's, by their names there, and those that it does not have; those merged in fp32.

    W + scale * B A, scale = alpha / r (Hu et al. 2021, arXiv:2106.09685, section 4.1), or alpha / sqrt(r) with rslora
    (Kalajdzievski 2023, arXiv:2312.03732). `base_keys` are the base's weights, `base` gives one. Raises LoadFailed.
    """
    changed: dict[str, torch.Tensor] = {}
    for key, tensor in adapter.items():
        name = re.sub(r"^(?:base_model\.)?model\.", "", key, count=1)
        if name.endswith(".lora_A.weight"):
            target = name.removesuffix(".lora_A.weight") + ".weight"
            other = adapter.get(key.replace(".lora_A.", ".lora_B."))
            if other is None or target not in base_keys:
                raise LoadFailed(f"{folder}: '{key}' has no counterpart, or the base model has no '{target}'")
            rank, alpha = len(tensor), float(config.get("lora_alpha", len(tensor)))
            delta = (other.float() @ tensor.float()) * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            if config.get("fan_in_fan_out"):
                delta = delta.T
            weight = base(target)
            if delta.shape != weight.shape:
                raise LoadFailed(f"{folder}: '{key}' is for {tuple(delta.shape)}, '{target}' is {tuple(weight.shape)}")
            changed[target] = weight.float() + delta
        elif ".lora_" in name:
            if not name.endswith(".lora_B.weight"):
                raise LoadFailed(f"{folder}: '{key}' is of a kind that is not merged here; merge it with PEFT first")
        elif "original_module" not in name:  # what was trained whole: modules_to_save
            changed[re.sub(r"\.modules_to_save(\.default)?\.", ".", name)] = tensor
    return changed
