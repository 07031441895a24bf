"""The script that trains the demo model goes by the same trainer; what it brings itself is the curriculum."""

import argparse
import random

import torch
from demo_data import Pair
from preferences import pair_rows
from rewardserve.training import base
from rewardserve.training.recipe import Recipe
from train_demo_model import SYSTEM_PROMPTS, to_row, train_reward_model

PAIRS = [
    Pair("preference", [{"role": "user", "content": row["prompt"]}], row["chosen"], row["rejected"])
    for row in pair_rows(16)
]


def test_a_stage_trains_what_is_open_and_leaves_the_rest(reward_base):
    model = base.load_base(reward_base, Recipe(), seed=0)
    model.model.layers[0].self_attn.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    args = argparse.Namespace(batch_size=8, bf16=False, seed=1, max_length=256)
    train_reward_model(model, PAIRS, reward_base, args, accumulate=2, learning_rate=1e-3, warmup_steps=1)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "layers.0.self_attn" not in name}


def test_some_conversations_begin_with_a_system_message():
    rng = random.Random(0)
    rows = [to_row(PAIRS[0], line, rng) for line in range(400)]
    first = [row.prompt.messages[0] for row in rows]
    systems = [message.content for message in first if message.role == "system"]
    assert 10 < len(systems) < 80 and set(systems) == set(SYSTEM_PROMPTS)
    assert all(row.responses == (PAIRS[0].chosen, PAIRS[0].rejected) for row in rows)
