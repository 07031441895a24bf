"""A judge that writes before it decides: its verdict is the score, and what is no verdict fails its own item."""

import json

import grpc
import pytest
from rewardserve.client import Group, RewardClient
from rewardserve.v1 import models_pb2
from tokenizers import Tokenizer
from writing_judge import END, save_writing_judge

TOLD = """
[judge]
template = "Q: {prompt} A: {response}"
[judge.verdict]
criteria = ["correct", "clear"]
weights_of = [0.75, 0.25]
lowest = 1
highest = 10
max_tokens = 20
"""
STOP = "<|stop|>"  # ends a turn, too, by generation_config.json alone; to the tokenizer it is text like any other
SAID = {
    "good": ["Let me think. ", "It is right.\n", '{"correct": 9, "clear": 5}', END],
    "poor": ["Hm. ", '{"correct": 2, "clear": 3}', "\n", END],
    "mute": ["I cannot say.", END],
    "loud": ["More! ", '{"correct": 11, "clear": 5}', END],
    "other": ['{"correct": 4, "clear": 4}', STOP],
    "endless": ["and ", "on ", "and "],
}
INTERNAL = grpc.StatusCode.INTERNAL


@pytest.fixture(scope="module")
def server(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("writing")
    save_writing_judge(folder, SAID, TOLD)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = [tokenizer.token_to_id(token) for token in (END, STOP)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return start("--model", f"judge={folder}", "--prefix-cache-mb", "8").ready()


@pytest.fixture(scope="module")
def client(server):
    with RewardClient(server.target) as client:
        yield client


def test_the_verdict_is_the_score_and_its_criteria_are_attributes(client) -> None:
    good, poor = client.score([Group("What?", ["It is good", "It is poor"])]).groups[0].items
    assert (good.score, poor.score) == (0.75 * 9 + 0.25 * 5, 0.75 * 2 + 0.25 * 3)
    assert good.attributes == {"correct": 9, "clear": 5} and poor.attributes == {"correct": 2, "clear": 3}
    assert good.kind == "rating"


def test_what_is_no_verdict_fails_its_own_item_and_says_what_was_written(client) -> None:
    words = ["good", "mute", "loud", "endless", "poor"]
    items = client.score([Group("What?", [f"It is {word}" for word in words])]).groups[0].items
    assert [item.ok for item in items] == [True, False, False, False, True]
    assert {item.status.code for item in items if not item.ok} == {INTERNAL}
    said = [item.status.message for item in items if not item.ok]
    assert "it ends in no JSON object; what it wrote ends in 'I cannot say.'" in said[0]
    assert "correct is 11, not from 1 to 10" in said[1]
    assert "it came to no end within max_tokens = 20" in said[2]


def test_what_ends_a_turn_is_no_part_of_what_was_written(client) -> None:
    (item,) = client.score([Group("What?", ["It is other"])]).groups[0].items
    assert item.score == 4


def test_rank_goes_by_the_verdict(client) -> None:
    ranking = client.rank("What?", ["It is poor", "It is good"])
    assert [entry.index for entry in ranking.ranked] == [1, 0]


def test_a_question_leaves_room_for_the_verdict(client) -> None:
    (item,) = client.score([Group("x" * 300, ["It is good"])]).groups[0].items
    assert item.status.code is grpc.StatusCode.OUT_OF_RANGE and "max_length 236" in item.status.message


def test_it_is_served_by_vllm_without_being_asked(server) -> None:
    model = server.model()
    assert model.path == models_pb2.EXECUTION_PATH_VLLM
    assert "a judge that writes its verdict" in model.path_reason
    assert server.metric("engine_restarts_total") == 0
