"""A checkpoint's weights -> the heads they are: by the names of their keys, and for logits by what the config says."""

import math
import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig

from rewardserve.errors import LoadFailed
from rewardserve.models import heads
from rewardserve.models.checkpoint import HEAD_NAMES, Checkpoint
from rewardserve.models.heads import Head, LinearHead, ModuleHead

LM_HEADS = ("lm_head.weight", "output.weight", "embed_out.weight")
EMBEDDINGS = ("model.embed_tokens.weight", "embed_tokens.weight")
# What logits are multiplied by: how model types begin, the config's key and the power of its value
LOGIT_FACTORS = (
    ("cohere", "logit_scale", 1),
    ("falcon_h1", "lm_head_multiplier", 1),
    ("granite", "logits_scaling", -1),
    ("hyperclovax", "logits_scaling", 1),
    ("minicpm3", "logits_scaling", -1),
)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma and others; recurrent Gemma


def head_prefix(checkpoint: Checkpoint) -> str | None:
    """What the head's weights are called before `.weight` or `.0.weight`; None without one."""
    names = (str(checkpoint.raw_config.get("value_head_prefix") or ""), *HEAD_NAMES)  # OpenRLHF says it in its config
    for name in filter(None, names):
        if checkpoint.has(f"{name}.weight") or checkpoint.has(f"{name}.0.weight"):
            return name
    return None


def keys_below(checkpoint: Checkpoint, *prefixes: str) -> frozenset[str]:
    return frozenset(key for key in checkpoint.where if key.startswith(tuple(f"{p}." for p in prefixes)))


