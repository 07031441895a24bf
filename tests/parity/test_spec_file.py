"""rewardserve.toml says how a model is scored that no family knows; whatever is wrong in it is named."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rewardserve.errors import LoadFailed
from rewardserve.models.spec import read_spec
from scoring import native
from torch.nn import functional as F
from zoo import HIDDEN, Kind, Wanted, linear_head, mlp_head, normal, write

PROMPT, RESPONSES = [5, 6, 7] * 60 + [6], [[8] * 5 + [77], [9, 77, 6, 7, 11, 77], [7, 77]]  # 6, 7 in, beyond, across
TAG = 77


def mlp(h, t):
    return F.linear(F.relu(F.linear(h, t["mine.0.weight"], t["mine.0.bias"])), t["mine.2.weight"], t["mine.2.bias"])


def every_tag(h, ids, t) -> Wanted:
    tags = [i for i, token in enumerate(ids) if token == TAG]
    steps = tuple(torch.sigmoid(F.linear(h[tags], t["mine.weight"]))[:, 0].tolist())
    return Wanted(min(steps), steps=steps)


def weighted(h, ids, t) -> Wanted:
    outputs = F.linear(h[-1], t["mine.weight"])
    return Wanted((outputs * torch.tensor([0.7, 0.3])).sum().item(), tuple(outputs.tolist()))


def mixture(h, ids, t) -> Wanted:
    """Three outputs of two quantiles, weighted by a gate that reads where the last (6, 7) ends."""
    at = max(i for i in range(1, len(ids)) if ids[i - 1 : i + 1] == [6, 7])
    x = F.silu(F.linear(h[at], t["gate.0.weight"], t["gate.0.bias"]))
    gate = (F.linear(x, t["gate.2.weight"], t["gate.2.bias"]) / 3).softmax(-1) * t["how_much"]
    rewards = F.linear(h[-1], t["mine.weight"], t["mine.bias"]).view(3, 2)
    mixed = torch.stack([(rewards[:, q] @ t["mix"] * gate).sum() for q in range(2)])
    return Wanted(mixed.mean().item(), tuple(rewards.mean(1).tolist()), std=mixed.std(correction=0).item())


def gated_head():
    parts = {"mine.weight": normal(6, HIDDEN), "mine.bias": normal(6), "mix": normal(3, 3)}
    return parts | {"how_much": torch.tensor([1.0, 2.0, 0.5])} | mlp_head("gate", 16, 3)()


def selu_at_the_last_pattern(h, ids, t) -> Wanted:
    at = max(i for i in range(1, len(ids)) if ids[i - 1 : i + 1] == [6, 7])
    hidden = F.selu(F.linear(h[at], t["mine.0.weight"], t["mine.0.bias"]))
    return Wanted(F.linear(hidden, t["mine.2.weight"], t["mine.2.bias"]).item())


MINE = '[head]\nkind = "linear"\nweights = "mine"\n'
EVERY = f'{MINE}[read]\nat = "every"\npattern = [6]\n'
LAST_OF = '[head]\nkind = "linear"\nweights = "mine"\n[read]\nat = "last-of"\npattern = [6, 7]\n'
GATED = """
[head]
kind = "gated"
weights = "mine"
outputs = 3
quantiles = 2
gate = "gate"
hidden = "silu"
temperature = 3
gate_scale = "how_much"
transform = "mix"
[read]
pattern = [6, 7]
offset = 1
[score]
attributes = ["a", "b", "c"]
"""
TOLD = {
    "objectives with quantiles, mixed by a gate": (GATED, gated_head, mixture),
    "an MLP with SELU at the last occurrence of a pattern": (
        '[head]\nkind = "mlp"\nweights = "mine"\nhidden = "selu"\n'
        '[read]\nat = "last-of"\npattern = [6, 7]\noffset = 1\n',
        mlp_head("mine", 16, 1),
        selu_at_the_last_pattern,
    ),
    "a head by another name, at the last token": (
        '[head]\nkind = "linear"\nweights = "mine"\n',
        linear_head("mine", bias=True),
        lambda h, ids, t: Wanted(F.linear(h[-1], t["mine.weight"], t["mine.bias"]).item()),
    ),
    "an MLP on the mean": (
        '[head]\nkind = "mlp"\nweights = "mine"\n[read]\nat = "mean"\n',
        mlp_head("mine", 16, 1),
        lambda h, ids, t: Wanted(mlp(h.mean(0), t).item()),
    ),
    "the probability of one output, at the first token": (
        '[head]\nkind = "mlp"\nweights = "mine"\noutputs = 3\n[read]\nat = "first"\n[score]\nprobability_of = 2\n',
        mlp_head("mine", 16, 3),
        lambda h, ids, t: Wanted(mlp(h[0], t).softmax(-1)[2].item()),
    ),
    "a sigmoid at every tag": (
        f'[head]\nkind = "linear"\nweights = "mine"\nactivation = "sigmoid"\n[read]\nat = "every"\npattern = [{TAG}]\n'
        '[steps]\nstyle = "tagged"\ntag = "<tag>"\n',
        linear_head("mine"),
        every_tag,
    ),
    "several outputs, weighted and named": (
        '[head]\nkind = "linear"\nweights = "mine"\noutputs = 2\n[score]\nattributes = ["good", "safe"]\n'
        "weights_of = [0.7, 0.3]\n",
        lambda: {"mine.weight": normal(2, HIDDEN)},
        weighted,
    ),
    "one token of a language model against another": (
        '[head]\nkind = "lm_odds"\nids = [30, 40]\n',
        lambda: {"lm_head.weight": normal(400, HIDDEN)},
        lambda h, ids, t: Wanted(F.linear(h[-1], t["lm_head.weight"])[[30, 40]].softmax(-1)[0].item()),
    ),
}


@pytest.mark.parametrize("name", TOLD)
async def test_what_the_file_says_is_what_is_scored(name: str, tmp_path: Path) -> None:
    text, head, formula = TOLD[name]
    folder, oracle = write(Kind("qwen2", "Mystery", head, formula), tmp_path)
    (folder / "rewardserve.toml").write_text(text)
    async with native(folder) as scorer:
        for _ in range(2):  # cold and warm
            items = (await scorer.run([(PROMPT, RESPONSES)])).groups[0].items
            for item, response in zip(items, RESPONSES, strict=True):
                wanted = oracle([*PROMPT, *response])
                assert item.score == pytest.approx(wanted.score, rel=1e-5, abs=1e-5)
                assert item.attributes == pytest.approx(wanted.attributes, rel=1e-4, abs=1e-5)
                assert item.steps == pytest.approx(wanted.steps, rel=1e-5, abs=1e-5)
                assert item.std == (wanted.std if wanted.std is None else pytest.approx(wanted.std, rel=1e-4))
        names = tomllib.loads(text).get("score", {}).get("attributes", ())
        assert scorer.info.attributes == tuple(names)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "head"),
        ("[head", "rewardserve.toml"),
        (f"a = {'9' * 5000}", "rewardserve.toml: .*digits"),
        (f"a = {'[' * 100_000}", "rewardserve.toml: is nested too deeply"),
        (b"\xff\xfe", "rewardserve.toml: 'utf-8' codec"),
        (b"\xef\xbb\xbf[head]\nkind = 'cubic'\n", "head.kind"),
        (f"{LAST_OF}offset = {2**63 - 1}\n", "read.offset"),
        ('[head]\nkind = "cubic"\n', "head.kind"),
        ('[head]\nkind = "linear"\nweights = "nowhere"\n', "'nowhere' is not what a head's keys begin with"),
        ('[head]\nkind = "linear"\nweights = "mine"\noutputs = 7\n', r"\(7, 32\)"),
        ('[head]\nkind = "lm_odds"\nids = [1]\n', "head.ids must be two"),
        ('[head]\nkind = "linear"\nweights = "mine"\n[read]\nat = "every"\n', "read.pattern is missing"),
        ('[head]\nkind = "linear"\nweights = "mine"\n[read]\nat = "last-of"\n', "read.pattern is missing"),
        ('[head]\nkind = "linear"\nweights = "mine"\nhidden = "selu"\n', "head.hidden does nothing"),
        ('[head]\nkind = "mlp"\nweights = "mine"\n', r"no 'mine\.0\.weight', which kind = 'mlp' has"),
        ('[head]\nkind = "linear"\nweights = "mine"\nquantiles = 2\n', "head.quantiles does nothing"),
        (f"{LAST_OF}[steps]\nstyle = 'ends'\n", "steps cannot be read with read.at = 'last-of'"),
        (LAST_OF.replace("[6, 7]", "[6, -7]"), "read.pattern has -7, outside of the vocabulary"),
        (LAST_OF.replace("[6, 7]", "[6, 70000]"), "read.pattern has 70000, outside of the vocabulary"),
        (f"{LAST_OF}append = 9\n", "read.append does nothing"),
        ('[head]\nkind = "gated"\nweights = "mine"\n', "head.gate '' is not what a gate's keys begin with"),
        ('[head]\nkind = "linear"\nweights = "mine"\n[read]\nwhere = "last"\n', "read.where"),
        ('[head]\nkind = "linear"\nweights = "mine"\nids = [1]\n', "head.ids does nothing with head.kind = 'linear'"),
        ('[head]\nkind = "lm_odds"\nids = [1, 2]\nactivation = "sigmoid"\n', "head.activation does nothing"),
        ('[head]\nkind = "linear"\nweights = "mine"\n[read]\npattern = [3]\n', "read.pattern does nothing"),
        ('[head]\nkind = "linear"\nweights = "mine"\n[steps]\nstyle = "ends"\ntag = "x"\n', "steps.tag does nothing"),
        ('[head]\nkind = "linear"\nweights = "mine"\n[score]\nprobability_of = 1\n', "with a single output"),
        ('[head]\nkind = "linear"\nweights = "mine"\n[score]\nweights_of = [1.0]\n', "score.weights_of does nothing"),
        ('[head]\nkind = "linear"\nweights = "mine"\n[score]\nscale = 0\n', "score.scale"),
        ('[head]\nkind = "linear"\nweights = "mine"\n[score]\nscale = inf\n', "score.scale"),
        ('[head]\nkind = "linear"\nweights = "mine"\n[score]\nshift = nan\n', "score.shift"),
        ('[judge]\ntemplate = ""\nvalues = [0.0, 1e308]\n', "judge.values.1: .* less than or equal to 1000000000"),
        ('[head]\nkind = "linear"\nweights = "mine"\n[score]\nscale = 1e-300\n', "score.scale: .* 0.000000001"),
        ('[head]\nkind = "lm_rows"\nids = [-1]\n', "head.ids.0"),
        ('[head]\nkind = "lm_odds"\nids = [4, 4]\n', "head.ids must be two"),
        (f"{MINE}[read]\nat = 'mean'\n[steps]\nstyle = 'ends'\n", "steps cannot be read with read.at = 'mean'"),
        (f"{MINE}[read]\nat = 'first'\n[steps]\nstyle = 'ends'\n", "steps cannot be read with read.at = 'first'"),
        (f"{MINE}[steps]\nstyle = 'ends'\nseparator = ''\n", "steps.separator"),
        (f"{MINE}[read]\nappend = 9\n[steps]\nstyle = 'ends'\n", "read.append does nothing with steps.style"),
        (f"{MINE}[steps]\nstyle = 'tagged'\ntag = 'x'\n", "read.at is 'last'; with steps.style = 'tagged' it must be"),
        (f"{EVERY}[steps]\nstyle = 'tagged'\n", "steps.tag is missing"),
        (f"{EVERY}[steps]\nstyle = 'apart'\ntag = 'x'\n", "read.at is 'every'; with steps.style = 'apart'"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(text: str | bytes, words: str, tmp_path: Path) -> None:
    kind = Kind("qwen2", "Mystery", linear_head("mine"), lambda h, ids, t: Wanted(0.0))
    folder, _ = write(replace(kind, folder="wrong"), tmp_path)
    (folder / "rewardserve.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(LoadFailed, match=words):
        read_spec(str(folder))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("outputs = 3", "outputs = 2", "6, 32"),
        ('gate = "gate"', 'gate = "mine"', "head.gate"),
        ('"how_much"', '"nowhere"', "head.gate_scale 'nowhere' is no key of this checkpoint"),
        ('"mix"', '"how_much"', r"head.transform is of shape \(3,\), not \(3, 3\)"),
        ('"how_much"', '"mix"', "head.gate_scale has 9 numbers"),
        ('gate = "gate"', 'gate = "gate.0"', r"no 'gate\.0\.0\.weight'"),
        ("temperature = 3", "temperature = 0", "head.temperature"),
        ("temperature = 3", "temperature = inf", "head.temperature"),
        ("[score]", '[steps]\nstyle = "ends"\n[score]', "steps cannot be read with a gated head"),
        ('["a", "b", "c"]', '["a", "b", "a"]', "score.attributes has a name twice"),
        ("offset = 1", 'offset = 1\nat = "mean"', "read.at is 'mean'; a gated head's rewards"),
        ("pattern = [6, 7]", "", "read.pattern is missing"),
        ('["a", "b", "c"]', '["a"]', "score.attributes must have a name for each of the 3 outputs"),
        ('["a", "b", "c"]', '["a", "b", "c"]\nweights_of = [1, 0, 0]', "score.weights_of does nothing"),
        ("quantiles = 2", 'quantiles = 2\nactivation = "sigmoid"', "head.activation does nothing"),
    ],
)
def test_what_is_wrong_with_a_gated_head_is_named(old: str, new: str, words: str, tmp_path: Path) -> None:
    folder, _ = write(Kind("qwen2", "Mystery", gated_head, mixture), tmp_path)
    assert old in GATED
    (folder / "rewardserve.toml").write_text(GATED.replace(old, new))
    with pytest.raises(LoadFailed, match=words):
        read_spec(str(folder))


def test_an_activation_that_stands_between_nothing_is_named(tmp_path: Path) -> None:
    kind = Kind("qwen2", "Mystery", lambda: {"mine.0.weight": normal(1, HIDDEN)}, lambda h, ids, t: Wanted(0.0))
    folder, _ = write(kind, tmp_path)
    told = '[head]\nkind = "mlp"\nweights = "mine"\n'
    (folder / "rewardserve.toml").write_text(told)
    read_spec(str(folder))
    (folder / "rewardserve.toml").write_text(f'{told}hidden = "selu"\n')
    with pytest.raises(LoadFailed, match=r"head\.hidden does nothing"):
        read_spec(str(folder))
