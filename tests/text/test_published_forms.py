"""Prompts and responses become the ids that a model's published script makes of them, also without a chat template."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepieces
from rewardserve.errors import InvalidRequest
from rewardserve.models.spec import read_spec
from rewardserve.models.text_export import text_of
from rewardserve.models.tokenizer import load_tokenizer
from rewardserve.text.encoder import Encoder
from rewardserve.text.tokenizer import Tokenizer
from rewardserve.types import Conversation, Message, Overflow, PlainText, Rendered, StepFormat, Steps, StepStyle
from zoo import ZOO, write

QUESTION, FIRST, SECOND = "hello world?", "he: 1", "world"
ANSWER = f"{FIRST} ки\n{SECOND} ки"
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def math_shepherd(folder: Path, **config: object) -> Path:
    folder, _ = write(ZOO["math-shepherd-mistral-7b-prm"], folder)
    (folder / "tokenizer.model").write_bytes(sentencepieces.model())
    (folder / "tokenizer_config.json").write_text(json.dumps(SPECIALS | config))
    return folder


def test_math_shepherd_is_shown_a_bos_the_question_a_space_and_the_steps(tmp_path: Path, tools) -> None:
    """`tokenizer.encode(f"{question} {output}")` in the model card; a chat template is unused."""
    folder = math_shepherd(tmp_path, chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    spec = read_spec(str(folder))
    text, reason = text_of(spec)
    assert text is not None, reason
    encoder = Encoder(Tokenizer(text), 32000, 1000, steps=spec.recipe.steps)
    asked = Conversation((Message("user", QUESTION),))
    responses = [ANSWER, Steps((FIRST, SECOND)), f"{FIRST}\n{SECOND}"]
    forms = [(PlainText(QUESTION), responses), (asked, responses)]
    wanted = load_tokenizer(folder)(f"{QUESTION} {ANSWER}")["input_ids"]
    assert wanted[0] == 1
    encoded = encoder.encode(tools.request(*forms))
    assert all(tools.whole_ids(encoded, group, item) == wanted for group in (0, 1) for item in (0, 1, 2))
    with pytest.raises(InvalidRequest, match="one question, and nothing before it"):
        encoder.encode(tools.request((Conversation((Message("system", "x"), *asked.messages)), [ANSWER])))


def test_math_shepherds_text_is_refused_where_a_written_bos_changes_what_follows(tmp_path: Path) -> None:
    text, reason = text_of(read_spec(str(math_shepherd(tmp_path, legacy=False))))
    assert text is None and "after its tokenizer's BOS" in reason


def test_a_tag_of_white_space_ends_every_step_also_the_last(plain, tools) -> None:
    """As in TRL's form of stepwise data, whose separator is a line's end."""
    how = StepFormat(StepStyle.TAGGED, separator="\n", tag="\n")
    encoder = Encoder(plain.tokenizer, 400, 1000, steps=how)
    encoded = encoder.encode(tools.request((Rendered("un"), ["happy\n  \nis 42", Steps(("happy", "is 42"))])))
    wanted = plain.ids("unhappy\nis 42\n")
    assert [tools.whole_ids(encoded, 0, item) for item in (0, 1)] == [wanted, wanted]


def test_steps_as_turns_are_only_those_of_the_response(styles, tools) -> None:
    """RLHFlow: what an assistant's turn begins with is read, so none may be there that answers no step."""
    text = styles["llama3"]
    encoder = Encoder(text.tokenizer, 400, 1000, steps=StepFormat(StepStyle.TURNS, tag="+"))
    turns = [("user", "un happy"), ("assistant", "+"), ("user", "is 42"), ("assistant", "+")]
    encoded = encoder.encode(tools.request((PlainText("un"), ["happy\n\nis 42", " \n\n ", "", Steps(())])))
    assert tools.whole_ids(encoded, 0, 0) == text.ids(text.chat(turns, False))
    for item in encoded.items[0][1:]:
        assert item.failure is not None and "the response is empty" in item.failure.message
    asked_before = Conversation((Message("user", "un"), Message("assistant", "happy"), Message("user", "is")))
    with pytest.raises(InvalidRequest, match="would take an assistant's turn for one"):
        encoder.encode(tools.request((asked_before, ["42"])))


@pytest.mark.parametrize("style", ["thinking", "chatml"])
def test_a_response_may_open_what_its_prompt_opens_too_and_its_steps_are_found(styles, tools, style: str) -> None:
    """A template's prompt ends in the beginning of a thought, and a response that was kept whole has it as well."""
    text, steps = styles[style], ("<think>\n\n</think>", "un happy", "is 42", "un happy")
    request = replace(tools.request((PlainText("un"), ["\n\n".join(steps), Steps(steps)])), by_step=True)
    encoder = text.encoder()
    encoded = encoder.encode(replace(request, step_separator="\n\n"))
    pieces = ("<think>", "</think>", *steps[1:])
    for item, ends in ((0, pieces), (1, steps)):
        ids = tools.whole_ids(encoded, 0, item)
        found = encoded.groups[0].steps[item]
        assert len(found) == len(ends)
        assert all(text.hf.decode(ids[: place + 1]).endswith(end) for place, end in zip(found, ends, strict=True))
    room = encoded.items[0][1].num_response_tokens
    cut = text.encoder(room).encode(replace(request, overflow=Overflow.TRUNCATE_PROMPT_LEFT)).items[0][1]
    assert (cut.failure is None) == (style == "chatml")  # a step that the cut would take is not read elsewhere
