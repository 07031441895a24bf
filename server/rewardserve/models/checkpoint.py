"""A checkpoint's files: its config, which weights there are, and single tensors of them."""

import copy
import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig

from rewardserve.errors import LoadFailed
from rewardserve.models import adapter, adapter_config
from rewardserve.models.adapter import Changes
from rewardserve.models.json_file import read_object
from rewardserve.models.source import check_source

STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# In the order in which transformers, which reads the backbone, looks for them: of two, one was left behind
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SPEC_FILE = "rewardserve.toml"  # says how a model is scored, where its other files do not
VALUE_HEADS = (
    "value_head.safetensors",
    "value_head.bin",
)  # of TRL and LLaMA-Factory, beside a language model
# What a head is called before `.weight` or `.0.weight`; where there are several, the first of these
HEAD_NAMES = (
    "score",
    "classifier",
    "v_head.summary",
    "v_head",
    "value_head",
    "regression_head",
    "score_head",
    "rm_head",
    "reward_head",
    "out_proj",
)
EMBEDDINGS = re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|wte|word_embeddings)\.weight$")  # of tokens
PATTERNS = ["*.json", "*.safetensors", "*.bin", "*.jinja", "*.model", "*.txt", "*.toml"]


def resolve_folder(source: str) -> Path:
    """The local folder of `source`, a path or a hub name (downloaded, or found in the local hub cache)."""
    check_source(source)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=PATTERNS))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise LoadFailed(f"{source}: not a local folder, and the hub could not provide it: {reason}") from error


@dataclass(frozen=True)
class Checkpoint:
    source: str  # as it was asked for: a path or a hub name
    folder: Path
    raw_config: dict[str, Any]  # config.json as it stands
    config: PreTrainedConfig  # of the backbone
    where: dict[str, Path]  # file of each weight
    base: "Checkpoint | None" = None  # what an adapter adapts
    changes: Changes = field(default_factory=Changes)  # of the base, by the adapter
    _kept: dict[Path, Any] = field(default_factory=dict, init=False, repr=False, compare=False)  # files that are open

    @property
    def text_folder(self) -> Path:
        """Where its tokenizer is: an adapter's folder may have none."""
        has_tokenizer = any(file.is_file() for file in self.folder.glob("tokenizer*"))
        return self.folder if has_tokenizer or self.base is None else self.base.text_folder

    @property
    def spec_file(self) -> Path | None:
        """What says how it is scored, where one lies there. An adapter without one is scored as its base is, unless it
        brings a head of its own. Raises LoadFailed where that cannot be told: its base's head was trained on.
        """
        own = self.folder / SPEC_FILE
        if own.is_file():
            return own
        told = None if self.base is None else self.base.spec_file
        heads = [key for key in self.changes.whole if _is_of_head(key)]
        if told is None or self.base is None or not heads:
            return told
        if trained_on := [key for key in heads if self.base.has(key)]:
            raise LoadFailed(
                f"{self.folder}: brings '{trained_on[0]}', and {told} says how its base's is read: put a {SPEC_FILE} "
                "beside adapter_config.json, a copy if it was trained to be read so too"
            )
        return None

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.folder,) if self.base is None else (*self.base.folders, self.folder)

    @property
    def architecture(self) -> str:
        return (self.raw_config.get("architectures") or [type(self.config).__name__])[0]

    @property
    def hidden_size(self) -> int:
        return self.config.get_text_config().hidden_size

    @property
    def weight_files(self) -> tuple[Path, ...]:
        return tuple(sorted(set(self.where.values())))

    def has(self, key: str) -> bool:
        return key in self.where

    def tensor(self, key: str) -> torch.Tensor:
        """As an adapter makes it of its base's, where there is one. Raises LoadFailed for a weight in 8 bits."""
        if self.base is not None:
            brought, delta = self.changes.whole.get(key), self.changes.deltas.get(key)
            tensor = self.base.tensor(key) if brought is None else brought
            return tensor if delta is None else delta.merged_into(tensor)
        file = self.where[key]
        if file.suffix != ".safetensors":
            tensor = self._pickled[file][key]
        else:
            with self._opened(file) as tensors:
                tensor = tensors.get_tensor(key)
        if key.endswith("weight") and tensor.dtype.itemsize == 1:
            raise LoadFailed(
                f"{self.folder}: '{key}' is stored in 8 bits, whose scale is not applied here; leave it out when the "
                "model is quantized"
            )
        return tensor

    def shape(self, key: str) -> tuple[int, ...]:
        if key in self.changes.whole:
            return tuple(self.changes.whole[key].shape)
        if self.base is not None:
            return self.base.shape(key)
        file = self.where[key]
        if file.suffix != ".safetensors":
            return tuple(self._pickled[file][key].shape)
        with self._opened(file) as tensors:
            return tuple(tensors.get_slice(key).get_shape())

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        """Within it a file is opened once, not for every tensor: a mixture has tens of thousands."""
        if self.base is not None:  # whose files they are; what an adapter brings is in memory
            with self.base.kept_open():
                yield
            return
        with ExitStack() as files:
            for file in self.weight_files:
                if file.suffix == ".safetensors":
                    self._kept[file] = files.enter_context(safe_open(file, framework="pt"))
            try:
                yield
            finally:
                self._kept.clear()

    def _opened(self, file: Path) -> AbstractContextManager[Any]:
        return nullcontext(self._kept[file]) if file in self._kept else safe_open(file, framework="pt")

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Those below `prefix`, without it."""
        return {key.removeprefix(prefix): self.tensor(key) for key in self.where if key.startswith(prefix)}

    def stored_dtype(self, besides: frozenset[str]) -> torch.dtype:
        """The precision of the backbone's first weight matrix; a head is often kept in another one."""
        if self.base is not None:
            return self.base.stored_dtype(besides)
        key = next((k for k in sorted(self.where) if k.endswith("weight") and k not in besides), None)
        if key is None:
            return torch.float32
        file = self.where[key]
        if file.suffix != ".safetensors":
            return self._pickled[file][key].dtype
        with safe_open(file, framework="pt") as tensors:
            return STORED_DTYPES.get(tensors.get_slice(key).get_dtype(), torch.float32)

    def token_id(self, content: str, otherwise: int) -> int:
        """The id of a token of its own, by the tokenizer's files; `otherwise` where they do not say."""
        for name in ("tokenizer.json", "tokenizer_config.json"):
            try:
                saved = json.loads((self.text_folder / name).read_bytes())
            except (OSError, ValueError):
                continue
            added = saved.get("added_tokens") or []
            added += [{"id": int(i), **t} for i, t in (saved.get("added_tokens_decoder") or {}).items()]
            for token in added:
                if token.get("content") == content:
                    return int(token["id"])
            vocab = (saved.get("model") or {}).get("vocab")
            if isinstance(vocab, dict) and content in vocab:
                return int(vocab[content])
        return otherwise

    @cached_property
    def _pickled(self) -> dict[Path, dict[str, torch.Tensor]]:
        """Contents of torch's own files, mapped into memory. Only tensors are unpickled, never code."""
        return {file: _unpickle(file) for file in self.weight_files if file.suffix != ".safetensors"}


