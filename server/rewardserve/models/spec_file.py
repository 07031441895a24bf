"""rewardserve.toml beside a checkpoint's config.json: says how a model is scored that no family recognizes.

[head]
kind = "linear"         # or "mlp" (numbered layers), "lm_rows" (logits of ids), "lm_odds" (ids[0] against ids[1]),
                        # "gated" (the last token's outputs, mixed by a gate, read where `read.pattern` occurs last)
weights = "my_head"     # what the head's keys begin with: my_head.weight, or my_head.0.weight, ...
outputs = 1             # more: `attributes` names them and `weights_of`, or the gate, mixes them; or `probability_of`
activation = "none"     # of the outputs; or "sigmoid"
hidden = "relu"         # between the layers of an mlp or a gate; or "selu", "gelu", "silu", "tanh"
ids = [648, 387]
gate = "gating.layers"  # what the gate's keys begin with: numbered layers; their softmax weighs the outputs
quantiles = 1           # of each output, side by side in the weights; their mean counts, the mixture's spread is std
temperature = 1.0       # that the gate's logits are divided by
gate_scale = ""         # key of a factor of the gate's weights; none, if it is left out
transform = ""          # key of a matrix: rewards @ matrix are mixed; they themselves, if it is left out

[read]
at = "last"             # or "first", "mean", "last-of" or "every" (occurrence of `pattern`)
pattern = [12902]
offset = 0
append = 128003

[steps]
style = "tagged"        # or "ends", "apart", "turns"
separator = "\\n\\n"
tag = "<extra_0>"
joint = ""

[score]
attributes = ["helpful", "safe"]
weights_of = [0.7, 0.3]   # of the attributes, in the score
probability_of = 1        # or: the score is this output's probability
shift = 0.0               # final score = (raw - shift) / scale
scale = 1.0

[judge]                   # instead of [head]: a language model that is asked, and read before it answers
template = '''
Question: {prompt}
Answer: {response}
Is the answer right? Say Yes or No.'''
labels = ["Yes", "No"]    # each a single token; their probabilities are attributes
values = [1.0, 0.0]       # the score is their mean, weighted by those

[judge.verdict]           # instead of labels and values: it writes, and the last thing that it writes is its verdict
criteria = ["correct", "clear"]   # each is given a number: {"correct": 7, "clear": 9}. They are attributes
weights_of = [0.7, 0.3]   # of the criteria, in the score; without them it is their mean
lowest = 1.0              # that a number may be
highest = 10.0
max_tokens = 1024         # that it may write
pattern = ''              # of a verdict that is no JSON, a group by each criterion's name: 'Rating: (?P<correct>\\d+)'
words = {}                # that may stand for numbers: {Yes = 1.0, No = 0.0}
"""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import tokenizers
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from rewardserve.errors import LoadFailed
from rewardserve.models import heads
from rewardserve.models.checkpoint import SPEC_FILE, Checkpoint
from rewardserve.models.families import Normalizer, Recipe
from rewardserve.models.head_parts import keys_below, layers_below, lm_rows, odds_head, scalar_head
from rewardserve.models.heads import Head, LinearHead, ModuleHead
from rewardserve.models.reads import Pattern, ReadAt, ReadPlan
from rewardserve.types import JudgeFormat, StepFormat, StepStyle, VerdictFormat, at_the_end

Refuse = Callable[[str, str], LoadFailed]  # the key, and what is wrong with it


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Head(_Section):
    kind: Literal["linear", "mlp", "lm_rows", "lm_odds", "gated"]
    weights: str = ""
    outputs: int = Field(default=1, ge=1)
    activation: Literal["none", "sigmoid"] = "none"
    hidden: Literal["relu", "selu", "gelu", "silu", "tanh"] = "relu"
    ids: tuple[int, ...] = ()
    gate: str = ""
    quantiles: int = Field(default=1, ge=1)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    gate_scale: str = ""
    transform: str = ""


class _Read(_Section):
    at: Literal["last", "first", "mean", "last-of", "every"] = "last"
    pattern: tuple[int, ...] = ()
    offset: int = Field(default=0, ge=0)
    append: int | None = Field(default=None, ge=0)


