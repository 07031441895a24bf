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

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rewardserve.errors import LoadFailed

Refuse = Callable[[str, str], LoadFailed]  # the key, and what is wrong with it
TokenId = Annotated[int, Field(ge=0)]  # a negative one would be counted from the vocabulary's end
LARGEST = 1e9  # of a number: scores are fp32, in which a sum of greater ones' products could be infinite
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Divisor = Annotated[float, Field(ge=1 / LARGEST, le=LARGEST, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HeadKeys(Section):
    kind: Literal["linear", "mlp", "lm_rows", "lm_odds", "gated"]
    weights: str = ""
    outputs: int = Field(default=1, ge=1)
    activation: Literal["none", "sigmoid"] = "none"
    hidden: Literal["relu", "selu", "gelu", "silu", "tanh"] = "relu"
    ids: tuple[TokenId, ...] = ()
    gate: str = ""
    quantiles: int = Field(default=1, ge=1)
    temperature: Divisor = 1.0
    gate_scale: str = ""
    transform: str = ""


class ReadKeys(Section):
    at: Literal["last", "first", "mean", "last-of", "every"] = "last"
    pattern: tuple[int, ...] = ()
    offset: int = Field(default=0, ge=0, lt=2**31)  # of positions, which are counted in no more
    append: TokenId | None = None


class StepsKeys(Section):
    style: Literal["ends", "apart", "tagged", "turns"]
    separator: str = Field(default="\n\n", min_length=1)
    tag: str = ""
    joint: str = ""


class ScoreKeys(Section):
    attributes: tuple[str, ...] = ()
    weights_of: tuple[Number, ...] = ()
    probability_of: int | None = Field(default=None, ge=0)
    shift: Number = 0.0
    scale: Divisor = 1.0


class VerdictKeys(Section):
    criteria: tuple[str, ...] = Field(min_length=1)
    weights_of: tuple[Number, ...] = ()
    lowest: Number
    highest: Number
    max_tokens: int = Field(default=1024, ge=1)
    pattern: str = ""
    words: dict[str, float] = {}


class JudgeKeys(Section):
    template: str
    labels: tuple[str, ...] = ()
    values: tuple[Number, ...] = ()
    verdict: VerdictKeys | None = None


class SpecFile(Section):
    head: HeadKeys | None = None
    judge: JudgeKeys | None = None
    read: ReadKeys = ReadKeys()
    steps: StepsKeys | None = None
    score: ScoreKeys = ScoreKeys()


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


BY_ENDS = ("ends", "apart")  # each step's last token is read; of the other styles what `read` finds


def read_keys(path: Path) -> SpecFile:
    """Raises LoadFailed naming the key that is unknown or of the wrong kind."""
    try:
        return SpecFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except RecursionError as error:
        raise LoadFailed(f"{path}: is nested too deeply") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise LoadFailed(f"{path}: {where}: {first['msg']}; docs/models.md has every key") from error
    except ValueError as error:  # no TOML, not UTF-8, or a number of more digits than Python reads
        raise LoadFailed(f"{path}: {error}") from error


def refuse_unheeded(told: SpecFile, head: HeadKeys, num_outputs: int, refuse: Refuse) -> None:
    """A key that does nothing is a mistake: who wrote it believes that it does something."""

    def check(name: str, section: Section | None, heeded: set[str], of: str) -> None:
        if section is not None and (others := sorted(section.model_fields_set - heeded)):
            raise refuse(", ".join(f"{name}.{key}" for key in others), f"does nothing {of}; leave it out")

    check("head", head, HEEDED_OF_KIND[head.kind], f"with head.kind = {head.kind!r}")
    if told.read.at not in ("last-of", "every") and head.kind != "gated":
        check("read", told.read, {"at", "append"}, f"with read.at = {told.read.at!r}")
    if told.steps is not None:
        check("steps", told.steps, HEEDED_OF_STYLE[told.steps.style], f"with steps.style = {told.steps.style!r}")
    by_ends = False
    if told.steps is not None and head.kind != "gated":  # of which no steps are read
        _check_steps(told, told.steps, refuse)
        by_ends = told.steps.style in BY_ENDS
    if (told.read.at == "every" or by_ends) and num_outputs > 1 and told.score.probability_of is None:
        raise refuse("head.outputs", "are several, and a step has one score: give score.probability_of")
    normalizer = {"shift", "scale"}
    if head.kind == "gated":
        check("score", told.score, {"attributes", *normalizer}, "with head.kind = 'gated'")
    elif num_outputs == 1:
        check("score", told.score, normalizer, "with a single output")
    elif told.score.probability_of is not None:
        check("score", told.score, {"probability_of", *normalizer}, "with score.probability_of")


def _check_steps(told: SpecFile, steps: StepsKeys, refuse: Refuse) -> None:
    style, by_ends = f"steps.style = {steps.style!r}", steps.style in BY_ENDS
    if steps.style in ("tagged", "apart") and not steps.tag:
        raise refuse("steps.tag", f"is missing: with {style} it ends a step")
    if by_ends and told.read.at == "every":
        raise refuse("read.at", f"is 'every'; with {style} the last token of each step is read: leave it out")
    if by_ends and told.read.append is not None:
        raise refuse("read.append", f"does nothing with {style}: it ends a response and no step; leave it out")
    if not by_ends and told.read.at == "last":
        raise refuse("read.at", f"is 'last'; with {style} it must be 'every', and read.pattern what ends a step")
