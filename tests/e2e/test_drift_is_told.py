"""A server that knows how scores were spread tells at every scrape how far they are from it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_model, save_checkpoint
from rewardserve.client import Group, RewardClient, TokenIds

NUM_GROUPS, SIBLINGS = 60, 4
PROMPT = [3, 5, 7]
RESPONSES = [[[10 + (7 * n + 3 * m) % 40] * (1 + m) for m in range(SIBLINGS)] for n in range(NUM_GROUPS)]
GROUPS = [Group(TokenIds(PROMPT), [TokenIds(ids) for ids in group]) for group in RESPONSES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    usual, other = tmp_path_factory.mktemp("usual"), tmp_path_factory.mktemp("other")
    save_checkpoint(usual)
    model = make_model("qwen3")
    model.score.weight.data.mul_(3.0)
    model.save_pretrained(other)
    return usual, other


@pytest.fixture(scope="module")
def reference(folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made as a user would make it."""
    folder = tmp_path_factory.mktemp("reference")
    rows = [{"prompt_token_ids": PROMPT, "response_token_ids": group} for group in RESPONSES]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "rewardserve", "score", folder / "pairs.jsonl", folder / "scores.jsonl"]
    subprocess.run([*command, "--model", folders[0], "--threads", "1"], check=True, capture_output=True)
    return folder / "scores.jsonl"


def test_what_is_scored_as_before_is_no_drift_and_other_responses_are(start, folders, reference) -> None:
    usual, other = folders
    server = start(f"--model=rm={usual}", f"--drift-reference=rm={reference}", "--allow-model-control").ready()
    with RewardClient(server.target, timeout=120) as client:
        assert math.isnan(server.metric("score_drift"))
        client.score(GROUPS)
        assert server.metric("score_drift") == pytest.approx(0, abs=1e-9)
        assert server.metric("group_score_std_count") == NUM_GROUPS
        assert server.metric("response_tokens_sum") == NUM_GROUPS * sum(range(1, 1 + SIBLINGS))
        client.score([Group(TokenIds(PROMPT), [TokenIds([11, 12])] * SIBLINGS)] * NUM_GROUPS)  # one answer for all
        assert server.metric("score_drift") > 0.25
        client.swap_model("rm", str(other))
        client.score(GROUPS)
        assert math.isnan(server.metric("score_drift"))
        assert server.wait_for_log("no drift is told: --drift-reference is of version")
        client.unload_model("rm")
        assert ("rewardserve_score_drift", ()) not in server.metrics()
        client.load_model("rm", str(usual))
        client.score(GROUPS)
        assert server.metric("score_drift") == pytest.approx(0, abs=1e-9)


def test_a_reference_that_is_none_ends_the_server_with_its_line(start, folders, tmp_path: Path) -> None:
    (tmp_path / "scores.jsonl").write_text("[]\n")
    server = start(f"--model=rm={folders[0]}", f"--drift-reference=rm={tmp_path / 'scores.jsonl'}")
    assert server.wait() == 1
    assert any("scores.jsonl line 1 is no row of scores" in line for line in server.log)
