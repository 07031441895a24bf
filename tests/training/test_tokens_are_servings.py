"""What is trained on is token for token what a request for the same pair is scored on."""

import itertools
from collections import Counter
from fractions import Fraction

import checkpoints
import pytest
from preferences import TOPICS, parsed, save_reward_base
from rewardserve.training import base, data
from rewardserve.training.rows import BadRow
from rewardserve.training.trainer import Collator, choose_padding_id
from transformers import AutoTokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"


def encoded(folder, rows, max_length=256):
    encoder = data.make_encoder(folder, base.read_config(folder), max_length)
    return data.encode(parsed(rows), encoder, "rows")


@pytest.mark.parametrize("response", ["Gladly.", " leading", "\n\ncode:\n\tx = 1\n", "<|im_end|>", "é 👍"])
def test_ids_are_those_of_the_checkpoints_own_tokenizer(reward_base, response):
    tokenizer = AutoTokenizer.from_pretrained(reward_base)
    turns = [SYSTEM, {"role": "user", "content": "Tell me."}]
    rows = [
        {"messages": turns, "chosen": response, "rejected": "x"},
        {"prompt": "Hi", "chosen": response, "rejected": "x"},
    ]
    for row, before in zip(encoded(reward_base, rows), (turns, [{"role": "user", "content": "Hi"}]), strict=True):
        text = tokenizer.apply_chat_template([*before, {"role": "assistant", "content": response}], tokenize=False)
        assert row.ids[0].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_without_a_template_prompt_and_response_are_one_text(tmp_path):
    save_reward_base(tmp_path)
    tokenizer = checkpoints.make_tokenizer(TOPICS, template=None)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(tmp_path)
    (row,) = encoded(tmp_path, [{"prompt": "tea and", "chosen": " rain", "rejected": "x"}])
    assert row.ids[0].tolist() == tokenizer("tea and rain", add_special_tokens=False)["input_ids"]


def test_what_is_longer_than_max_length_is_left_out_with_its_comparisons(reward_base):
    rows = [{"prompt": "Hi", "responses": ["a", "b", "tea " * 90], "ratings": [1, 2, 3]}]
    (row,) = encoded(reward_base, rows, max_length=40)
    assert [ids is None for ids in row.ids] == [False, False, True]
    assert [(c.better, c.worse) for c in row.comparisons] == [(1, 0)]
    assert data.count_too_long([row]) == 1
    assert all(ids is None or len(ids) <= 40 for ids in row.ids)


def test_a_prompt_that_the_template_refuses_is_named_by_its_line(reward_base, tmp_path):
    save_reward_base(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(REFUSES_SYSTEM + checkpoints.TEMPLATE)
    row = {"messages": [SYSTEM, {"role": "user", "content": "Hi"}], "chosen": "a", "rejected": "b"}
    with pytest.raises(BadRow, match=r"rows line 1: prompt: .*no system turn"):
        encoded(tmp_path, [row])


def test_pairs_of_rated_rows_are_bounded_and_always_the_same(reward_base):
    rows = encoded(reward_base, [{"prompt": "Hi", "responses": list("abcdefgh"), "ratings": list(range(8))}])
    few, again, all_ = (data.training_set(rows, "bradley-terry", bound, "rows") for bound in (5, 5, 0))
    assert (len(few), len(all_)) == (5, 28)
    assert few.to_list() == again.to_list()
    assert all(example in all_.to_list() for example in few.to_list())


def test_classification_takes_pairs_as_good_and_bad_and_mse_does_not_take_them(reward_base):
    rows = encoded(reward_base, [{"prompt": "Hi", "chosen": "a", "rejected": "b", "label": 0.25}])
    assert data.training_set(rows, "classification", 0, "rows")["target"][:] == [0.25, 0.75]
    with pytest.raises(BadRow, match="rows line 1: ratings: are missing"):
        data.training_set(rows, "mse", 0, "rows")


def test_classification_refuses_a_rating_that_is_no_probability(reward_base):
    rows = encoded(reward_base, [{"prompt": "Hi", "responses": ["a", "b"], "ratings": [0.5, 3]}])
    with pytest.raises(BadRow, match=r"rows line 1: ratings\[1\]: 3 is no probability"):
        data.training_set(rows, "classification", 0, "rows")
    assert data.training_set(rows, "mse", 0, "rows")["target"][:] == [0.5, 3.0]


def test_a_member_learns_from_as_many_prompts_drawn_with_replacement_each_with_all_its_pairs(reward_base):
    rows = [{"prompt": f"{n}?", "responses": list("abc"), "ratings": [1, 2, 3]} for n in range(40)]
    rows.append({"prompt": "0?", "chosen": "d", "rejected": "e"})  # of the first one's prompt
    train = data.training_set(encoded(reward_base, rows), "bradley-terry", 0, "rows")
    assert (len(train), len(set(train["prompt"][:]))) == (121, 40)
    one, again, other = (data.drawn(train, seed) for seed in (1, 1, 2))
    assert one.to_list() == again.to_list() != other.to_list()
    whole = Counter(train["prompt"][:])
    times = {prompt: Fraction(count, whole[prompt]) for prompt, count in Counter(one["prompt"][:]).items()}
    assert sum(times.values()) == 40 and all(each.denominator == 1 for each in times.values())
    assert 20 < len(times) < 35  # of many, 63 % are expected to be drawn at all
    assert set(map(str, one.to_list())) <= set(map(str, train.to_list()))


def test_held_out_responses_are_there_once_and_ties_are_not(reward_base):
    rated = {"prompt": "Hi", "responses": ["a", "b", "a much longer one"], "ratings": [1, 2, 2]}
    rows = encoded(reward_base, [rated, {"prompt": "Ho", "chosen": "a", "rejected": "b", "label": 0.5}])
    held_out = data.held_out_set(rows, "bradley-terry", "rows")
    assert len(held_out.ids) == 3 and len(held_out.judged) == 2
    lengths = [len(ids) for ids in held_out.dataset()["ids"]]
    assert lengths == sorted(lengths, reverse=True)
    scores = held_out.in_order([{length: index for index, length in enumerate(lengths)}[n] for n in lengths])
    assert [lengths[int(score)] for score in scores] == [len(ids) for ids in held_out.ids]


def test_padding_is_never_what_a_sequence_ends_with(reward_base):
    """transformers reads the score at the last token that is not padding."""
    assert choose_padding_id(7, {1, 2}) == 7
    for preferred, ends in itertools.product((None, 0, 1, 2), ({0, 1}, {0, 1, 2}, {1})):
        assert choose_padding_id(preferred, ends) not in ends
    batch = Collator(9)([{"ids": [4, 5, 6], "target": 1.0}, {"ids": [7], "target": 0.0}])
    assert batch["input_ids"].tolist() == [[4, 5, 6], [7, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["target"].tolist() == [1.0, 0.0]
