"""What a PEFT adapter's config says, and which model it adapts. Loads no torch: the front asks, too."""

from pathlib import Path
from typing import Any

from rewardserve.errors import LoadFailed
from rewardserve.models.json_file import read_object

CONFIG = "adapter_config.json"
# Options of PEFT that change what a layer computes in a way that is not known here
NOT_KNOWN = (
    "lora_bias",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "layer_replication",
)
# Values of init_lora_weights, or how they begin, by which PEFT changes the base's weights too, also when it loads
CHANGING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Raises LoadFailed for what cannot be served."""
    path = folder / CONFIG
    config = read_object(path)
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        raise LoadFailed(f"{path}: peft_type is '{kind}'; LORA is what can be served, merge others first")
    if asked := [name for name in NOT_KNOWN if config.get(name)]:
        raise LoadFailed(f"{path}: {', '.join(asked)} cannot be merged here; merge it with PEFT first")
    how = config.get("init_lora_weights")
    if isinstance(how, str) and how.lower().startswith(CHANGING_THE_BASE):
        raise LoadFailed(
            f"{path}: init_lora_weights is '{how}', which changes the base's weights as well; save the adapter with "
            "PEFT's path_initial_model_for_weight_conversion, or merge it with PEFT first"
        )
    if not config.get("base_model_name_or_path"):
        raise LoadFailed(f"{path}: base_model_name_or_path is missing; it names the model to adapt")
    return config


def base_of(folder: Path, config: dict[str, Any]) -> str:
    """A path beside the adapter, any other path, or a hub name."""
    base = str(config["base_model_name_or_path"])
    beside = folder / base
    return str(beside.resolve()) if beside.is_dir() else base
