"""Process reward models from text to the score of every step; a search that goes on from what it scored already."""

import math
from collections.abc import Sequence
from dataclasses import replace

import grpc
import pytest
import torch
from checkpoints import make_tokenizer
from rewardserve.client import Group, InvalidRequest, RewardClient, StepOptions, Steps, TokenIds
from texts import all_texts, groups
from torch.nn import functional as F
from zoo import HIDDEN, ZOO, Kind, Wanted, normal, write

QUESTION = "What is 12 times 12, and why?"
STEPS = ("First, 12 times 10 is 120.", "Then 12 times 2 is 24.", "So the answer is 144.")


def of_tag(tag: int):
    """Qwen2.5-Math-PRM's formula, with the tag's id in this tokenizer."""

    def formula(h, ids, tensors) -> Wanted:
        hidden = h[[i for i, token in enumerate(ids) if token == tag]]
        hidden = F.relu(F.linear(hidden, tensors["score.0.weight"], tensors["score.0.bias"]))
        steps = F.linear(hidden, tensors["score.2.weight"], tensors["score.2.bias"]).softmax(-1)[:, 1].tolist()
        return Wanted(min(steps), steps=tuple(steps))

    return formula


class Served:
    """A checkpoint with its tokenizer, what its scores are, and its name on the server."""

    def __init__(self, name: str, kind: Kind, tmp, tokenizer) -> None:
        self.name, self.tokenizer = name, tokenizer
        self.folder, self.oracle = write(kind, tmp)
        tokenizer.save_pretrained(self.folder)

    def steps(self, text: str) -> Sequence[float]:
        return self.oracle(self.tokenizer(text, add_special_tokens=False)["input_ids"]).steps

    def turns(self, response: str) -> str:
        messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": response}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.fixture(scope="module")
def tagged(tmp_path_factory) -> Served:
    tokenizer = make_tokenizer([*all_texts(groups(4, 4)), QUESTION, *STEPS])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    tag = tokenizer.convert_tokens_to_ids("<extra_0>")
    kind = replace(ZOO["Qwen2.5-Math-PRM-7B"], vocab_size=tag + 1, formula=of_tag(tag))
    return Served("prm", kind, tmp_path_factory.mktemp("tagged"), tokenizer)


@pytest.fixture(scope="module")
def apart(tmp_path_factory) -> Served:
    def head():
        return {"v_head.summary.weight": normal(1, HIDDEN), "v_head.summary.bias": normal(1)}

    def every(h, ids, tensors) -> Wanted:
        odds = torch.sigmoid(F.linear(h, tensors["v_head.summary.weight"], tensors["v_head.summary.bias"]))
        return Wanted(0.0, steps=tuple(odds[:, 0].tolist()))

    kind = Kind("qwen2", "Qwen2ForPrmModel", head, every)
    return Served("o1", kind, tmp_path_factory.mktemp("apart"), make_tokenizer(all_texts(groups(4, 4))))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> Served:
    def every(h, ids, tensors) -> Wanted:
        return Wanted(0.0, steps=tuple(F.linear(h, tensors["score.weight"])[:, 0].tolist()))

    kind = replace(ZOO["Skywork-Reward-V2 Qwen3"], formula=every)
    return Served("orm", kind, tmp_path_factory.mktemp("outcome"), make_tokenizer(all_texts(groups(4, 4))))


@pytest.fixture(scope="module")
def server(start, tagged, apart, outcome):
    models = [f"--model={served.name}={served.folder}" for served in (tagged, apart, outcome)]
    return start(*models, "--prefix-cache-mb", "16").ready()


@pytest.fixture(scope="module")
def client(server):
    with RewardClient(server.target) as client:
        yield client


def close(got: Sequence[float], wanted: Sequence[float]) -> bool:
    return len(got) == len(wanted) and all(abs(a - b) < 1e-5 for a, b in zip(got, wanted, strict=True))


def test_steps_given_cut_or_tagged_are_the_same_and_read_at_their_tags(client, tagged: Served) -> None:
    right = tagged.steps(tagged.turns("".join(step + "<extra_0>" for step in STEPS)))
    assert len(right) == 3
    responses = [Steps(STEPS), "\n\n".join(STEPS), "".join(step + "<extra_0>" for step in STEPS)]
    items = client.score([Group(QUESTION, responses)], model="prm").groups[0].items
    assert all(close(item.steps, right) for item in items)
    assert all(item.kind == "probability" and abs(item.score - min(right)) < 1e-5 for item in items)


@pytest.mark.parametrize(
    ("reduction", "wanted"),
    [
        ("min", min),
        ("mean", lambda steps: sum(steps) / len(steps)),
        ("product", math.prod),
        ("last", lambda steps: steps[-1]),
    ],
)
def test_a_score_is_the_reduction_that_was_asked_for(client, reduction: str, wanted) -> None:
    result = client.score([Group(QUESTION, [Steps(STEPS)])], model="prm", steps=StepOptions(reduction))
    item = result.groups[0].items[0]
    assert item.raw_or_none == pytest.approx(wanted(item.steps), rel=1e-12)


def test_a_product_of_logits_is_refused(client) -> None:
    with pytest.raises(InvalidRequest) as refused:
        client.score([Group(QUESTION, [Steps(STEPS)])], model="orm", steps=StepOptions("product"))
    assert [name for name, _ in refused.value.violations] == ["options.step_reduction"]


