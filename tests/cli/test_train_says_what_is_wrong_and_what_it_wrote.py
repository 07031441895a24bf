"""`rewardserve train` as a person uses it: help, mistakes, an interrupted run, the summary."""

import json
import shlex
import shutil
import sys

import pytest
from preferences import (  # noqa: F401  quick_garbage_collection is a fixture
    pair_rows,
    quick_garbage_collection,
    rated_rows,
    same_weights,
    save_reward_base,
    weights_of,
)
from rewardserve.cli import train
from rewardserve.config import load_config
from rewardserve.training import ensemble


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_reward_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def ran(base, tmp_path, capfd):
    """Runs the verb on rows; gives back exit code, stdout and stderr."""

    def run(*flags, rows=None, lines=None):
        data = tmp_path / "data.jsonl"
        if not data.exists() or rows is not None or lines is not None:
            data.write_text("".join(lines or [json.dumps(row) + "\n" for row in rows or pair_rows(24, ("a", "b"))]))
        capfd.readouterr()
        usual = [
            "--base",
            str(base),
            "--output",
            str(tmp_path / "out"),
            "--threads=1",
            "--batch-size=8",
            "--device=cpu",
        ]
        code = train.run([str(data), *usual, *map(str, flags)])
        return code, *capfd.readouterr()

    import torch

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        train.run(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert all("--" + name.replace("_", "-") in shown for name in train.TrainOptions.model_fields if name != "data")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--base="], "--base: name the folder"),
        (["--output="], "--output: name a folder"),
        (["--micro-batch-size=3"], "--micro-batch-size 3 does not divide --batch-size 8"),
        (["--adapter"], "--adapter writes what --lora-rank makes"),
        (["--lora-rank=2", "--open-layers=0"], "--open-layers 0 leaves none"),
        (["--loss=mse", "--center-rewards=1"], "--center-rewards is of pairs, and --loss mse"),
        (["--loss=mse", "--pairs-per-prompt=2"], "--pairs-per-prompt is of pairs"),
        (["--eval-data=x", "--held-out=0.2"], "--eval-data brings what is measured with; leave out --held-out"),
        (["--held-out=0", "--early-stopping-patience=1"], "--early-stopping-patience needs something to measure with"),
        (["--held-out=1"], "--held-out"),
        (["--lerning-rate=1"], "did you mean '--learning-rate'?"),
        (["--loss=hinge"], "'hinge'"),
        (["--eval-data=/no/such"], "/no/such: No such file or directory"),
        (["--held-out=0.001"], "--held-out: no two responses to compare are in it"),
        (["--max-length=3"], "nothing to train on is left"),
        (["--loss=mse"], "line 1: ratings: are missing"),
    ],
)
def test_what_does_not_go_together_is_one_line_and_exit_code_2(ran, tmp_path, flags, said):
    code, _, err = ran(*flags)
    assert code == 2 and said in err and err.startswith("rewardserve train: ")
    assert not (tmp_path / "out").exists()


def test_a_bad_row_is_named(ran):
    code, _, err = ran(lines=[json.dumps(pair_rows(1)[0]) + "\n", '{"prompt": "x", "chosen": 3, "rejected": "y"}\n'])
    assert code == 2 and err.count("\n") == 1
    assert "data.jsonl line 2: chosen: Input should be a valid string" in err


@pytest.mark.parametrize(("base", "said"), [("/no/such/base", "no such folder"), (".", "no config.json|config.json")])
def test_a_base_that_is_none_is_said(ran, base, said, tmp_path):
    code, _, err = ran("--base", tmp_path if base == "." else base)
    assert code == 1 and err.count("\n") == 1 and any(part in err for part in said.split("|"))


@pytest.mark.parametrize(("asked", "said"), [("bb", "did you mean 'b'?"), ("law", "there are a, b")])
def test_a_domain_that_is_not_there_is_named_before_anything_is_trained(ran, tmp_path, asked, said):
    code, _, err = ran("--held-out=0", f"--held-out-domain={asked}")
    assert code == 2 and f"--held-out-domain {asked}: no row of DATA has this domain; {said}" in err
    assert not (tmp_path / "out").exists()


def test_a_missing_library_is_named_with_what_installs_it(ran, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("rewardserve.training.", "trl"))]:
        if name.rpartition(".")[2] in ("trainer", "member", "ensemble") or name.startswith("trl"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("rewardserve.training.ensemble", raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)
    code, _, err = ran()
    assert code == 1 and "pip install 'rewardserve[train]'" in err


def test_the_summary_has_accuracy_by_domain_and_what_to_do_next(ran, tmp_path):
    code, out, err = ran("--max-steps=2", "--held-out=0.4")
    figures = json.loads((tmp_path / "out" / "training.json").read_text())["held_out"]
    assert code == 0 and err == ""
    assert f"all ({figures['overall']['pairs']})" in out and f"{figures['overall']['accuracy']:.1%}" in out
    assert f"a ({figures['domains']['a']['pairs']})" in out and f"b ({figures['domains']['b']['pairs']})" in out
    assert f"next: rewardserve serve --model out={tmp_path / 'out'}" in out


def test_an_ensembles_summary_has_members_and_their_mean(ran, tmp_path):
    code, out, _ = ran("--max-steps=2", "--held-out=0.4", "--seeds=2", "--seed=3")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if "%" in line] == ["seed-3", "seed-4", "mean", "members"]
    command = next(line for line in out.splitlines() if line.startswith("next: rewardserve serve "))
    config = load_config(shlex.split(command)[3:])
    assert list(config.models) == ["seed-3", "seed-4"] and config.ensembles["rm"][1] == ("seed-3", "seed-4")


