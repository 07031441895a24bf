"""New weights of the same shapes, copied over those of a model that is loaded: no second copy of it is ever there."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from transformers import AutoModel, PreTrainedModel

from rewardserve.errors import LoadFailed
from rewardserve.models.backbone import Backbone, bare_module
from rewardserve.models.checkpoint import Checkpoint
from rewardserve.models.experts import Stack, as_held, stacks
from rewardserve.models.loader import bare_name
from rewardserve.models.reward_model import RewardModel
from rewardserve.models.spec import ModelSpec

# Of a config: what changes no score
UNIMPORTANT = {"_name_or_path", "torch_dtype", "dtype", "transformers_version", "use_cache"}


@runtime_checkable
class Refillable(Protocol):
    """A layer that took the place of another, and keeps its weights in another form."""

    def refill(self, **tensors: torch.Tensor) -> None:
        """The other's parameters, by their names."""


def check_refresh(model: RewardModel, spec: ModelSpec, loaded: ModelSpec) -> None:
    """Raises LoadFailed where `spec` is not of the same shapes as what is `loaded`. Changes nothing."""
    _check_settings(spec, loaded)
    if spec.is_quantized:
        raise LoadFailed(f"{spec.folder}: is quantized; use Swap")
    own, new = loaded.recipe, spec.recipe
    if (own.family, own.reads, own.appended, own.attributes) != (new.family, new.reads, new.appended, new.attributes):
        raise LoadFailed(f"{spec.folder}: is scored as {new.family}, not as {own.family}; use Swap")
    with spec.checkpoint.kept_open():
        _check_weights(spec)
    if _shapes(loaded) != _shapes(spec):
        raise LoadFailed(f"{spec.folder}: is another architecture than the one that is loaded; use Swap")
    assert own.head is not None and new.head is not None  # a judge that writes is of another family
    if own.head.shapes() != new.head.shapes():
        raise LoadFailed(f"{spec.folder}: its head has other shapes than the one that is loaded; use Swap")


def _check_weights(spec: ModelSpec) -> None:
    names = _names(spec)
    for name, parameter in _wanted(spec).items():
        key = names.get(name)
        if key is None:
            raise LoadFailed(f"{spec.folder}: has no '{name}' under a name that can be taken over in place; use Swap")
        shape = _shape(spec.checkpoint, key)
        if shape is None:
            raise LoadFailed(f"{spec.folder}: the experts that make '{name}' do not have one shape; use Swap")
        if shape != tuple(parameter.shape):
            told = key if isinstance(key, str) else name
            raise LoadFailed(f"{spec.folder}: '{told}' has shape {shape}, not {tuple(parameter.shape)}; use Swap")


def _check_settings(spec: ModelSpec, loaded: ModelSpec) -> None:
    """All that makes a score besides weights must be the same: only weights are taken over."""
    new, old = spec.checkpoint, loaded.checkpoint
    for key in sorted((new.raw_config.keys() | old.raw_config.keys()) - UNIMPORTANT):
        if new.raw_config.get(key) != old.raw_config.get(key):
            raise LoadFailed(f"{spec.folder}/config.json: {key} is not what is loaded; use Swap")
    if spec.recipe.normalizer != loaded.recipe.normalizer:
        raise LoadFailed(f"{spec.folder}: its normaliser is not the one that is loaded; use Swap")
    names = spec.texts.keys() | loaded.texts.keys()
    if differing := sorted(name for name in names if spec.texts.get(name) != loaded.texts.get(name)):
        raise LoadFailed(
            f"{new.text_folder}: {', '.join(differing)} are not what is loaded: tokenizer, template and "
            "rewardserve.toml must be the same (a restart reads them here); copy them, or use Swap"
        )


def refresh(model: RewardModel, spec: ModelSpec) -> None:
    """After `check_refresh`. What fails from here on leaves old weights among new: the model must not be used then."""
    with spec.checkpoint.kept_open():
        _take_over(model.backbone, spec)
    assert spec.recipe.head is not None  # of a judge that writes, which is not served here
    model.head.copy_from(spec.recipe.head)


def _take_over(backbone: Backbone, spec: ModelSpec) -> None:
    names = _names(spec)
    for path, leaves in _by_module(sorted(_wanted(spec))):
        holder = bare_module(backbone.module, path)
        tensors = {}
        for leaf in leaves:
            name = f"{path}.{leaf}"
            # Rounded as at load: who holds it now may hold it in a higher precision.
            tensors[leaf] = _tensor(spec.checkpoint, names[name]).to(backbone.loaded_as[name])
        if isinstance(holder, Refillable):
            holder.refill(**tensors)
            continue
        for leaf, tensor in tensors.items():
            getattr(holder, leaf).data.copy_(tensor)


def _wanted(spec: ModelSpec) -> dict[str, torch.Tensor]:
    """What the backbone's class takes from the checkpoint, on no device: parameters, tied ones once, and such buffers
    as it brings, like the bias by which a mixture chooses its experts.
    """
    module, brought = _empty(spec), _names(spec)
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    buffers = {n: tensor for n, tensor in module.state_dict().items() if n not in parameters and n in brought}
    return dict(module.named_parameters()) | buffers


def _names(spec: ModelSpec) -> dict[str, str | Stack]:
    """The checkpoint's key of each of the class's names, or those of its experts that make it."""
    module = _empty(spec)
    keys = {bare_name(key, module): key for key in spec.checkpoint.where if key not in spec.recipe.head_keys}
    keys = as_held(keys, [name for name, _ in module.named_parameters()])
    return stacks(keys) | keys


def _shape(checkpoint: Checkpoint, key: str | Stack) -> tuple[int, ...] | None:
    """None of a stack whose experts do not fit one another."""
    if isinstance(key, str):
        return checkpoint.shape(key)
    shapes = [tuple(map(checkpoint.shape, parts)) for parts in key]
    (rows, *columns), *others = shapes[0]
    if any(each != shapes[0] for each in shapes) or any(other[1:] != tuple(columns) for other in others):
        return None
    return (len(key), rows + sum(other[0] for other in others), *columns)


def _tensor(checkpoint: Checkpoint, key: str | Stack) -> torch.Tensor:
    if isinstance(key, str):
        return checkpoint.tensor(key)
    return torch.stack([torch.cat(list(map(checkpoint.tensor, parts))) for parts in key])


def _empty(spec: ModelSpec) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModel.from_config(spec.config)


def _shapes(spec: ModelSpec) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in _wanted(spec).items()}


def _by_module(names: list[str]) -> Iterator[tuple[str, list[str]]]:
    modules: dict[str, list[str]] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        modules.setdefault(path, []).append(leaf)
    yield from modules.items()