def layers_below(checkpoint: Checkpoint, prefix: str, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Numbered layers below `prefix`: an activation between each two products, where numbers are left out first.

    Raises LoadFailed for layers that are not known, and where a normalisation stands between products, and no number is
    left out that says on which side of it the activation is.
    """
    tensors = checkpoint.tensors(prefix + ".")
    numbers = sorted({int(match[1]) for key in tensors if (match := re.match(r"(\d+)\.", key))})
    layers: list[nn.Module] = []
    is_active = True  # nothing is to stand before the first product
    for number in numbers:
        own = {k.removeprefix(f"{number}."): t for k, t in tensors.items() if k.startswith(f"{number}.")}
        left_out = number - 1 not in numbers
        if "running_mean" in own:
            if left_out and not is_active:
                layers.append(activation())
                is_active = True
            layers.append(heads.batch_norm(own))
            continue
        if own.get("weight") is None or own["weight"].dim() != 2:
            keys = ", ".join(f"{prefix}.{number}.{key} {tuple(tensor.shape)}" for key, tensor in sorted(own.items()))
            raise LoadFailed(f"{checkpoint.folder}: {keys}: no layer of a head that is known")
        if not is_active:
            if isinstance(layers[-1], nn.BatchNorm1d) and not left_out:
                raise LoadFailed(
                    f"{checkpoint.folder}: {prefix}.{number - 1} normalises between two products, and whether an "
                    "activation comes before or after it is not told by their numbers"
                )
            layers.append(activation())
        layers.append(heads.linear(own["weight"], own.get("bias")))
        is_active = False
    return nn.Sequential(*layers)


def scalar_head(checkpoint: Checkpoint, prefix: str, num_outputs: int = 1, last: nn.Module | None = None) -> Head:
    """One product, or layers with ReLUs between. Raises LoadFailed for other shapes."""
    hidden_size = checkpoint.hidden_size
    if checkpoint.has(f"{prefix}.weight"):
        weight = checkpoint.tensor(f"{prefix}.weight")
        bias = checkpoint.tensor(f"{prefix}.bias") if checkpoint.has(f"{prefix}.bias") else None
        _check_shape(checkpoint, f"{prefix}.weight", weight, (num_outputs, hidden_size))
        if bias is not None:
            _check_shape(checkpoint, f"{prefix}.bias", bias, (num_outputs,))
        if last is None:
            return LinearHead(weight, bias)
        return ModuleHead(nn.Sequential(heads.linear(weight, bias), last), 1)
    layers = layers_below(checkpoint, prefix)
    products = [layer for layer in layers if isinstance(layer, nn.Linear)]
    widths = [hidden_size, *(layer.out_features for layer in products[:-1])]
    if [layer.in_features for layer in products] != widths or products[-1].out_features != num_outputs:
        shapes = ", ".join(str(tuple(layer.weight.shape)) for layer in products)
        raise LoadFailed(
            f"{checkpoint.folder}: the head '{prefix}' has layers of shapes {shapes}; they do not take hidden states "
            f"of size {hidden_size} to {num_outputs} output{'s' * (num_outputs > 1)}"
        )
    if last is not None:
        return ModuleHead(nn.Sequential(layers, last), 1)
    return ModuleHead(layers, num_outputs)


def _check_shape(checkpoint: Checkpoint, key: str, tensor: torch.Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != wanted:
        has_several = wanted[0] == 1 and tensor.dim() == 2 and tensor.shape[0] > 1 and tensor.shape[1:] == wanted[1:]
        hint = "; how several are scored a rewardserve.toml beside config.json can say (docs/models.md)"
        raise LoadFailed(
            f"{checkpoint.folder}: the head '{key}' has shape {tuple(tensor.shape)}, not {wanted}: "
            f"{'one output' if wanted[0] == 1 else f'{wanted[0]} outputs'} for hidden states of size "
            f"{checkpoint.hidden_size} is what can be served{hint if has_several else ''}"
        )


def lm_logits(checkpoint: Checkpoint, ids: Sequence[int]) -> nn.Linear | nn.Sequential:
    """Final hidden states [rows, hidden_size] -> logits [rows, ids], by all that the language model's class does."""
    config = checkpoint.config.get_text_config()
    key = _lm_key(checkpoint)
    num_rows = checkpoint.shape(key)[0]
    for wanted in ids:
        if wanted >= num_rows:
            raise LoadFailed(f"{checkpoint.folder}: token id {wanted} is outside of '{key}' with {num_rows} rows")
    factor = math.prod(
        getattr(config, name) ** power
        for kinds, name, power in LOGIT_FACTORS
        if config.model_type.startswith(kinds) and getattr(config, name, None) is not None
    )
    bias_key = key.removesuffix("weight") + "bias"
    bias = checkpoint.tensor(bias_key)[list(ids)].float() * factor if checkpoint.has(bias_key) else None
    product = heads.linear(_lm_rows(checkpoint, key)[list(ids)].float() * factor, bias)
    softcap = next((float(cap) for name in SOFTCAPS if (cap := getattr(config, name, None))), None)
    return product if softcap is None else nn.Sequential(product, heads.Softcap(softcap))


def lm_head(checkpoint: Checkpoint, token: int) -> Head:
    """The logit of one token."""
    return as_head(lm_logits(checkpoint, (token,)), 1)


def as_head(module: nn.Module, num_features: int) -> Head:
    if isinstance(module, nn.Linear):
        return LinearHead(module.weight.data, None if module.bias is None else module.bias.data)
    return ModuleHead(module, num_features)


def _lm_key(checkpoint: Checkpoint) -> str:
    """Of the language model's head, or of the embedding that it is tied to."""
    heads_there = [name for name in LM_HEADS if checkpoint.has(name)]
    embeddings = [name for name in EMBEDDINGS if checkpoint.has(name)]
    if not heads_there and embeddings and not _is_tied(checkpoint.config):
        raise LoadFailed(
            f"{checkpoint.folder}: none of {', '.join(LM_HEADS)}, and config.json does not tie the language model's "
            "head to the embedding (tie_word_embeddings): it has none to read"
        )
    if found := heads_there + embeddings:
        return found[0]
    names = ", ".join(LM_HEADS + EMBEDDINGS)
    raise LoadFailed(f"{checkpoint.folder}: none of {names}: no language model's head to read")


def _lm_rows(checkpoint: Checkpoint, key: str) -> torch.Tensor:
    """PEFT trains a copy of an embedding; a head that is tied to it stays tied to the embedding as it was."""
    base, brought = checkpoint.base, checkpoint.changes.whole.get(key)
    if key in EMBEDDINGS and base is not None and brought is not None and tuple(brought.shape) == base.shape(key):
        return _lm_rows(base, key)
    return checkpoint.tensor(key)


def _is_tied(config: PreTrainedConfig) -> bool:
    return any(getattr(each, "tie_word_embeddings", True) for each in (config, config.get_text_config()))


def odds_head(checkpoint: Checkpoint, yes: int, no: int) -> Head:
    """Probability of one token against another, by softmax over the two."""
    return ModuleHead(nn.Sequential(lm_logits(checkpoint, (yes, no)), heads.OddsOf(0)), 1)