class _Steps(_Section):
    style: Literal["ends", "apart", "tagged", "turns"]
    separator: str = "\n\n"
    tag: str = ""
    joint: str = ""


class _Score(_Section):
    attributes: tuple[str, ...] = ()
    weights_of: tuple[float, ...] = ()
    probability_of: int | None = Field(default=None, ge=0)
    shift: float = 0.0
    scale: float = Field(default=1.0, gt=0)


class _Verdict(_Section):
    criteria: tuple[str, ...] = Field(min_length=1)
    weights_of: tuple[float, ...] = ()
    lowest: float
    highest: float
    max_tokens: int = Field(default=1024, ge=1)
    pattern: str = ""
    words: dict[str, float] = {}


class _Judge(_Section):
    template: str
    labels: tuple[str, ...] = ()
    values: tuple[float, ...] = ()
    verdict: _Verdict | None = None


PATTERNED = {ReadAt.GATED, ReadAt.LAST_OF, ReadAt.EVERY}
HIDDEN = {"relu": nn.ReLU, "selu": nn.SELU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}
HEEDED_OF_KIND = {
    "linear": {"kind", "weights", "outputs", "activation"},
    "mlp": {"kind", "weights", "outputs", "activation", "hidden"},
    "lm_rows": {"kind", "ids", "activation"},
    "lm_odds": {"kind", "ids"},
    "gated": {"kind", "weights", "outputs", "hidden", "gate", "quantiles", "temperature", "gate_scale", "transform"},
}
HEEDED_OF_STYLE = {
    "ends": {"style", "separator"},
    "apart": {"style", "separator", "tag"},
    "tagged": {"style", "separator", "tag", "joint"},
    "turns": {"style", "separator", "tag"},
}


class _SpecFile(_Section):
    head: _Head | None = None
    judge: _Judge | None = None
    read: _Read = _Read()
    steps: _Steps | None = None
    score: _Score = _Score()


def recipe_from_file(checkpoint: Checkpoint) -> Recipe:
    """Raises LoadFailed naming the key that is wrong."""
    path = checkpoint.folder / SPEC_FILE
    told = _read(path)

    def refuse(key: str, reason: str) -> LoadFailed:
        return LoadFailed(f"{path}: {key} {reason}")

    if (told.head is None) == (told.judge is None):
        raise refuse("head", "or judge: give one of them")
    if told.judge is not None:
        if others := sorted(told.model_fields_set - {"judge"}):
            raise refuse(", ".join(others), "says nothing of a judge; leave it out")
        return _judge(checkpoint, told.judge, refuse)
    assert told.head is not None
    num_outputs = {"lm_rows": len(told.head.ids), "lm_odds": 1}.get(told.head.kind, told.head.outputs)
    _refuse_unheeded(told, told.head, num_outputs, refuse)
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


def _head_keys(checkpoint: Checkpoint, head: _Head) -> frozenset[str]:
    prefixes = [prefix for prefix in (head.weights, head.gate) if prefix]
    return keys_below(checkpoint, *prefixes, "lm_head") | {key for key in (head.gate_scale, head.transform) if key}


def _reads(checkpoint: Checkpoint, told: _SpecFile, head: _Head, refuse: Refuse) -> ReadPlan:
    at, read = ReadAt(told.read.at), told.read
    if head.kind == "gated":
        if at is not ReadAt.LAST:
            raise refuse("read.at", f"is '{read.at}'; a gated head's rewards are read at the last token")
        at = ReadAt.GATED
    if at not in PATTERNED:
        return ReadPlan(at)
    if told.steps is not None and at is not ReadAt.EVERY:
        where = "a gated head" if at is ReadAt.GATED else f"read.at = {read.at!r}"
        raise refuse("steps", f"cannot be read with {where}; leave it out")
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


