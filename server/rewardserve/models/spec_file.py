"""A recipe from rewardserve.toml, whose keys are in spec_keys.py."""

from pathlib import Path

import torch
from torch import nn

from rewardserve.errors import LoadFailed
from rewardserve.models import heads
from rewardserve.models.checkpoint import SPEC_FILE, Checkpoint
from rewardserve.models.families import Normalizer, Recipe
from rewardserve.models.head_parts import as_head, keys_below, layers_below, lm_logits, odds_head, scalar_head
from rewardserve.models.heads import Head, ModuleHead
from rewardserve.models.reads import Pattern, ReadAt, ReadPlan
from rewardserve.models.spec_judge import judge_recipe
from rewardserve.models.spec_keys import HeadKeys, Refuse, SpecFile, read_keys, refuse_unheeded
from rewardserve.types import StepFormat, StepStyle

PATTERNED = {ReadAt.GATED, ReadAt.LAST_OF, ReadAt.EVERY}
HIDDEN = {"relu": nn.ReLU, "selu": nn.SELU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


def recipe_from_file(checkpoint: Checkpoint, path: Path) -> Recipe:
    """Raises LoadFailed naming the key that is wrong."""
    told = read_keys(path)

    def refuse(key: str, reason: str) -> LoadFailed:
        return LoadFailed(f"{path}: {key} {reason}")

    if (told.head is None) == (told.judge is None):
        raise refuse("head", "or judge: give one of them")
    if told.judge is not None:
        if others := sorted(told.model_fields_set - {"judge"}):
            raise refuse(", ".join(others), "says nothing of a judge; leave it out")
        return judge_recipe(checkpoint, told.judge, refuse)
    assert told.head is not None
    num_outputs = {"lm_rows": len(told.head.ids), "lm_odds": 1}.get(told.head.kind, told.head.outputs)
    refuse_unheeded(told, told.head, num_outputs, refuse)
    head = _head(checkpoint, told.head, refuse)
    return Recipe(
        family=f"by {SPEC_FILE}",
        head=_scored(head, num_outputs, told, refuse),
        head_keys=_head_keys(checkpoint, told.head),
        reads=_reads(checkpoint, told, told.head, refuse),
        appended=told.read.append,
        attributes=told.score.attributes,
        is_probability=told.head.kind == "lm_odds"
        or told.head.activation == "sigmoid"
        or told.score.probability_of is not None,
        normalizer=Normalizer(told.score.shift, told.score.scale)
        if (told.score.shift, told.score.scale) != (0, 1)
        else None,
        steps=None
        if told.steps is None
        else StepFormat(StepStyle(told.steps.style), told.steps.separator, told.steps.tag, told.steps.joint),
    )


def _head_keys(checkpoint: Checkpoint, head: HeadKeys) -> frozenset[str]:
    prefixes = [prefix for prefix in (head.weights, head.gate) if prefix]
    return keys_below(checkpoint, *prefixes, "lm_head") | {key for key in (head.gate_scale, head.transform) if key}


def _reads(checkpoint: Checkpoint, told: SpecFile, head: HeadKeys, refuse: Refuse) -> ReadPlan:
    at, read = ReadAt(told.read.at), told.read
    if head.kind == "gated":
        if at is not ReadAt.LAST:
            raise refuse("read.at", f"is '{read.at}'; a gated head's rewards are read at the last token")
        at = ReadAt.GATED
    if told.steps is not None and at not in (ReadAt.LAST, ReadAt.EVERY):
        where = "a gated head" if at is ReadAt.GATED else f"read.at = {read.at!r}"
        raise refuse("steps", f"cannot be read with {where}; leave it out")
    if at not in PATTERNED:
        return ReadPlan(at)
    if not read.pattern:
        raise refuse("read.pattern", "is missing: token ids, at whose occurrence is read")
    vocab_size = checkpoint.config.get_text_config().vocab_size
    if strange := [token for token in read.pattern if not 0 <= token < vocab_size]:
        raise refuse("read.pattern", f"has {strange[0]}, outside of the vocabulary of {vocab_size}")
    unseen = read.append is not None and read.append not in read.pattern and read.offset < len(read.pattern)
    if unseen and at is not ReadAt.GATED:
        raise refuse("read.append", "does nothing: what is read comes before it; leave it out")
    num_objectives, num_quantiles = (head.outputs, head.quantiles) if at is ReadAt.GATED else (0, 1)
    pattern = Pattern(read.pattern, read.offset)
    return ReadPlan(at, pattern, num_objectives, num_quantiles, "pattern of rewardserve.toml")


def _head(checkpoint: Checkpoint, told: HeadKeys, refuse: Refuse) -> Head | nn.Module:
    kind, ids = told.kind, told.ids
    if kind == "lm_odds":
        if len(set(ids)) != 2 or len(ids) != 2:
            raise refuse("head.ids", "must be two: the token that is good, and the one that is not")
        return odds_head(checkpoint, *ids)
    if kind == "lm_rows":
        if not ids:
            raise refuse("head.ids", "is missing: ids of the tokens whose logits are read")
        return lm_logits(checkpoint, ids)
    prefix, outputs = told.weights, told.outputs
    first = f"{prefix}.0.weight" if kind == "mlp" else f"{prefix}.weight"
    if not prefix or not checkpoint.has(first):
        keys = ", ".join(sorted(key for key in checkpoint.where if "layers." not in key)[:12])
        what = f"is not what a head's keys begin with: no '{first}', which kind = {kind!r} has"
        raise refuse("head.weights", f"'{prefix}' {what}; there are {keys}")
    scalar_head(checkpoint, prefix, outputs * told.quantiles)  # for its errors
    if kind == "mlp":
        layers = layers_below(checkpoint, prefix, HIDDEN[told.hidden])
        _refuse_idle_hidden(told, layers, refuse)
        return layers
    bias = checkpoint.tensor(f"{prefix}.bias") if checkpoint.has(f"{prefix}.bias") else None
    product = heads.linear(checkpoint.tensor(f"{prefix}.weight"), bias)
    return _gated(checkpoint, told, product, refuse) if kind == "gated" else product


def _gated(checkpoint: Checkpoint, told: HeadKeys, rewards: nn.Linear, refuse: Refuse) -> Head:
    """Raises LoadFailed for parts that do not fit each other."""

    def tensor(key: str, what: str) -> torch.Tensor:
        if not checkpoint.has(what):
            raise refuse(f"head.{key}", f"'{what}' is no key of this checkpoint")
        return checkpoint.tensor(what).float()

    outputs = told.outputs
    if not told.gate or not checkpoint.has(f"{told.gate}.0.weight"):
        raise refuse("head.gate", f"'{told.gate}' is not what a gate's keys begin with: no '{told.gate}.0.weight'")
    scalar_head(checkpoint, told.gate, outputs)  # for its errors
    gate = layers_below(checkpoint, told.gate, HIDDEN[told.hidden])
    _refuse_idle_hidden(told, gate, refuse)
    transform = tensor("transform", told.transform) if told.transform else torch.eye(outputs)
    if transform.shape != (outputs, outputs):
        raise refuse("head.transform", f"is of shape {tuple(transform.shape)}, not {(outputs, outputs)}")
    scale = tensor("gate_scale", told.gate_scale).flatten() if told.gate_scale else torch.ones(1)
    if len(scale) not in (1, outputs):
        raise refuse("head.gate_scale", f"has {len(scale)} numbers; it must have one, or one for each output")
    head = heads.GatedHead(rewards, gate, scale, told.temperature, transform)
    return ModuleHead(head, outputs * told.quantiles + outputs)


def _refuse_idle_hidden(told: HeadKeys, layers: nn.Sequential, refuse: Refuse) -> None:
    if "hidden" in told.model_fields_set and not any(isinstance(layer, HIDDEN[told.hidden]) for layer in layers):
        raise refuse("head.hidden", "does nothing: there is one product, and nothing between; leave it out")


class _Weighted(nn.Module):
    """Outputs [rows, n] -> their weighted sum, and themselves [rows, 1 + n]."""

    def __init__(self, weights: tuple[float, ...]) -> None:
        super().__init__()
        self._weights = nn.Parameter(torch.tensor(weights))

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([(outputs * self._weights).sum(-1, keepdim=True), outputs], -1)


def _scored(head: Head | nn.Module, num_outputs: int, told: SpecFile, refuse: Refuse) -> Head:
    score = told.score
    assert told.head is not None
    if len(set(score.attributes)) < len(score.attributes):
        raise refuse("score.attributes", "has a name twice")
    if told.head.kind == "gated" and len(score.attributes) != num_outputs:
        raise refuse("score.attributes", f"must have a name for each of the {num_outputs} outputs")
    if not isinstance(head, nn.Module):
        return head
    layers = [head, nn.Sigmoid()] if told.head.activation == "sigmoid" else [head]
    if score.probability_of is not None:
        if score.probability_of >= num_outputs:
            raise refuse("score.probability_of", f"is {score.probability_of}, and there are {num_outputs} outputs")
        return ModuleHead(nn.Sequential(*layers, heads.OddsOf(score.probability_of)), 1)
    if num_outputs > 1:
        if len(score.weights_of) != num_outputs or len(score.attributes) != num_outputs:
            raise refuse(
                "score.weights_of and score.attributes", f"must have a value for each of the {num_outputs} outputs"
            )
        return ModuleHead(nn.Sequential(*layers, _Weighted(score.weights_of)), 1 + num_outputs)
    return as_head(head if len(layers) == 1 else nn.Sequential(*layers), 1)
