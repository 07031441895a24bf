"""A trained model -> a folder that `rewardserve serve` loads as it is, with the figures of its training beside it."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

TEXT_FILES = (
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
FIGURES_FILE = "training.json"


def save_model(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype, text_from: Path, config: PreTrainedConfig
) -> None:
    """Writes the whole model: its backbone in `dtype`, its head in fp32, as serving computes it.

    The tokenizer and chat template are copied from `text_from` byte by byte; of `config`, the base's, comes which token
    pads. Adapters must have been merged. The model is changed by this, and not to be trained on.
    """
    model.to(dtype)
    model.score.float()
    model.config.get_text_config().pad_token_id = config.get_text_config().pad_token_id  # it was another for a while
    for name in ("mean", "std"):  # of the base's scores; a head that was trained gives others
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
    copy_text(text_from, folder)


def copy_text(source: Path, folder: Path) -> None:
    for pattern in TEXT_FILES:
        for file in filter(Path.is_file, source.glob(pattern)):
            shutil.copyfile(file, folder / file.name)


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Writes what differs from the base: the adapters and the head, in PEFT's format. `model` is a PeftModel.

    `base` is what adapter_config.json says they belong to.
    """
    for config in model.peft_config.values():
        config.inference_mode = True
    model.save_pretrained(folder, save_embedding_layers=False)  # said, or PEFT asks the hub whether they are the base's
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form of a model card, with nothing filled in
    _finish_config(folder / "adapter_config.json", base)
    for name in ADAPTER_FILES:
        (folder / name).chmod(0o644)


def _finish_config(file: Path, base: str) -> None:
    """Names the base, and puts all in order, for the same adapter to be the same file: PEFT's sets have none."""
    values = {**json.loads(file.read_text(encoding="utf-8")), "base_model_name_or_path": base}
    ordered = {key: sorted(value) if isinstance(value, list) else value for key, value in sorted(values.items())}
    file.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")


def save_figures(folder: Path, figures: dict[str, Any]) -> None:
    """Written last: a folder that has them is complete."""
    text = json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False)
    temporary = folder / f"{FIGURES_FILE}.tmp"
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(folder / FIGURES_FILE)


def read_figures(folder: Path) -> dict[str, Any] | None:
    """None where training was not brought to its end."""
    file = folder / FIGURES_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
