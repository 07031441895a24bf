"""What a checkpoint's files say before its backbone is read: what it is, how it is scored, how long an input may be."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from rewardserve.errors import LoadFailed
from rewardserve.models.checkpoint import SPEC_FILE, Checkpoint, open_checkpoint
from rewardserve.models.families import FOREIGN_CONFIGS, Recipe, recipe_of

TEXT_FILES = (
    "config.json",
    SPEC_FILE,
    "adapter_config.json",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "*.model",
)
MODELOPT_FILE = "hf_quant_config.json"  # where config.json does not tell of it: vLLM reads it, transformers does not
Stamp: TypeAlias = tuple[int, int, int]  # of a file: which one it is, its size, and when it was written to
SAMPLES_PER_FILE, SAMPLE_BYTES = 256, 65_536
BYTES_OF_EACH_TENSOR = 16_384  # a head's row of 8,192 numbers in 16 bits


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A checkpoint that can be served."""

    checkpoint: Checkpoint
    recipe: Recipe
    stored_dtype: torch.dtype
    max_length: int
    version: str
    texts: Mapping[str, bytes]  # digests, by name, of the files that decide what a text's score is; the folder may go
    stamps: Mapping[Path, Stamp]  # of all of its files, from before they were read

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def config(self) -> PreTrainedConfig:
        return self.checkpoint.config

    @property
    def architecture(self) -> str:
        return self.checkpoint.architecture

    @property
    def is_quantized(self) -> bool:
        return getattr(self.config, "quantization_config", None) is not None or (self.folder / MODELOPT_FILE).is_file()

    @property
    def weight_files(self) -> tuple[Path, ...]:
        return self.checkpoint.weight_files

    def change(self) -> str | None:
        """What was written to since this was read, as trainers write over their last checkpoint; None if nothing was.

        Asked when weights were read, too: they may be another version's than the one that is named here, or of two.
        """
        now = _stamps(self.checkpoint)
        changed = sorted(file for file in now.keys() | self.stamps.keys() if now.get(file) != self.stamps.get(file))
        return f"{changed[0]}: was written to while it was read; try again when it is complete" if changed else None


def read_spec(source: str, any_quantization: bool = False) -> ModelSpec:
    """Raises LoadFailed, saying what is missing, if `source` is not a checkpoint that can be served.

    `any_quantization`: also one that transformers does not know.
    """
    try:
        return _read_spec(source, any_quantization)
    except OSError as error:  # a file that went meanwhile or is closed to us, or a folder in its place
        raise LoadFailed(f"{error.filename or source}: {error.strerror or error}") from error


def _read_spec(source: str, any_quantization: bool) -> ModelSpec:
    checkpoint = open_checkpoint(source, FOREIGN_CONFIGS)
    stamps = _stamps(checkpoint)
    if not any_quantization:
        _check_quantization(checkpoint)
    recipe = _told(checkpoint) or recipe_of(checkpoint)
    vocab_size = checkpoint.config.get_text_config().vocab_size
    if recipe.appended is not None and recipe.appended >= vocab_size:
        raise LoadFailed(
            f"{checkpoint.folder}: is read at token {recipe.appended}, outside of its vocabulary {vocab_size}"
        )
    return ModelSpec(
        checkpoint=checkpoint,
        recipe=recipe,
        stored_dtype=checkpoint.stored_dtype(besides=recipe.head_keys),
        max_length=_max_length(checkpoint.config),
        version=fingerprint(checkpoint.folders, checkpoint.weight_files),
        texts=_digests(checkpoint),
        stamps=stamps,
    )


def _told(checkpoint: Checkpoint) -> Recipe | None:
    """What a file beside the config says; None without one."""
    path = checkpoint.spec_file
    if path is None:
        return None
    from rewardserve.models.spec_file import recipe_from_file  # here: a GPU's image may lack what it needs

    return recipe_from_file(checkpoint, path)


def _check_quantization(checkpoint: Checkpoint) -> None:
    quantization = getattr(checkpoint.config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method is not None and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise LoadFailed(
            f"{checkpoint.folder}/config.json: quantization method '{method}' is unknown; its weights would be misread"
        )
    if quantization is None and (checkpoint.folder / MODELOPT_FILE).is_file():
        raise LoadFailed(f"{checkpoint.folder}/{MODELOPT_FILE}: quantized by ModelOpt; its weights would be misread")


def _stamps(checkpoint: Checkpoint) -> dict[Path, Stamp]:
    """Of the files that are there."""
    texts = [file for folder in checkpoint.folders for file in _text_files(folder)]
    found = {}
    for file in (*texts, *checkpoint.weight_files):
        with contextlib.suppress(FileNotFoundError):
            told = file.stat()
            found[file] = (told.st_ino, told.st_size, told.st_mtime_ns)
    return found


def _text_files(folder: Path) -> list[Path]:
    """Not folders, which some trainers call `tokenizer`, nor links to nowhere: nobody reads these."""
    return [file for pattern in TEXT_FILES for file in sorted(folder.glob(pattern)) if file.is_file()]


def _digests(checkpoint: Checkpoint) -> dict[str, bytes]:
    names = _text_files(checkpoint.text_folder)
    files = {file.name: file for file in names if file.name not in ("config.json", "adapter_config.json", SPEC_FILE)}
    if checkpoint.spec_file is not None:  # an adapter's may be elsewhere than its tokenizer
        files[SPEC_FILE] = checkpoint.spec_file
    return {name: hashlib.blake2b(file.read_bytes()).digest() for name, file in files.items()}


def _max_length(config: PreTrainedConfig) -> int:
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "seq_length"):
        if (getattr(text, name, None) or 0) > 0:
            return int(getattr(text, name))
    return 2048  # bloom and falcon have no limit of their own (ALiBi), and some say so by -1


def fingerprint(folders: Sequence[Path], files: Sequence[Path]) -> str:
    """Names a version by content: config, tokenizer and template, every weight file's size, 256 samples of 64 KiB
    spread over each, its end, and the first 16 KiB of each tensor: where only a head was trained, that alone differs.

    Sampled, because hashing 140 GB whole would take longer than loading it; files under 16 MiB are read whole.
    """
    digest = hashlib.blake2b(digest_size=6)
    for folder in folders:
        for file in _text_files(folder):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            for offset, length in _samples(file, size):
                stream.seek(offset)
                digest.update(stream.read(length))
    return digest.hexdigest()


def _samples(file: Path, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of each."""
    step = max(SAMPLE_BYTES, size // SAMPLES_PER_FILE)
    yield from ((offset, SAMPLE_BYTES) for offset in range(0, size, step))
    if step > SAMPLE_BYTES:
        yield size - SAMPLE_BYTES, SAMPLE_BYTES  # in torch's own files checksums of all tensors
        yield from _starts_of_tensors(file)


def _starts_of_tensors(file: Path) -> Iterator[tuple[int, int]]:
    """(offset, length) of each, as the file's own header says: its length in 8 bytes, then JSON."""
    if file.suffix != ".safetensors":
        return
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(start - 8))
    spans = (told["data_offsets"] for name, told in header.items() if name != "__metadata__")
    for begin, end in sorted(spans):
        yield start + begin, min(end - begin, BYTES_OF_EACH_TENSOR)