def test_another_separator_cuts_elsewhere(client, tagged: Served) -> None:
    result = client.score([Group(QUESTION, [" | ".join(STEPS)])], model="prm", steps=StepOptions(separator=" | "))
    right = tagged.steps(tagged.turns("".join(step + "<extra_0>" for step in STEPS)))
    assert close(result.groups[0].items[0].steps, right)


def test_a_growing_response_computes_only_what_is_new(client, tagged: Served) -> None:
    """A search of eight levels; every level's steps are what they are when scored alone."""
    level = [
        f"Step {i}: we take the number {i} and add it to what we had before, which makes it larger." for i in range(8)
    ]
    texts = ["".join(step + "<extra_0>" for step in level[: depth + 1]) for depth in range(8)]
    computed = {}
    for cached in (False, True):
        prompt = QUESTION + (" Think." if cached else " Try.")
        messages = [{"role": "user", "content": prompt}]
        computed[cached] = 0
        for depth, text in enumerate(texts):
            result = client.score([Group(prompt, [Steps(level[: depth + 1])])], model="prm", cache_response=cached)
            item = result.groups[0].items[0]
            whole = tagged.tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": text}], tokenize=False
            )
            assert close(item.steps, tagged.steps(whole))
            computed[cached] += item.num_prompt_tokens + item.num_response_tokens - item.num_cached_tokens
    assert computed[True] < 0.6 * computed[False], computed


def test_steps_tokenized_apart_are_read_at_their_last_tokens(client, apart: Served) -> None:
    encode = apart.tokenizer.encode
    newline = encode("\n")[-1]
    ids, ends = list(encode(QUESTION + "\n")), []
    for step in STEPS:
        ids += [*encode(step), newline]
        ends.append(len(ids) - 1)
    right = [apart.oracle(ids).steps[end] for end in ends]
    num_prompt = len(encode(QUESTION + "\n"))
    as_ids = Steps(token_ids=TokenIds(ids[num_prompt:]), ends=[end - num_prompt + 1 for end in ends])
    for prompt, response in (
        (QUESTION, Steps(STEPS)),
        (QUESTION, "\n".join(STEPS)),
        (TokenIds(ids[:num_prompt]), as_ids),
    ):
        item = client.score([Group(prompt, [response])], model="o1").groups[0].items[0]
        assert close(item.steps, right), response


def test_an_outcome_model_is_read_at_the_ends_of_steps_too(client, outcome: Served) -> None:
    text = outcome.turns("\n\n".join(STEPS))
    encoded = outcome.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    every = outcome.oracle(encoded["input_ids"]).steps
    ends = [text.index(step) + len(step) for step in STEPS]
    right = [every[max(i for i, (a, _) in enumerate(encoded["offset_mapping"]) if a < end)] for end in ends]
    plain = client.score([Group(QUESTION, ["\n\n".join(STEPS)])], model="orm").groups[0].items[0]
    assert plain.steps == () and plain.score == pytest.approx(every[-1], abs=1e-5)
    for response in ("\n\n".join(STEPS), Steps(STEPS)):
        item = client.score([Group(QUESTION, [response])], model="orm", steps=StepOptions("last")).groups[0].items[0]
        assert close(item.steps, right) and item.score == item.steps[-1]


@pytest.mark.parametrize(
    ("model", "prompt", "response", "field"),
    [
        ("o1", TokenIds([1, 2]), TokenIds([3, 4]), "groups[0].responses[0].step_ends"),
        ("o1", TokenIds([1, 2]), Steps(token_ids=TokenIds([3, 4]), ends=[3]), "groups[0].responses[0].step_ends"),
        ("o1", TokenIds([1, 2]), Steps(token_ids=TokenIds([3, 4]), ends=[2, 1]), "groups[0].responses[0].step_ends"),
        ("o1", TokenIds([1, 2]), "text", "groups[0].responses[0].text"),
        ("o1", [{"role": "user", "content": "x"}], "text", "groups[0].prompt.conversation"),
        ("prm", TokenIds([1, 2]), Steps(token_ids=TokenIds([3, 4]), ends=[2]), "groups[0].responses[0].step_ends"),
        ("orm", TokenIds([1, 2]), Steps(token_ids=TokenIds([3, 4]), ends=[3]), "groups[0].responses[0].step_ends"),
    ],
)
def test_steps_that_cannot_be_heeded_are_refused_by_name(client, model: str, prompt, response, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        client.score([Group(prompt, [response])], model=model)
    assert field in [name for name, _ in refused.value.violations]


def test_a_text_without_a_step_fails_alone(client) -> None:
    items = client.score([Group(QUESTION, [" \n\n ", Steps(STEPS)])], model="prm").groups[0].items
    assert items[0].status.code is grpc.StatusCode.INVALID_ARGUMENT and items[1].ok


def test_an_empty_step_is_named_by_its_number(client) -> None:
    groups = [Group(QUESTION, [Steps([*STEPS, "  "]), Steps(STEPS)])]
    items = client.score(groups, model="orm", steps=StepOptions("last")).groups[0].items
    assert f"step {len(STEPS)} is empty" in items[0].status.message and items[1].ok
