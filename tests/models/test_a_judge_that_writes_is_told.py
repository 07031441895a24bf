"""[judge.verdict] in rewardserve.toml says what a judge writes and how it is read; whatever is wrong in it is named."""

from pathlib import Path

import pytest
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.options import NativeOptions
from rewardserve.errors import LoadFailed
from rewardserve.models.spec import read_spec
from rewardserve.types import JudgeFormat, VerdictFormat
from tokenizers import Tokenizer
from writing_judge import END, save_writing_judge

TOLD = """
[judge]
template = "Q: {prompt} A: {response}"
[judge.verdict]
criteria = ["correct", "clear"]
lowest = 1
highest = 10
"""


@pytest.fixture
def told(tmp_path: Path):
    save_writing_judge(tmp_path, {"good": ["fine.", END]}, TOLD)

    def tell(text: str) -> str:
        (tmp_path / "rewardserve.toml").write_text(text)
        return str(tmp_path)

    return tell


def test_what_is_not_said_is_what_one_would_expect(told) -> None:
    recipe = read_spec(told(TOLD)).recipe
    verdict = VerdictFormat(("correct", "clear"), (0.5, 0.5), 1.0, 10.0, 1024)
    assert recipe.judge == JudgeFormat("Q: {prompt} A: {response}", verdict)
    assert recipe.attributes == ("correct", "clear")


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ('criteria = ["clear", "clear"]', "judge.verdict.criteria has a name twice"),
        ("criteria = []", "judge.verdict.criteria"),
        ("weights_of = [1.0]", "judge.verdict.weights_of must be as many as there are criteria: 2"),
        ("lowest = 10", "judge.verdict.lowest is 10, not less than highest, 10"),
        ("max_tokens = 0", "judge.verdict.max_tokens"),
        ("pattern = '(?P<correct>'", "judge.verdict.pattern is no regular expression"),
        ("pattern = '(?i)(?P<correct>x)(?P<clear>x)'", "judge.verdict.pattern is no regular expression"),
        ("words = {Yes = 11.0}", "judge.verdict.words.Yes is 11, not from lowest to highest"),
        ("pattern = '(?P<correct>x)'", "judge.verdict.pattern must have a group by each criterion's name"),
        ("samples = 3", "judge.verdict.samples"),
    ],
)
def test_what_is_wrong_in_a_verdict_is_named(told, added: str, words: str) -> None:
    key = added.partition(" =")[0]
    kept = "\n".join(line for line in TOLD.splitlines() if not line.startswith(f"{key} ="))
    with pytest.raises(LoadFailed, match=words):
        read_spec(told(f"{kept}\n{added}\n"))


def test_labels_and_a_verdict_are_two_ways_to_judge(told) -> None:
    with pytest.raises(LoadFailed, match=r"judge\.labels or judge.verdict: give one"):
        read_spec(told(TOLD.replace("[judge.verdict]", 'labels = ["Y", "N"]\nvalues = [1, 0]\n[judge.verdict]')))
    with pytest.raises(LoadFailed, match=r"judge\.values are of labels"):
        read_spec(told(TOLD.replace("[judge.verdict]", "values = [1, 0]\n[judge.verdict]")))


def test_labels_are_looked_up_whatever_padding_the_tokenizer_was_saved_with(told, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    asked = TOLD.partition("[judge.verdict]")[0]
    recipe = read_spec(told(f'{asked}labels = ["good", "fine."]\nvalues = [1, 0]\n')).recipe
    assert recipe.attributes == ("good", "fine.")


def test_the_native_engine_says_which_engine_it_needs(told) -> None:
    with pytest.raises(LoadFailed, match=r"writes its verdict is served by vLLM; install it with pip"):
        load_runner(NativeOptions(told(TOLD)))
