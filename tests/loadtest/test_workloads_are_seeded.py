import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rewardserve.client import ChatMessage, Group, Rendered, TokenIds
from rewardserve.loadtest import workloads
from rewardserve.loadtest.workloads import NoData, Traffic

SYNTHETIC = [name for name in workloads.names() if not workloads.needs_data(name)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A few rows in the layout of the real files."""
    candidates = [{"prompt": f"q{n}", "candidates": [{"response": f"a{m}"} for m in range(20)]} for n in range(5)]
    pairs = [{"messages": [{"role": "user", "content": f"q{n}"}], "chosen": "yes", "rejected": " "} for n in range(5)]
    for name, rows in (("candidates", candidates), ("harmless_pairs", pairs)):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return tmp_path


@pytest.mark.parametrize("name", workloads.names())
def test_the_same_seed_gives_the_same_work(name, data):
    traffic = Traffic(7, seed=1, data=data, vocab_size=400, scale=8)
    made = workloads.make(name, traffic)
    assert len(made.groups) == 7 and made.description and made.num_pairs == sum(len(g.responses) for g in made.groups)
    assert made == workloads.make(name, traffic) != workloads.make(name, replace(traffic, seed=2))


@pytest.mark.parametrize("name", SYNTHETIC)
def test_token_ids_stay_within_the_vocabulary_even_when_cold(name):
    for group in workloads.make(name, Traffic(2, vocab_size=64, scale=16)).groups:
        changed = workloads.cold(group, 2**24 - 1)
        assert len(changed.prompt) == len(group.prompt) and changed.responses == group.responses
        assert all(0 <= token < 64 for ids in (changed.prompt, *group.responses) for token in ids)


def test_real_text_without_its_data_says_where_to_give_it(tmp_path):
    with pytest.raises(NoData, match="--data"):
        workloads.make("pairs", Traffic(1, data=tmp_path))
    with pytest.raises(NoData, match="--data"):
        workloads.make("best_of_16", Traffic(1))


def test_token_ids_without_a_vocabulary_are_refused():
    with pytest.raises(ValueError, match="vocabulary"):
        workloads.make("ppo", Traffic(1))


@pytest.mark.parametrize(
    "prompt",
    [
        "text",
        Rendered("<|user|>text"),
        [{"role": "user", "content": "text"}, {"role": "assistant", "content": "yes"}],
        [ChatMessage("system", "text")],
        TokenIds(range(100, 140)),
    ],
)
def test_every_kind_of_prompt_can_begin_differently(prompt):
    colds = [workloads.cold(Group(prompt, ["r"]), salt).prompt for salt in (0, 1, 8**5)]
    assert all(type(each) is type(prompt) for each in colds)
    assert colds[0] != colds[1] != colds[2] != colds[0]
    assert colds[1] == workloads.cold(Group(prompt, ["r"]), 1).prompt
