"""No skew between training and serving: the trainer's own numbers come back over gRPC, from text on both sides."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from preferences import material_of, pair_rows, parsed, save_causal_base, save_reward_base
from rewardserve.training import base, data, member
from rewardserve.training.recipe import Recipe
from rewardserve.v1 import scoring_pb2

BEFORE = [
    {"role": "system", "content": "Answer at once."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
]
RECIPE = Recipe(max_steps=4, batch_size=4, learning_rate=1e-2, head_dropout=0.1, use_cpu=True)


def conversations() -> Iterator[dict[str, Any]]:
    """A prompt alone, and the same late in a conversation."""
    for row in pair_rows(4):
        yield row
        turns = [*BEFORE, {"role": "user", "content": row["prompt"]}]
        yield {"messages": turns, "chosen": row["chosen"], "rejected": row["rejected"]}


def test_the_trainers_scores_are_those_over_grpc(start, kit, tmp_path):
    """Of a whole model; that merged adapters are loaded to the same numbers is held in tests/training."""
    causal = save_causal_base(tmp_path / "base", like=save_reward_base(tmp_path / "like"))
    encoder = data.make_encoder(causal, base.read_config(causal), 256)
    measured = data.held_out_set(data.encode(parsed(list(conversations())), encoder, "rows"), "bradley-terry", "rows")
    material = replace(material_of(causal), held_out=measured)
    trained = member.train_member(material, RECIPE, 0, tmp_path / "out")
    wanted = torch.from_numpy(trained.held_out_scores).float()
    assert wanted.std() > 0.05  # or anything would agree

    server = start("--model", f"trained={tmp_path / 'out'}").ready()
    reply = server.scoring.Score(
        scoring_pb2.ScoreRequest(groups=[group_of(row) for row in conversations()]), timeout=kit.ANTI_HANG_S
    )
    got = torch.tensor(kit.scores_of(reply))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def group_of(row: dict[str, Any]) -> scoring_pb2.Group:
    if "prompt" in row:
        prompt = scoring_pb2.Prompt(text=row["prompt"])
    else:
        turns = [scoring_pb2.ChatMessage(**turn) for turn in row["messages"]]
        prompt = scoring_pb2.Prompt(conversation=scoring_pb2.Conversation(messages=turns))
    return scoring_pb2.Group(
        prompt=prompt, responses=[scoring_pb2.Response(text=row[key]) for key in ("chosen", "rejected")]
    )