def _refuse_unheeded(told: _SpecFile, head: _Head, num_outputs: int, refuse: Refuse) -> None:
    """A key that does nothing is a mistake: who wrote it believes that it does something."""

    def check(name: str, section: _Section | None, heeded: set[str], of: str) -> None:
        if section is not None and (others := sorted(section.model_fields_set - heeded)):
            raise refuse(", ".join(f"{name}.{key}" for key in others), f"does nothing {of}; leave it out")

    check("head", head, HEEDED_OF_KIND[head.kind], f"with head.kind = {head.kind!r}")
    if told.read.at not in ("last-of", "every") and head.kind != "gated":
        check("read", told.read, {"at", "append"}, f"with read.at = {told.read.at!r}")
    if told.steps is not None:
        check("steps", told.steps, HEEDED_OF_STYLE[told.steps.style], f"with steps.style = {told.steps.style!r}")
    if told.read.at == "every" and num_outputs > 1 and told.score.probability_of is None:
        raise refuse("head.outputs", "are several, and a step has one score: give score.probability_of")
    normalizer = {"shift", "scale"}
    if head.kind == "gated":
        check("score", told.score, {"attributes", *normalizer}, "with head.kind = 'gated'")
    elif num_outputs == 1:
        check("score", told.score, normalizer, "with a single output")
    elif told.score.probability_of is not None:
        check("score", told.score, {"probability_of", *normalizer}, "with score.probability_of")


