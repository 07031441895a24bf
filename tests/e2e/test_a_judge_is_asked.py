"""A language model that judges: asked by a template, read once where its answer would begin; never made to write."""

import json
from pathlib import Path

import pytest
from checkpoints import make_tokenizer
from rewardserve.client import ChatMessage, Group, InvalidRequest, RewardClient, TokenIds
from rewardserve.errors import LoadFailed
from rewardserve.models.spec import read_spec
from texts import all_texts, groups
from torch.nn import functional as F
from zoo import Kind, Wanted, no_head, write

QUESTION, ANSWERS = "What is 2 + 2? {response}", ["It is 4.", "It is 5, {prompt}.", ""]
TEMPLATE = "Q: {prompt}\nA: {response}\nIs that right? Say Y or N."
TOLD = f"[judge]\ntemplate = {json.dumps(TEMPLATE)}\nlabels = ['Y', 'N']\nvalues = [1.0, 0.0]\n"


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    tokenizer = make_tokenizer([*all_texts(groups(4, 4)), TEMPLATE])
    yes, no = (tokenizer.encode(label)[0] for label in "YN")

    def formula(h, ids, tensors) -> Wanted:
        odds = F.linear(h[-1], tensors["lm_head.weight"])[[yes, no]].softmax(-1)
        return Wanted(odds[0].item(), tuple(odds.tolist()))

    folder, oracle = write(Kind("qwen2", "Qwen2ForCausalLM", no_head, formula), tmp_path_factory.mktemp("judge"))
    tokenizer.save_pretrained(folder)
    (folder / "rewardserve.toml").write_text(TOLD)
    return folder, oracle, tokenizer


@pytest.fixture(scope="module")
def client(start, judge):
    server = start("--model", f"judge={judge[0]}", "--prefix-cache-mb", "16").ready()
    with RewardClient(server.target) as client:
        yield client


def asked(judge, prompt: str, answer: str) -> Wanted:
    _, oracle, tokenizer = judge
    question = "A: ".join(part for part in (f"Q: {prompt}\n", f"{answer}\nIs that right? Say Y or N."))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return oracle(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_score_is_the_probability_of_the_label_and_labels_are_attributes(client, judge) -> None:
    for _ in range(2):  # cold and warm
        items = client.score([Group(QUESTION, ANSWERS)]).groups[0].items
        for item, answer in zip(items, ANSWERS, strict=True):
            wanted = asked(judge, QUESTION, answer)
            assert item.score == pytest.approx(wanted.score, abs=1e-5) and item.kind == "probability"
            assert list(item.attributes) == ["Y", "N"]
            assert list(item.attributes.values()) == pytest.approx(wanted.attributes, abs=1e-5)
    assert items[0].num_cached_tokens > 0


def test_a_response_counts_its_own_tokens_and_not_those_of_the_question_about_it(client, judge) -> None:
    """Which is what a length penalty goes by."""
    _, _, tokenizer = judge
    items = client.score([Group(QUESTION, ["It is 4.", "It is 4. " * 20])]).groups[0].items
    for item, answer in zip(items, ("It is 4.", "It is 4. " * 20), strict=True):
        assert abs(item.num_response_tokens - len(tokenizer.encode(answer))) <= 1  # tokens may span the border
    assert items[0].num_prompt_tokens == items[1].num_prompt_tokens


def test_a_conversation_is_shown_turn_by_turn_and_rank_goes_by_the_judge(client, judge) -> None:
    turns = [ChatMessage("user", "Hi."), ChatMessage("assistant", "Hello."), ChatMessage("user", "2 + 2?")]
    shown = "user: Hi.\n\nassistant: Hello.\n\nuser: 2 + 2?"
    scores = [asked(judge, shown, answer).score for answer in ANSWERS[:2]]
    ranking = client.rank(turns, ANSWERS[:2])
    assert [entry.index for entry in ranking.ranked] == sorted(range(2), key=lambda i: -scores[i])
    assert ranking.best.item.score == pytest.approx(max(scores), abs=1e-5)


def test_a_judge_is_asked_in_words(client) -> None:
    for group in (Group(TokenIds([1, 2]), ["x"]), Group("x", [TokenIds([1])])):
        with pytest.raises(InvalidRequest, match="asked in words"):
            client.score([group])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("{response}", "", "judge.template must have"),
        ("'Y', 'N'", "'Y', 'Never ever'", "judge.labels 'Never ever' is"),
        ("'Y', 'N'", "'Y', 'Y'", "judge.labels 'Y' is the same token as 'Y'"),
        ("1.0, 0.0", "1.0", "judge.values must be as many"),
        ("[judge]", '[head]\nkind = "lm_rows"\nids = [1]\n[judge]', "head or judge: give one"),
    ],
)
def test_what_is_wrong_in_a_rubric_is_named(judge, tmp_path: Path, old: str, new: str, words: str) -> None:
    for file in judge[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "rewardserve.toml").write_text(TOLD.replace(old, new))
    with pytest.raises(LoadFailed, match=words):
        read_spec(str(tmp_path))
