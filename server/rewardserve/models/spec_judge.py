"""[judge] of rewardserve.toml: a language model that is asked, read before it answers or once it has written."""

import re

import regex
import tokenizers
import torch
from torch import nn

from rewardserve.models.checkpoint import Checkpoint
from rewardserve.models.families import Recipe
from rewardserve.models.head_parts import keys_below, lm_logits
from rewardserve.models.heads import ModuleHead
from rewardserve.models.spec_keys import JudgeKeys, Refuse, VerdictKeys
from rewardserve.types import JudgeFormat, VerdictFormat, at_the_end


class _Expected(nn.Module):
    """Logits of labels [rows, n] -> the mean of their values, weighted by softmax, and their probabilities."""

    def __init__(self, values: tuple[float, ...]) -> None:
        super().__init__()
        self._values = nn.Parameter(torch.tensor(values))

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        odds = logits.softmax(-1)
        return torch.cat([(odds * self._values).sum(-1, keepdim=True), odds], -1)


def judge_recipe(checkpoint: Checkpoint, told: JudgeKeys, refuse: Refuse) -> Recipe:
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
    tokenizer.no_padding()  # which a tokenizer is saved with, if it was used so
    ids: list[int] = []
    for label in told.labels:
        found = tokenizer.encode(label, add_special_tokens=False).ids
        if len(found) != 1:
            raise refuse("judge.labels", f"'{label}' is {len(found)} tokens and must be one")
        if found[0] in ids:  # its probability would count twice
            raise refuse("judge.labels", f"'{label}' is the same token as '{told.labels[ids.index(found[0])]}'")
        ids += found
    head = nn.Sequential(lm_logits(checkpoint, ids), _Expected(told.values))
    return Recipe(
        family="judge",
        head=ModuleHead(head, 1 + len(ids)),
        head_keys=keys_below(checkpoint, "lm_head"),
        attributes=told.labels,
        is_probability=sorted(told.values) == [0.0, 1.0],
        judge=JudgeFormat(told.template),
    )


def _writing_judge(checkpoint: Checkpoint, told: JudgeKeys, verdict: VerdictKeys, refuse: Refuse) -> Recipe:
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
            regex.compile(at_the_end(verdict.pattern))  # what searches: it can be told when to stop
        except (re.error, regex.error) as error:
            raise refuse("judge.verdict.pattern", f"is no regular expression: {error}") from error
        if set(groups) != set(names):
            raise refuse("judge.verdict.pattern", f"must have a group by each criterion's name, (?P<{names[0]}>...)")
    if not (checkpoint.text_folder / "tokenizer.json").is_file():
        raise refuse("judge.verdict", "cannot be read: there is no tokenizer.json")
    lm_logits(checkpoint, (0,))  # for its error: what writes has a language model's head
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