def _read(path: Path) -> _SpecFile:
    try:
        return _SpecFile.model_validate(tomllib.loads(path.read_text()))
    except tomllib.TOMLDecodeError as error:
        raise LoadFailed(f"{path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise LoadFailed(f"{path}: {where}: {first['msg']}; docs/models.md has every key") from error


class _Expected(nn.Module):
    """Logits of labels [rows, n] -> the mean of their values, weighted by softmax, and their probabilities."""

    def __init__(self, values: tuple[float, ...]) -> None:
        super().__init__()
        self._values = nn.Parameter(torch.tensor(values))

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        odds = logits.softmax(-1)
        return torch.cat([(odds * self._values).sum(-1, keepdim=True), odds], -1)


def _judge(checkpoint: Checkpoint, told: _Judge, refuse: Refuse) -> Recipe:
    if told.template.count("{response}") != 1 or told.template.count("{prompt}") != 1:
        raise refuse("judge.template", "must have {prompt} and {response} once each")
    if (told.verdict is None) == (not told.labels):
        raise refuse("judge.labels", "or judge.verdict: give one of them")
    if told.verdict is not None:
        return _writing_judge(checkpoint, told, told.verdict, refuse)
    if len(told.labels) < 2:
        raise refuse("judge.labels", "must be two at least")
    if len(told.values) != len(told.labels):
        raise refuse("judge.values", f"must be as many as there are labels: {len(told.labels)}")
    file = checkpoint.text_folder / "tokenizer.json"
    if not file.is_file():
        raise refuse("judge.labels", f"cannot be looked up: there is no {file.name}")
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    ids = []
    for label in told.labels:
        found = tokenizer.encode(label, add_special_tokens=False).ids
        if len(found) != 1:
            raise refuse("judge.labels", f"'{label}' is {len(found)} tokens and must be one")
        ids += found
    head = nn.Sequential(heads.linear(lm_rows(checkpoint, ids)), _Expected(told.values))
    return Recipe(
        family="judge",
        head=ModuleHead(head, 1 + len(ids)),
        head_keys=keys_below(checkpoint, "lm_head"),
        attributes=told.labels,
        is_probability=sorted(told.values) == [0.0, 1.0],
        judge=JudgeFormat(told.template),
    )


def _writing_judge(checkpoint: Checkpoint, told: _Judge, verdict: _Verdict, refuse: Refuse) -> Recipe:
    names = verdict.criteria
    if told.values:
        raise refuse("judge.values", "are of labels; leave them out")
    if len(set(names)) < len(names):
        raise refuse("judge.verdict.criteria", "has a name twice")
    if verdict.weights_of and len(verdict.weights_of) != len(names):
        raise refuse("judge.verdict.weights_of", f"must be as many as there are criteria: {len(names)}")
    if not verdict.lowest < verdict.highest:
        raise refuse("judge.verdict.lowest", f"is {verdict.lowest:g}, not less than highest, {verdict.highest:g}")
    for word, value in verdict.words.items():
        if not verdict.lowest <= value <= verdict.highest:
            raise refuse(f"judge.verdict.words.{word}", f"is {value:g}, not from lowest to highest")
    if verdict.pattern:
        try:
            groups = re.compile(at_the_end(verdict.pattern)).groupindex
        except re.error as error:
            raise refuse("judge.verdict.pattern", f"is no regular expression: {error}") from error
        if set(groups) != set(names):
            raise refuse("judge.verdict.pattern", f"must have a group by each criterion's name, (?P<{names[0]}>...)")
    if not (checkpoint.text_folder / "tokenizer.json").is_file():
        raise refuse("judge.verdict", "cannot be read: there is no tokenizer.json")
    lm_rows(checkpoint, (0,))  # for its error: what writes has a language model's head
    return Recipe(
        family="judge that writes",
        head=None,
        head_keys=keys_below(checkpoint, "lm_head"),
        attributes=names,
        judge=JudgeFormat(
            told.template,
            VerdictFormat(
                criteria=names,
                weights=verdict.weights_of or (1 / len(names),) * len(names),
                lowest=verdict.lowest,
                highest=verdict.highest,
                max_tokens=verdict.max_tokens,
                pattern=verdict.pattern,
                words=tuple(verdict.words.items()),
            ),
        ),
    )


def _head(checkpoint: Checkpoint, told: _Head, refuse: Refuse) -> Head | nn.Module:
    kind, ids = told.kind, told.ids
    if kind == "lm_odds":
        if len(ids) != 2:
            raise refuse("head.ids", "must be two: the token that is good, and the one that is not")
        return odds_head(checkpoint, *ids)
    if kind == "lm_rows":
        if not ids:
            raise refuse("head.ids", "is missing: ids of the tokens whose logits are read")
        return heads.linear(lm_rows(checkpoint, ids))
    prefix, outputs = told.weights, told.outputs
    first = f"{prefix}.0.weight" if kind == "mlp" else f"{prefix}.weight"
    if not prefix or not checkpoint.has(first):
        keys = ", ".join(sorted(key for key in checkpoint.where if "layers." not in key)[:12])
        what = f"is not what a head's keys begin with: no '{first}', which kind = {kind!r} has"
        raise refuse("head.weights", f"'{prefix}' {what}; there are {keys}")
    scalar_head(checkpoint, prefix, outputs * told.quantiles)  # for its errors
    if kind == "mlp":
        return layers_below(checkpoint, prefix, HIDDEN[told.hidden])
    bias = checkpoint.tensor(f"{prefix}.bias") if checkpoint.has(f"{prefix}.bias") else None
    product = heads.linear(checkpoint.tensor(f"{prefix}.weight"), bias)
    return _gated(checkpoint, told, product, refuse) if kind == "gated" else product


def _gated(checkpoint: Checkpoint, told: _Head, rewards: nn.Linear, refuse: Refuse) -> Head:
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
    transform = tensor("transform", told.transform) if told.transform else torch.eye(outputs)
    if transform.shape != (outputs, outputs):
        raise refuse("head.transform", f"is of shape {tuple(transform.shape)}, not {(outputs, outputs)}")
    scale = tensor("gate_scale", told.gate_scale).flatten() if told.gate_scale else torch.ones(1)
    if len(scale) not in (1, outputs):
        raise refuse("head.gate_scale", f"has {len(scale)} numbers; it must have one, or one for each output")
    head = heads.GatedHead(rewards, gate, scale, told.temperature, transform)
    return ModuleHead(head, outputs * told.quantiles + outputs)


class _Weighted(nn.Module):
    """Outputs [rows, n] -> their weighted sum, and themselves [rows, 1 + n]."""

    def __init__(self, weights: tuple[float, ...]) -> None:
        super().__init__()
        self._weights = nn.Parameter(torch.tensor(weights))

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([(outputs * self._weights).sum(-1, keepdim=True), outputs], -1)


def _scored(head: Head | nn.Module, num_outputs: int, told: _SpecFile, refuse: Refuse) -> Head:
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
    if len(layers) == 1 and isinstance(head, nn.Linear):
        return LinearHead(head.weight.data, None if head.bias is None else head.bias.data)
    return ModuleHead(nn.Sequential(*layers), 1)