def test_what_to_do_next_can_be_pasted_whatever_the_folder_is_called(ran, tmp_path):
    folder = tmp_path / "my first model"
    _, out, _ = ran("--max-steps=1", "--held-out=0", "--output", folder)
    command = next(line for line in out.splitlines() if line.startswith("next: "))
    assert load_config(shlex.split(command)[3:]).models == {"rm": str(folder)}


def test_what_is_too_long_is_left_out_and_counted(ran):
    rows = [*pair_rows(20), {**pair_rows(1)[0], "prompt": "tea " * 300}]
    code, _, err = ran("--max-steps=1", "--held-out=0.3", rows=rows)
    assert code == 0 and "2 responses left out: longer than 256 tokens" in err


def test_what_has_diverged_is_not_written(ran, tmp_path):
    """Weights that grow ninefold at each step are no numbers in the end, and an accuracy of 0 would be no finding."""
    flags = ("--learning-rate=1", "--weight-decay=10", "--schedule=constant", "--warmup=0", "--open-layers=0")
    code, out, err = ran(*flags, "--max-steps=60", "--held-out=0.4")
    assert code == 1 and out == "" and err.count("\n") == 1 and "diverged: score.weight is no longer a number" in err
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_ratings_are_pairs_for_bradley_terry(ran, tmp_path):
    assert ran("--max-steps=1", "--held-out=0", rows=rated_rows(10))[0] == 0
    assert json.loads((tmp_path / "out" / "training.json").read_text())["num_examples"] == 30


# -- a folder that is there already ------------------------------------------------------------------------------------


def test_a_folder_with_something_in_it_is_left_alone(ran, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    code, _, err = ran()
    assert code == 2 and "is not empty; choose another folder" in err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_what_the_base_refuses_leaves_the_folder_to_what_it_takes(ran, tmp_path):
    code, _, err = ran("--open-layers=99")
    assert code == 1 and "the base has 3 layers" in err
    assert ran("--open-layers=1", "--max-steps=1")[0] == 0
    assert not (tmp_path / "out" / "unfinished.json").exists()


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_first_step_without_memory_is_one_line_and_leaves_the_folder_to_a_smaller_one(
    ran, tmp_path, monkeypatch, seeds
):
    from rewardserve.training.trainer import RewardModelTrainer

    def run_out(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB.\nSee its documentation.")

    with monkeypatch.context() as patch:
        patch.setattr(RewardModelTrainer, "compute_loss", run_out)
        code, _, err = ran(f"--seeds={seeds}")
    assert code == 1 and err.count("\n") == 1
    assert "Tried to allocate 3.00 GiB.; a smaller --micro-batch-size" in err
    assert list((tmp_path / "out").iterdir()) == []
    assert ran(f"--seeds={seeds}", "--micro-batch-size=2", "--max-steps=1")[0] == 0


@pytest.fixture
def interrupted(ran, tmp_path, monkeypatch):
    """An ensemble of two whose second member was interrupted; and the same, whole."""
    flags = ("--seeds=2", "--max-steps=3", "--held-out=0.3", "--head-dropout=0.1")
    assert ran(*flags)[0] == 0
    shutil.move(tmp_path / "out", tmp_path / "whole")
    train_member = ensemble.train_member

    def stop(material, recipe, seed, *more):
        if seed == 1:
            raise KeyboardInterrupt
        return train_member(material, recipe, seed, *more)

    with monkeypatch.context() as patch:
        patch.setattr(ensemble, "train_member", stop)
        code, _, err = ran(*flags)
    assert code == 130 and "interrupted" in err
    return flags


def test_a_run_goes_on_with_resume_and_ends_as_if_nothing_had_been(ran, tmp_path, interrupted):
    code, _, err = ran(*interrupted)
    assert code == 2 and "go on with it by --resume" in err
    assert ran(*interrupted, "--resume")[0] == 0
    for name in ("seed-0", "seed-1"):
        assert same_weights(weights_of(tmp_path / "out" / name), weights_of(tmp_path / "whole" / name))
    figures = [json.loads((tmp_path / side / "training.json").read_text())["held_out"] for side in ("out", "whole")]
    assert figures[0] == figures[1]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"seed-0", "seed-1", "training.json"}
    code, _, err = ran(*interrupted, "--resume")
    assert code == 2 and "the run in it is complete" in err


def test_another_recipe_does_not_go_on_with_it(ran, interrupted):
    code, _, err = ran(*interrupted, "--resume", "--learning-rate=0.5")
    assert code == 2 and "--resume: learning-rate was 2e-05" in err and "0.5" in err
    code, _, err = ran(*interrupted, "--resume", rows=pair_rows(30))
    assert code == 2 and "--resume: digest was" in err
