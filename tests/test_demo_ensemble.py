"""The bundled ensemble: small adapters over the demo model, honest about themselves, and of more than one mind."""

import json
from pathlib import Path

import pytest
import torch
from evaluate_demo_model import load, reward_ids, score
from peft import PeftModel
from rewardserve.models import loader
from rewardserve.models.spec import read_spec
from transformers import AutoTokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
BASE, FOLDER = EXAMPLES / "demo_model", EXAMPLES / "demo_ensemble"
MEMBERS = [FOLDER / f"seed-{seed}" for seed in range(3)]
CARD = (FOLDER / "README.md").read_text()


def test_it_is_small_and_holds_adapters_and_their_figures():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 2_000_000
    for member in MEMBERS:
        names = {file.name for file in member.iterdir()}
        assert names == {"adapter_config.json", "adapter_model.safetensors", "training.json"}
        config = json.loads((member / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "../../demo_model" and "score" in config["modules_to_save"]


def test_its_card_states_what_it_must_and_its_figures_are_those_of_the_training():
    for stated in ("cc-by-nc-4.0", "CC BY-NC 4.0", "hh-rlhf", "AlpacaEval", "train_demo_ensemble.py"):
        assert stated in CARD, stated
    figures = [json.loads((member / "training.json").read_text())["held_out"] for member in MEMBERS]
    together = json.loads((FOLDER / "training.json").read_text())["held_out"]
    for shares in (*figures, together["mean"]):
        for share in (shares["overall"], *shares["domains"].values()):
            assert f"{share['accuracy']:.1%}" in CARD
    assert f"{together['disagreement']:.1%}" in CARD


@pytest.fixture(scope="module")
def rewards() -> torch.Tensor:
    """[members, answers] of the demo's file, in float32."""
    rows = [json.loads(line) for line in (EXAMPLES / "demo.jsonl").read_text().splitlines()]
    items = [(row["messages"], response) for row in rows for response in row["responses"]]
    found = []
    for member in MEMBERS:
        base, tokenizer = load(BASE)
        model = PeftModel.from_pretrained(base, member).merge_and_unload().eval()
        found.append(score(model, tokenizer, items))
    return torch.tensor(found)


def test_the_mean_of_the_members_puts_good_answers_first(rewards):
    rows = [json.loads(line) for line in (EXAMPLES / "demo.jsonl").read_text().splitlines()]
    per_row = rewards.mean(0).split([len(row["responses"]) for row in rows])
    first = [row["labels"][int(means.argmax())] for row, means in zip(rows, per_row, strict=True)]
    assert first.count("good") > len(rows) / 2


def test_members_differ_and_yet_agree_on_most(rewards):
    assert (rewards.std(0) > 1e-3).all()
    assert torch.corrcoef(rewards).min() > 0.5


def test_serving_gives_the_members_scores(rewards):
    """Read by the server's own loader, against PEFT."""
    rows = [json.loads(line) for line in (EXAMPLES / "demo.jsonl").read_text().splitlines()][:3]
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = [torch.tensor(reward_ids(tokenizer, row["messages"], text)) for row in rows for text in row["responses"]]
    for member, wanted in zip(MEMBERS, rewards, strict=True):
        model = loader.load(read_spec(str(member)), torch.float32, torch.device("cpu"))
        got = model.features_padded(ids, [[len(row) - 1] for row in ids])[:, 0]
        torch.testing.assert_close(got, wanted[: len(ids)], rtol=1e-4, atol=1e-4)
