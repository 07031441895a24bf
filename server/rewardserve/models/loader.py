"""Checkpoint -> reward model on a device."""

import copy
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rewardserve_kernels.linear.adapted import AdaptedLinear
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

from rewardserve.errors import LoadFailed
from rewardserve.models.backbone import Backbone
from rewardserve.models.checkpoint import HEAD_NAMES, VALUE_HEADS, attention_of, first_line
from rewardserve.models.head_parts import LM_HEADS
from rewardserve.models.heads import Head
from rewardserve.models.reads import ReadAt
from rewardserve.models.reward_model import RewardModel
from rewardserve.models.spec import ModelSpec

log = logging.getLogger(__name__)

# What wrappers put before the names of a backbone's weights; the last but one is DeepSpeed-Chat's, in both spellings
WRAPPERS = re.compile(
    r"^(?:(?:pretrained_model|base_model|language_model|transformer|backbone|rwtran(?:s|rs)former|model)\.)+"
)
# Weights that are computed anew, or belong to other kinds of attention than those that run here
BUFFERS = re.compile(r"(?:inv_freq|masked_bias|position_ids|[kv]_scale|(?:attn|attention)\.bias)$")
# First names of heads that may lie unused beside the one that is read
OTHER_HEADS = {name.partition(".")[0] for name in (*HEAD_NAMES, *LM_HEADS)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str) -> torch.device:
    """`auto` is the first GPU, or the CPU without one. Raises LoadFailed for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch has its ways of saying so
        reason = str(error).strip().partition("\n")[0]
        raise LoadFailed(f"device '{device}' cannot be used: {reason}; try auto, cpu or cuda:N") from error
    return chosen


def choose_dtype(dtype: str, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's own, except that a CPU runs fp16 checkpoints in fp32: its fp16 products are slow."""
    if dtype != "auto":
        return DTYPES[dtype]
    if spec.stored_dtype not in DTYPES.values() or (spec.stored_dtype is torch.float16 and device.type == "cpu"):
        return torch.float32
    return spec.stored_dtype


