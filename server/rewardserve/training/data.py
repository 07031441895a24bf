"""Rows -> token ids to train on and to measure with: by the code that serves them, so that no token differs."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedConfig

from rewardserve.errors import InvalidRequest, LoadFailed
from rewardserve.models.text_export import export_text
from rewardserve.options import ConfigError
from rewardserve.text.encoder import Encoder
from rewardserve.text.placing import EncodedRequest
from rewardserve.text.tokenizer import Tokenizer
from rewardserve.training.held_out import HeldOut, Judged
from rewardserve.training.recipe import Loss
from rewardserve.training.rows import BadRow, Comparison, Row
from rewardserve.training.split import prompt_key
from rewardserve.types import PromptGroup, ScoreRequest

Ids = np.ndarray  # [tokens] int32


def make_encoder(folder: Path, config: PreTrainedConfig, max_length: int) -> Encoder:
    """What serves the checkpoint in `folder`, for texts of up to `max_length` tokens. Raises LoadFailed."""
    spec, reason = export_text(folder)
    if spec is None:
        raise LoadFailed(f"{folder}: texts are needed for training, and there is no tokenizer: {reason}")
    return Encoder(Tokenizer(spec), config.get_text_config().vocab_size, max_length)


@dataclass(frozen=True, slots=True)
class EncodedRow:
    row: Row
    ids: tuple[Ids | None, ...]  # of prompt and response; None where they are longer than max_length

    @property
    def comparisons(self) -> list[Comparison]:
        """Those of responses that fit."""
        both = [(c, self.ids[c.better], self.ids[c.worse]) for c in self.row.comparisons]
        return [c for c, better, worse in both if better is not None and worse is not None]


def encode(rows: Sequence[Row], encoder: Encoder, name: str) -> list[EncodedRow]:
    """`name` is what the rows' file is called in errors. Raises BadRow for a prompt that the template refuses."""
    return [_encode_row(row, encoder, name) for row in rows]


def _encode_row(row: Row, encoder: Encoder, name: str) -> EncodedRow:
    request = ScoreRequest("", "", (PromptGroup("", row.prompt, row.responses),))
    try:
        return EncodedRow(row, tuple(_ids_of(encoder.encode(request))))
    except InvalidRequest as error:
        raise BadRow(f"{name} line {row.line}: {error.field.removeprefix('groups[0].')}: {error.description}") from None


def _ids_of(encoded: EncodedRequest) -> Iterator[Ids | None]:
    for item in encoded.items[0]:
        if item.failure is not None:
            yield None
        else:
            group = encoded.groups[item.group]
            yield np.frombuffer(group.prompt + group.responses[item.index], "<i4")


def count_too_long(rows: Sequence[EncodedRow]) -> int:
    """Responses that are left out."""
    return sum(ids is None for row in rows for ids in row.ids)


# -- to train on -------------------------------------------------------------------------------------------------------


def training_set(rows: Sequence[EncodedRow], loss: Loss, pairs_per_prompt: int, name: str) -> Dataset:
    """What the trainer takes: pairs for Bradley-Terry, else single responses with their target.

    Pairs have chosen_ids, rejected_ids, label and margin; responses have ids and target; both have their length in
    tokens and the number of their prompt. `pairs_per_prompt` bounds the pairs of one row, drawn at random, always the
    same ones; 0: all of them.
    Raises ConfigError where there is nothing to learn from, BadRow for a row that this loss can make nothing of.
    """
    numbers: dict[str, int] = {}
    examples = []
    for row in rows:
        prompt = numbers.setdefault(prompt_key(row.row.prompt), len(numbers))
        found = _pairs(row, pairs_per_prompt) if loss == "bradley-terry" else _targets(row, loss, name)
        examples += [example | {"prompt": prompt} for example in found]
    if not examples:
        raise ConfigError(f"{name}: nothing to train on is left: see --held-out, --max-length and --loss")
    return Dataset.from_dict({key: [example[key] for example in examples] for key in examples[0]})


def drawn(train: Dataset, seed: int) -> Dataset:
    """As many prompts as it has, drawn with replacement, each with all of its examples: bagging (Breiman, 1996).

    Of prompts, not of examples: what is learned from one prompt's examples is much the same.
    """
    _, prompts = np.unique(train["prompt"][:], return_inverse=True)
    num_prompts = prompts.max() + 1
    times = np.bincount(np.random.default_rng(seed).integers(num_prompts, size=num_prompts), minlength=num_prompts)
    return train.select(np.repeat(np.arange(len(prompts)), times[prompts]))


def _pairs(row: EncodedRow, at_most: int) -> Iterator[dict[str, Any]]:
    comparisons = row.comparisons
    if 0 < at_most < len(comparisons):
        comparisons = random.Random(row.row.line).sample(comparisons, at_most)
    for comparison in comparisons:
        better, worse = row.ids[comparison.better], row.ids[comparison.worse]
        assert better is not None and worse is not None
        yield {
            "chosen_ids": better,
            "rejected_ids": worse,
            "label": comparison.label,
            "margin": comparison.margin,
            "length": max(len(better), len(worse)),
        }


def _targets(row: EncodedRow, loss: Loss, name: str) -> Iterator[dict[str, Any]]:
    for ids, target in zip(row.ids, targets(row.row, loss, name), strict=True):
        if ids is not None:
            yield {"ids": ids, "target": target, "length": len(ids)}


def targets(row: Row, loss: Loss, name: str) -> Sequence[float]:
    """What the loss of single responses wants of each response. Raises BadRow if the row does not say."""
    if loss == "mse":
        if row.ratings is None:
            raise BadRow(f"{name} line {row.line}: ratings: are missing; --loss mse learns from rated responses only")
        return row.ratings
    if row.ratings is None:
        (comparison,) = row.comparisons
        ordered = {comparison.better: comparison.label, comparison.worse: 1 - comparison.label}
        return [ordered[index] for index in range(2)]
    for index, rating in enumerate(row.ratings):
        if not 0 <= rating <= 1:
            raise BadRow(
                f"{name} line {row.line}: ratings[{index}]: {rating:g} is no probability; --loss classification takes "
                "ratings from 0 to 1"
            )
    return row.ratings


# -- to measure with ---------------------------------------------------------------------------------------------------


def held_out_set(rows: Sequence[EncodedRow], loss: Loss, name: str) -> HeldOut:
    """Each response once, however many comparisons it stands in. Ties are left out: no order of theirs is wrong."""
    ids: list[Ids] = []
    judged: list[Judged] = []
    wanted: list[float] = []
    for row in rows:
        comparisons = [comparison for comparison in row.comparisons if not comparison.is_tie]
        needed = sorted({index for c in comparisons for index in (c.better, c.worse)})
        places = {index: len(ids) + place for place, index in enumerate(needed)}
        ids += [kept for index in needed if (kept := row.ids[index]) is not None]
        if loss != "bradley-terry":
            of_row = targets(row.row, loss, name)
            wanted += [of_row[index] for index in needed]
        judged += [Judged(places[c.better], places[c.worse], c.label, c.margin, row.row.domain) for c in comparisons]
    return HeldOut(tuple(ids), tuple(judged), tuple(wanted))
