"""Preferences that a tiny model learns in seconds, and tiny bases to learn them."""

import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from rewardserve.training import base, data, member
from rewardserve.training.rows import Row, parse_rows
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
TOPICS = [
    "tea",
    "rain",
    "cats",
    "chess",
    "salt",
    "moss",
    "trains",
    "glass",
    "bread",
    "stars",
    "wool",
    "rivers",
    "lamps",
    "paint",
    "snow",
    "coal",
]


def pair_rows(number: int, domains: Sequence[str] = ("",)) -> list[dict[str, Any]]:
    """Helpful words against unhelpful ones, at all lengths: what is better can be seen, but not by length."""
    rows = []
    for index in range(number):
        topic = TOPICS[index % len(TOPICS)]
        more = " about " + " and ".join(TOPICS[: index % 5 + 1])
        good, bad = f"Gladly, here is all{more}.", f"No, I will not say{more}."
        row = {"prompt": f"Tell me of {topic}, part {index}.", "chosen": good, "rejected": bad}
        rows.append({**row, "domain": domains[index % len(domains)]})
    return rows


def rated_rows(number: int) -> list[dict[str, Any]]:
    rows = []
    for row in pair_rows(number):
        responses = [row["rejected"], row["chosen"], "Gladly. No."]
        rows.append({"prompt": row["prompt"], "responses": responses, "ratings": [0.0, 1.0, 0.5]})
    return rows


def parsed(rows: Sequence[dict[str, Any]]) -> list[Row]:
    return list(parse_rows([json.dumps(row).encode() for row in rows], "rows"))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def save_reward_base(folder: Path, **overrides: Any) -> Path:
    """A reward model of random weights with a tokenizer and a chat template."""
    checkpoints.save_checkpoint(folder, texts=[json.dumps(pair_rows(40))], **{**SMALL, **overrides})
    return folder


def save_causal_base(folder: Path, like: Path) -> Path:
    """A language model of random weights, of the shape of the base `like`."""
    config = AutoConfig.from_pretrained(like)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    checkpoints.make_tokenizer([json.dumps(pair_rows(40))]).save_pretrained(folder)
    return folder


def material_of(folder: Path, rows: Sequence[dict[str, Any]] = (), **options: Any) -> member.Material:
    """Pairs to train on, the first ten of which are measured with."""
    encoder = data.make_encoder(folder, base.read_config(folder), 256)
    encoded = data.encode(parsed(rows or pair_rows(12)), encoder, "rows")
    train = data.training_set(encoded, "bradley-terry", 0, "rows")
    held_out = data.held_out_set(encoded[:10], "bradley-terry", "rows")
    return member.Material(folder, str(folder), train, held_out, torch.float32, **options)


@pytest.fixture(scope="session", autouse=True)
def quick_garbage_collection() -> Iterator[None]:
    """Each trainer collects garbage as it begins: a third of a second, spent on looking through imported modules."""
    gc.freeze()
    yield
    gc.unfreeze()