def load(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> RewardModel:
    """Raises LoadFailed if a weight of the backbone is missing: transformers would make one up."""
    module = _read_backbone(spec, dtype=dtype)
    module = module.to(device).eval().requires_grad_(False)
    return RewardModel(Backbone(module), [_head(spec, device)], takes_mean=spec.recipe.reads.at is ReadAt.MEAN)


def load_sharing(specs: Sequence[ModelSpec], dtype: torch.dtype, device: torch.device) -> RewardModel:
    """Adapters of one base, each with its own head, over one backbone. Raises LoadFailed if they cannot share it."""
    first, base = specs[0], specs[0].checkpoint.base
    for spec in specs:
        if reason := _why_not_shared(spec, first):
            raise LoadFailed(f"{spec.folder}: {reason}; --no-share-backbone loads each model by itself")
    assert base is not None
    module = _read_backbone(replace(first, checkpoint=base), dtype=dtype)
    module = module.to(device).eval().requires_grad_(False)
    chosen = torch.zeros(1, dtype=torch.int64, device=device)
    deltas = [spec.checkpoint.changes.deltas for spec in specs]
    for key in sorted(set().union(*deltas)):
        adapters = [(found[key].down, found[key].up) if key in found else None for found in deltas]
        _adapt(module, key, partial(AdaptedLinear, adapters=adapters, chosen=chosen))
    heads = [_head(spec, device) for spec in specs]
    return RewardModel(Backbone(module), heads, first.recipe.reads.at is ReadAt.MEAN, chosen)


def hold_in_memory(model: RewardModel) -> None:
    """What of the backbone is a file, mapped, becomes memory of its own.

    Who writes over that file, as trainers do over their last checkpoint, would change the scores of a version that was
    loaded from it, and who cuts it end this process. To be called when layers have been laid out: most are copies then.
    """
    module = model.backbone.module
    mapped = _mapped_files()
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_cpu:
            continue
        if mapped is None or any(start <= tensor.data_ptr() < stop for start, stop in mapped):
            tensor.data = tensor.data.clone()


def _mapped_files() -> list[tuple[int, int]] | None:
    """Where in memory files are; None where the system does not say."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    spans = [fields[0].split("-") for line in lines if (fields := line.split())[4] != "0"]  # of an inode
    return [(int(start, 16), int(stop, 16)) for start, stop in spans]


def _why_not_shared(spec: ModelSpec, first: ModelSpec) -> str | None:
    checkpoint, base = spec.checkpoint, first.checkpoint.base
    if base is None or checkpoint.base is None or checkpoint.base.folders != base.folders:
        return "it adapts another model than those it would share its backbone with"
    if whole := sorted(checkpoint.changes.whole.keys() - spec.recipe.head_keys):
        return f"it has weights of its own besides its head: {', '.join(whole[:5])}"
    if any(delta.transposed for delta in checkpoint.changes.deltas.values()):
        return "its base's layers are stored transposed"
    if any(delta.norms is not None for delta in checkpoint.changes.deltas.values()):
        return "it was trained with DoRA, which adds nothing to a product but gives weights other norms"
    if (spec.recipe.reads.at is ReadAt.MEAN) != (first.recipe.reads.at is ReadAt.MEAN):
        return "it is read otherwise than those it would share its backbone with"
    return None if spec.recipe.convert is None else "its base's weights have other names here"


def bare_name(key: str, module: PreTrainedModel) -> str:
    """What a checkpoint's key is called within the backbone."""
    return WRAPPERS.sub("", key.removeprefix(f"{module.base_model_prefix}."))


def _adapt(module: PreTrainedModel, key: str, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Replaces the linear layer whose weight the checkpoint calls `key`."""
    path = bare_name(key, module).removesuffix(".weight")
    parent_path, _, name = path.rpartition(".")
    try:
        parent = module.get_submodule(parent_path)
        linear = getattr(parent, name)
    except AttributeError as error:
        raise LoadFailed(f"'{key}' is adapted, and the model has no '{path}'; --no-share-backbone merges it") from error
    if type(linear) is not nn.Linear:
        raise LoadFailed(f"'{key}' is adapted, and is no linear layer; --no-share-backbone merges it")
    setattr(parent, name, make(linear))


def _head(spec: ModelSpec, device: torch.device) -> Head:
    assert spec.recipe.head is not None  # a judge that writes has none, and is not loaded here
    return copy.deepcopy(spec.recipe.head).to(device)  # as in hold_in_memory


def trunks_of(specs: Sequence[ModelSpec]) -> tuple[int, ...]:
    """Of each model of `load_sharing`, the first one whose backbone computes exactly the same."""
    return tuple(next(i for i, other in enumerate(specs) if _same_deltas(spec, other)) for spec in specs)


def _same_deltas(one: ModelSpec, other: ModelSpec) -> bool:
    own, others = one.checkpoint.changes.deltas, other.checkpoint.changes.deltas
    return own.keys() == others.keys() and all(
        torch.equal(delta.down, others[key].down) and torch.equal(delta.up, others[key].up)
        for key, delta in own.items()
    )


def count_parameters(spec: ModelSpec) -> int:
    """Of the model that `load` would load, without reading a weight. Raises LoadFailed as `load` does.

    For engines that load by themselves: not all refuse a checkpoint from which a weight is missing.
    """
    module = _read_backbone(spec, device_map="meta")
    num_parameters = sum(p.numel() for p in module.parameters())
    if spec.recipe.head is not None:
        return num_parameters + spec.recipe.head.num_parameters
    return num_parameters + sum(math.prod(spec.checkpoint.shape(key)) for key in spec.recipe.head_keys)


def _read_backbone(spec: ModelSpec, **options: Any) -> PreTrainedModel:
    transformers_logging.set_verbosity_error()  # what is missing or not used we say ourselves
    transformers_logging.disable_progress_bar()
    try:
        with torch.device("meta"):
            empty = AutoModel.from_config(spec.config)
        tensors = _renamed(spec, empty)
        reader = AutoModel if tensors is None else type(empty)  # which takes weights without a folder
        module, info = reader.from_pretrained(
            None if tensors is not None else spec.folder,
            config=spec.config,
            state_dict=tensors,
            output_loading_info=True,
            use_safetensors=None if tensors is not None else _in_safetensors(spec),
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that they are reported; they are refused below
            **attention_of(spec.config),
            **options,
        )
    except Exception as error:  # what a config describes may not be buildable, in as many ways
        raise LoadFailed(
            f"{spec.folder}: its config.json describes no model that loads: {first_line(error)}"
        ) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        keys = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise LoadFailed(f"{spec.folder}: weights missing or of the wrong shape: {', '.join(keys[:10])}")
    if not spec.is_quantized:  # or there are scales of many names
        _check_surplus(spec, module, sorted(set(info["unexpected_keys"]) - spec.recipe.head_keys))
    _say_which_head(spec)
    return module


def _check_surplus(spec: ModelSpec, module: PreTrainedModel, surplus: Sequence[str]) -> None:
    """Raises LoadFailed where the score would leave out what the model was trained with; says what else is not used."""
    surplus = [key for key in surplus if not BUFFERS.search(key)]
    first_names = {key: bare_name(key, module).partition(".")[0] for key in surplus}
    parts = {name for name, _ in module.named_children()}
    if inside := [key for key, name in first_names.items() if name in parts]:
        raise LoadFailed(
            f"{spec.folder}: config.json describes a model without the weights {_listed(inside)}: the score would "
            "leave them out. Correct what config.json says of its layers and biases, or remove the weights"
        )
    told = spec.checkpoint.spec_file is not None
    if beside := [key for key, name in first_names.items() if name not in OTHER_HEADS and not told]:
        raise LoadFailed(
            f"{spec.folder}: {_listed(beside)} are neither of the backbone nor of a head that is known: the score "
            "would leave them out. Say in rewardserve.toml beside config.json how it is scored (docs/models.md); "
            "weights that it does not name are not used"
        )
    if surplus:
        log.warning("%d weights of the checkpoint are not used: %s", len(surplus), _listed(surplus))


def _say_which_head(spec: ModelSpec) -> None:
    """Where a value head lies beside a model that has another: which of the two was trained only its author knows."""
    where, used = spec.checkpoint.where, spec.recipe.head_keys
    unused = {file.name for file in where.values()} - {where[key].name for key in used if key in where}
    for name in sorted(unused.intersection(VALUE_HEADS)):
        taken = _listed(sorted(used.difference(LM_HEADS) or used))
        log.warning("%s: its head is %s, and the one in %s is not used", spec.folder, taken, name)


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(keys[:10]) + (f" and {len(keys) - 10} more" if len(keys) > 10 else "")


def _in_safetensors(spec: ModelSpec) -> bool:
    return any(file.suffix == ".safetensors" and file.name.startswith("model") for file in spec.weight_files)


def _renamed(spec: ModelSpec, empty: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """The backbone's weights by the names that transformers' class has for them; None if it knows those they have."""
    checkpoint, recipe = spec.checkpoint, spec.recipe
    if recipe.convert is not None:
        return recipe.convert(checkpoint)
    if checkpoint.base is not None:
        return {key: checkpoint.tensor(key) for key in checkpoint.where if key not in recipe.head_keys}
    names = set(empty.state_dict())
    prefix = f"{empty.base_model_prefix}."
    keys = [key for key in checkpoint.where if key not in recipe.head_keys]
    if spec.is_quantized or any(key in names or key.removeprefix(prefix) in names for key in keys):
        return None
    bare = {key: bare_name(key, empty) for key in keys}
    if not names & set(bare.values()):
        return None
    return {name: checkpoint.tensor(key) for key, name in bare.items()}