def open_checkpoint(source: str, foreign_configs: dict[str, str]) -> Checkpoint:
    """`foreign_configs`: model types that transformers does not know -> the one that they are but for names.

    Raises LoadFailed, saying what is missing.
    """
    folder = resolve_folder(source)
    if (folder / adapter_config.CONFIG).is_file():
        return _adapted(source, folder, foreign_configs)
    raw = _raw_config(folder)
    config = _config(folder, raw, foreign_configs)
    where: dict[str, Path] = {}
    for file in _weight_files(folder):
        where |= dict.fromkeys(_keys(file), file)
    return Checkpoint(source, folder, raw, config, where)


def _adapted(source: str, folder: Path, foreign_configs: dict[str, str]) -> Checkpoint:
    config = adapter_config.read_adapter_config(folder)
    base = open_checkpoint(adapter_config.base_of(folder, config), foreign_configs)
    file = adapter.weights_of(folder)
    own = Checkpoint(source, folder, {}, base.config, dict.fromkeys(_keys(file), file))
    weights = {key: own.tensor(key) for key in own.where}
    changes = adapter.changes_of(folder, config, weights, base.where.keys(), base.shape)
    where = dict.fromkeys(changes.keys, file)
    for beside in _heads_beside(folder)[:1]:
        head = Checkpoint(source, folder, {}, base.config, dict.fromkeys(_keys(beside), beside))
        changes.whole.update({key: head.tensor(key) for key in head.where})
        where |= head.where
    kept = base.where
    if any(map(_is_of_head, changes.whole)):  # which takes the place of the base's own
        kept = {key: file for key, file in base.where.items() if not _is_of_head(key)}
    return Checkpoint(source, folder, base.raw_config, _resized(base.config, changes), kept | where, base, changes)


