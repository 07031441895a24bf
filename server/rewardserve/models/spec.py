"""What a checkpoint's files say before any weight is read: which backbone, which head, how long an input may be."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from rewardserve.errors import LoadFailed

HEAD_WEIGHT, HEAD_BIAS = "score.weight", "score.bias"
HEAD_LIKE = (
    "score",
    "classifier",
    "v_head",
    "value_head",
    "regression",
    "reward_head",
    "rm_head",
    "out_proj",
    "lm_head",
)
TEXT_FILES = (
    "config.json",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "*.model",
)
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SAMPLES_PER_FILE, SAMPLE_BYTES = 256, 65_536


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A checkpoint that can be served: a `*ForSequenceClassification` decoder with one label."""

    folder: Path
    config: PreTrainedConfig
    architecture: str
    weight_files: tuple[Path, ...]
    head_weight: torch.Tensor  # [1, hidden_size] fp32
    head_bias: torch.Tensor | None  # [1] fp32
    stored_dtype: torch.dtype
    max_length: int
    version: str


def resolve_folder(source: str) -> Path:
    """The local folder of `source`, a path or a hub name (downloaded, or found in the local hub cache)."""
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise LoadFailed(f"{source}: no such folder, and not a hub name of the form 'organisation/model'")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise LoadFailed(f"{source}: not a local folder, and the hub could not provide it: {reason}") from error


def read_spec(source: str, any_quantization: bool = False) -> ModelSpec:
    """Raises LoadFailed, saying what is missing, if `source` is not a checkpoint that can be served.

    `any_quantization`: also one that transformers does not know.
    """
    folder = resolve_folder(source)
    config = _read_config(folder)
    if not any_quantization:
        _check_quantization(folder, config)
    files = _weight_files(folder)
    where = {key: file for file in files for key in _keys(file)}
    head_weight, head_bias, stored_dtype = _read_head(where, config, folder)
    return ModelSpec(
        folder=folder,
        config=config,
        architecture=(config.architectures or [type(config).__name__])[0],
        weight_files=files,
        head_weight=head_weight,
        head_bias=head_bias,
        stored_dtype=stored_dtype,
        max_length=_max_length(config),
        version=fingerprint(folder, files),
    )


def _read_config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise LoadFailed(f"{folder}: no config.json; point at the folder that holds a checkpoint's files")
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=False
        )  # said, or transformers asks on the terminal
    except Exception as error:  # a config can be wrong in as many ways as it has keys
        raise LoadFailed(f"{folder}/config.json: {first_line(error)}") from error
    if config.is_encoder_decoder:
        raise LoadFailed(f"{folder}: an encoder-decoder model; only decoders with a scalar head can be served")
    return config


def _check_quantization(folder: Path, config: PreTrainedConfig) -> None:
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method is not None and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise LoadFailed(
            f"{folder}/config.json: quantization method '{method}' is unknown; its weights would be misread"
        )


def _weight_files(folder: Path) -> tuple[Path, ...]:
    index = folder / "model.safetensors.index.json"
    names = _read_index(index) if index.is_file() else ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        others = ", ".join(sorted(p.name for p in folder.iterdir())[:20])
        raise LoadFailed(
            f"{folder}: {', '.join(missing)} not there (safetensors are needed; the folder holds: {others})"
        )
    return tuple(folder / name for name in names)


def _read_index(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_text())["weight_map"].values()
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("weight_map names no files")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadFailed(f"{index}: not an index of weights ({first_line(error)})") from error
    return sorted(set(names))


def first_line(error: Exception) -> str:
    """An error of a library in one line; its kind says more than its text sometimes."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except Exception as error:  # safetensors raises its own SafetensorError, an Exception
        raise LoadFailed(f"{file}: not a readable safetensors file ({error}); is the download complete?") from error


def _read_head(
    where: dict[str, Path], config: PreTrainedConfig, folder: Path
) -> tuple[torch.Tensor, torch.Tensor | None, torch.dtype]:
    if HEAD_WEIGHT not in where:
        found = [key for key in where if any(part in key for part in HEAD_LIKE)] or list(where)[-5:]
        raise LoadFailed(
            f"{folder}: the scalar head '{HEAD_WEIGHT}' is not among the weights, so scores would be random. "
            f"Keys that could be a head: {', '.join(sorted(found)[:10])}"
        )
    weight = _tensor(where, HEAD_WEIGHT)
    hidden_size = config.get_text_config().hidden_size
    if tuple(weight.shape) != (1, hidden_size):
        raise LoadFailed(
            f"{folder}: the head '{HEAD_WEIGHT}' has shape {tuple(weight.shape)}, not (1, {hidden_size}): "
            f"one label on hidden states of size {hidden_size} is what can be served"
        )
    bias = _tensor(where, HEAD_BIAS) if HEAD_BIAS in where else None
    if bias is not None and tuple(bias.shape) != (1,):
        raise LoadFailed(f"{folder}: the head's '{HEAD_BIAS}' has shape {tuple(bias.shape)}, not (1,)")
    return weight.float(), None if bias is None else bias.float(), _stored_dtype(where)


def _tensor(where: dict[str, Path], key: str) -> torch.Tensor:
    with safe_open(where[key], framework="pt") as tensors:
        return tensors.get_tensor(key)


def _stored_dtype(where: dict[str, Path]) -> torch.dtype:
    """The precision of the backbone's first weight matrix; a head is often kept in another one."""
    key = next((k for k in sorted(where) if k.endswith("weight") and k != HEAD_WEIGHT), HEAD_WEIGHT)
    with safe_open(where[key], framework="pt") as tensors:
        return STORED_DTYPES.get(tensors.get_slice(key).get_dtype(), torch.float32)


def _max_length(config: PreTrainedConfig) -> int:
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "seq_length"):
        if getattr(text, name, None):
            return int(getattr(text, name))
    return 2048  # bloom and falcon have no limit of their own (ALiBi)


def fingerprint(folder: Path, files: tuple[Path, ...]) -> str:
    """Names a version by content: config, tokenizer and template, every weight file's size, and 256 samples of 64 KiB
    spread over each.

    Sampled, because hashing 140 GB whole would take longer than loading it; files under 16 MiB are read whole.
    """
    digest = hashlib.blake2b(digest_size=6)
    for pattern in TEXT_FILES:
        for file in sorted(folder.glob(pattern)):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        step = max(SAMPLE_BYTES, size // SAMPLES_PER_FILE)
        with file.open("rb") as stream:
            for offset in range(0, size, step):
                stream.seek(offset)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
