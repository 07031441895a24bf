"""The bundled model: small, honest about itself, and as good on held-out prompts as its card says."""

import json
import os
import re
import subprocess
import sys
import uuid
from collections import defaultdict
from pathlib import Path

import demo_data
import psutil
import pytest
import torch
from evaluate_demo_model import held_out_pairs, reward_ids
from rewardserve.client import RewardClient
from scoring import native
from texts import CANDIDATES
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "demo_model"
CARD = (FOLDER / "README.md").read_text()
needs_data = pytest.mark.skipif(not CANDIDATES.exists(), reason=f"{CANDIDATES} is not here")


def test_the_model_is_small_and_its_card_states_what_it_must() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 20_000_000
    for stated in ("cc-by-nc-4.0", "hh-rlhf", "AlpacaEval", "demo", "longer is better", "off-topic"):
        assert stated in CARD, stated


@pytest.mark.timeout(300)
def test_make_demo_ranks_every_prompt_over_grpc_and_leaves_nothing_running() -> None:
    rows = [json.loads(line) for line in (ROOT / "examples" / "demo.jsonl").read_text().splitlines()]
    assert len(rows) >= 8
    mark = f"TEST_OF_THE_DEMO_{uuid.uuid4().hex}"  # inherited by all that the demo starts, and by nothing else
    demo = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", mark: "1"},
    )
    assert demo.returncode == 0, demo.stderr
    ranked = re.findall(r"^ +1 +(-?\d+\.\d+) +\d+ +(\S+)", demo.stdout, flags=re.M)
    assert len(ranked) == len(rows), demo.stdout
    assert sum(label == "good" for _, label in ranked) > len(rows) / 2
    assert not [process.cmdline() for process in psutil.process_iter() if mark in _environment(process)]


@pytest.mark.timeout(300)
def test_make_demo_kinds_serves_a_model_of_each_kind_by_its_own_name() -> None:
    demo = subprocess.run([sys.executable, ROOT / "examples" / "demo_kinds.py"], capture_output=True, text=True)
    assert demo.returncode == 0, demo.stderr
    rows = re.findall(r"^│ (\S+) +│ (\S+) +│ (-?\d+\.\d+) +│ (\w[\w ]*?) +│ (.*?) *│$", demo.stdout, flags=re.M)
    means = {name: means for name, _, _, means, _ in rows}
    members = {f"seed-{n}": "raw logit" for n in range(3)}
    kinds = {
        "scalar": "raw logit",
        "mean": "raw logit",
        "mlp": "raw logit",
        "gated": "raw logit",
        "encoder": "raw logit",
        "ensemble": "raw logit",
    }
    assert means == {**members, **kinds, "steps": "probability", "judge": "probability"}
    besides = {name: text for name, *_, text in rows}
    assert besides["steps"].startswith("steps ") and besides["steps"].count(",") == 2
    assert "Yes 0." in besides["judge"] and "seed-2" in besides["ensemble"]


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:  # gone meanwhile, or another user's
        return {}


@needs_data
@pytest.mark.timeout(600)
async def test_held_out_accuracy_through_the_packed_engine_is_what_the_card_says() -> None:
    """In bf16, as it is served; the card's figures are by plain Hugging Face in fp32."""
    split = demo_data.load_splits(CANDIDATES.parent)["test"]
    split = demo_data.Split(split.candidates[:40], [])
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    pairs = held_out_pairs(split)
    by_prompt: dict[str, dict[str, None]] = defaultdict(dict)
    for pair in pairs:
        by_prompt[pair.messages[0]["content"]].update({pair.chosen: None, pair.rejected: None})
    groups = [
        ([], [reward_ids(tokenizer, [{"role": "user", "content": prompt}], answer) for answer in answers])
        for prompt, answers in by_prompt.items()
    ]
    async with native(FOLDER) as scorer:
        assert scorer.info.path == "packed"
        scores = iter((await scorer.scores([_shared(ids) for _, ids in groups])).tolist())
    rewards = {(prompt, answer): next(scores) for prompt, answers in by_prompt.items() for answer in answers}
    hits: dict[str, list[bool]] = defaultdict(list)
    for pair in pairs:
        prompt = pair.messages[0]["content"]
        hit = rewards[prompt, pair.chosen] > rewards[prompt, pair.rejected]
        hits[pair.kind].append(hit)
        if pair.kind in demo_data.BROKEN_KINDS:
            hits["broken"].append(hit)
    shares = {kind: sum(found) / len(found) for kind, found in hits.items()}
    print(shares)
    assert shares["preference"] >= 0.75
    assert shares["broken"] >= 0.80


def _shared(rows: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Rows -> their common beginning and what follows it in each."""
    most = min(map(len, rows)) - 1
    length = next((i for i in range(most) if len({row[i] for row in rows}) > 1), most)
    return rows[0][:length], [row[length:] for row in rows]


@needs_data
async def test_scores_over_the_wire_are_those_of_plain_hugging_face(tmp_path: Path) -> None:
    """The author's number, from text to score: chat template, tokenizer, packing, head, all at once, in fp32."""
    from evaluate_demo_model import load, score
    from server_process import ServerProcess

    split = demo_data.load_splits(CANDIDATES.parent)["test"].candidates[:6]
    model, tokenizer = load(FOLDER)
    items = [(prompt.messages, answer.text) for prompt in split for answer in prompt.answers[:5]]
    wanted = torch.tensor(score(model, tokenizer, items))
    with ServerProcess(f"demo={FOLDER}", "--dtype", "float32") as server, RewardClient(server.endpoint) as client:
        from rewardserve.client import Group

        groups = [Group(prompt.messages, [answer.text for answer in prompt.answers[:5]]) for prompt in split]
        result = client.score(groups, overflow="truncate_response_right")
    got = torch.tensor([item.score for group in result.groups for item in group.items])
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