def _heads_beside(folder: Path) -> list[Path]:
    """Files of a value head that lie beside an adapter. TRL calls it as if it were the whole model."""
    found = [folder / name for name in VALUE_HEADS if (folder / name).is_file()]
    whole = folder / "pytorch_model.bin"
    if whole.is_file() and all(key.startswith("v_head.") for key in _keys(whole)):
        found.append(whole)
    return found


def _resized(config: PreTrainedConfig, changes: Changes) -> PreTrainedConfig:
    """With the vocabulary of an embedding that an adapter brings: a token of padding was added to train it, say."""
    brought = [tensor for key, tensor in changes.whole.items() if EMBEDDINGS.search(key)]
    if not brought or len(brought[0]) == config.get_text_config().vocab_size:
        return config
    config = copy.deepcopy(config)
    config.get_text_config().vocab_size = len(brought[0])
    return config


def _is_of_head(key: str) -> bool:
    return key.partition(".")[0] in {name.partition(".")[0] for name in HEAD_NAMES}


def _raw_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise LoadFailed(f"{folder}: no config.json; point at the folder that holds a checkpoint's files")
    raw = read_object(path)
    named = raw.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise LoadFailed(f"{path}: architectures is {named!r}, not a list of names")
    return raw


def _config(folder: Path, raw: dict[str, Any], foreign: dict[str, str]) -> PreTrainedConfig:
    try:
        if raw.get("model_type") in foreign:
            kept = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map")}
            config = AutoConfig.for_model(foreign[raw["model_type"]], **kept)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)  # said, or transformers asks
    except Exception as error:  # a config can be wrong in as many ways as it has keys
        raise LoadFailed(f"{folder}/config.json: {first_line(error)}") from error
    if getattr(config.get_text_config(), "vocab_size", None) is None:
        raise LoadFailed(f"{folder}/config.json: a {config.model_type} has no vocab_size: no token ids to read")
    if config.is_encoder_decoder:
        raise LoadFailed(f"{folder}: an encoder-decoder model; only decoders and encoders with a head can be served")
    return as_trained(config)


def attention_of(config: PreTrainedConfig) -> dict[str, str]:
    """The attention to load with: transformers' choice, except where that would leave out a soft cap of its logits.

    torch's own knows none, and not all of transformers 5 refuses it.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return {"attn_implementation": "eager"} if capped else {}


def as_trained(config: PreTrainedConfig) -> PreTrainedConfig:
    """With what its file calls by another name, and not all of transformers 5 knows.

    The first Gemmas say gelu; they were trained with its approximation, which transformers 4 took in its place.
    """
    if config.model_type == "gemma" and config.hidden_act == "gelu":
        config.hidden_act = getattr(config, "hidden_activation", None) or "gelu_pytorch_tanh"
    return config


def _weight_files(folder: Path) -> list[Path]:
    """Safetensors if there are any, else torch's own; and a value head that lies beside them."""
    first = next((name for name in WEIGHT_FILES if (folder / name).is_file()), WEIGHT_FILES[0])
    names = read_index(folder / first) if first.endswith(".json") else [first]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        others = ", ".join(sorted(p.name for p in folder.iterdir())[:20])
        raise LoadFailed(
            f"{folder}: {', '.join(missing)} not there (safetensors are needed; the folder holds: {others})"
        )
    names += [name for name in VALUE_HEADS if (folder / name).is_file()][:1]
    return [folder / name for name in names]


def read_index(index: Path) -> list[str]:
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise LoadFailed(f"{index}: not an index of weights (weight_map names no files)")
    return sorted(set(named.values()))


def _keys(file: Path) -> list[str]:
    if file.suffix != ".safetensors":
        return list(_unpickle(file))
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except Exception as error:  # safetensors raises its own SafetensorError, an Exception
        raise LoadFailed(f"{file}: not a readable safetensors file ({error}); is the download complete?") from error


def _unpickle(file: Path) -> dict[str, torch.Tensor]:
    try:
        mapped = is_zipfile(file)  # torch's form since 1.6; what is older is read whole
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        return {key: value for key, value in tensors.items() if isinstance(value, torch.Tensor)}
    except Exception as error:  # of pickle, zipfile and torch
        raise LoadFailed(f"{file}: not a readable file of weights ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    """An error of a library in one line; its kind says more than its text sometimes. What it
    announces by a colon is said too."""
    lines = filter(None, map(str.strip, str(error).splitlines()))
    text = next(lines, "")
    if text.endswith(":"):
        text = f"{text} {next(lines, '')}".strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
