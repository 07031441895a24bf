"""A run learns, stops, goes on, and is the same again for the same seed."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from preferences import material_of, pair_rows, rated_rows, same_weights, weights_of
from rewardserve.training import ensemble, member
from rewardserve.training.held_out import Figures, HeldOut, Judged, Share
from rewardserve.training.recipe import Recipe
from rewardserve.training.rows import TIE
from rewardserve.training.trainer import Runs
from transformers import TrainerCallback

RECIPE = Recipe(epochs=2, batch_size=4, learning_rate=3e-3, head_dropout=0.1, use_cpu=True)


@pytest.mark.parametrize(
    ("loss", "rows"), [("bradley-terry", pair_rows(100)), ("mse", rated_rows(80)), ("classification", pair_rows(100))]
)
def test_each_loss_learns_what_is_better(run_train, causal_base, loss, rows):
    flags = ("--loss", loss, "--epochs", 6, "--learning-rate", "3e-3", "--held-out", "0.2", "--warmup", "0.1")
    figures = json.loads((run_train(*flags, rows=rows, base=causal_base) / "training.json").read_text())
    assert figures["held_out"]["overall"]["pairs"] >= 10
    assert figures["held_out"]["overall"]["accuracy"] >= 0.9


def test_an_mlp_head_learns_too(run_train, causal_base):
    flags = ("--head", "mlp", "--epochs", 6, "--learning-rate", "3e-3", "--held-out", "0.2")
    figures = json.loads((run_train(*flags, rows=pair_rows(160), base=causal_base) / "training.json").read_text())
    assert figures["held_out"]["overall"]["accuracy"] >= 0.9


def differences(folder):
    """Of the better and the worse response's score, by the model that was written."""
    material = material_of(folder, pair_rows(30))
    trainer = member.make_trainer(member.prepare(folder, RECIPE, 0), material, RECIPE, 0, folder / "scratch")
    trainer.evaluate()
    better, worse, _, _ = material.held_out.columns()
    return trainer.held_out_scores[better] - trainer.held_out_scores[worse]


def test_a_tie_is_learned_as_one(run_train, causal_base):
    """Of the same pairs, those that are said to be ties end up closer together."""
    apart = {}
    for label in (1.0, TIE):
        rows = [{**row, "label": label} for row in pair_rows(60)]
        folder = run_train("--epochs", 4, "--held-out", 0, "--learning-rate", "3e-3", rows=rows, base=causal_base)
        apart[label] = float(np.abs(differences(folder)).mean())
    assert apart[TIE] < 0.2 * apart[1.0]


@pytest.mark.parametrize("center", [0.0, 0.5])
def test_margin_and_label_of_a_row_reach_the_loss(causal_base, tmp_path, center):
    rows = [{**row, "margin": index, "label": 1 - index / 10} for index, row in enumerate(pair_rows(4))]
    material, recipe = material_of(causal_base, rows), replace(RECIPE, head_dropout=0.0, center_rewards=center)
    trainer = member.make_trainer(member.prepare(causal_base, recipe, 0), material, recipe, 0, tmp_path)
    batch = trainer.data_collator(material.train.to_list())
    scores = trainer.rewards(trainer.model, batch).detach()
    plain = 0.0
    for index, (better, worse) in enumerate(zip(scores[:4].tolist(), scores[4:].tolist(), strict=True)):
        label, sure = 1 - index / 10, better - worse
        votes = label * math.log1p(math.exp(index - sure)) + (1 - label) * math.log1p(math.exp(index + sure))
        plain += (votes + center * (better + worse) ** 2) / 4
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(plain, rel=1e-5)


def test_nobody_is_told_what_is_trained(causal_base, tmp_path, monkeypatch):
    """TRL reports each trainer to its makers, unless told otherwise."""
    told = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **what: told.append(what))
    member.make_trainer(member.prepare(causal_base, RECIPE, 0), material_of(causal_base), RECIPE, 0, tmp_path)
    assert not told


# -- seeds -------------------------------------------------------------------------------------------------------------


def test_the_same_seed_trains_the_same_weights_and_another_one_others(run_train, causal_base):
    flags = ("--head-dropout", "0.1", "--max-steps", 3)
    first, again, other = (weights_of(run_train(*flags, "--seed", seed, base=causal_base)) for seed in (5, 5, 6))
    assert same_weights(first, again)
    assert all(not torch.equal(first[key], other[key]) for key in first if first[key].dim() > 1)


def test_an_ensemble_is_its_members_and_a_seed_of_it_is_that_seed_alone(run_train, causal_base):
    flags = ("--head-dropout", "0.1", "--max-steps", 3, "--held-out", "0.3")
    together = run_train(*flags, "--seeds", 3, "--seed", 4, base=causal_base)
    assert sorted(path.name for path in together.iterdir()) == ["seed-4", "seed-5", "seed-6", "training.json"]
    alone = run_train(*flags, "--seed", 5, base=causal_base)
    assert same_weights(weights_of(together / "seed-5"), weights_of(alone))
    figures = json.loads((together / "training.json").read_text())
    assert figures["members"] == ["seed-4", "seed-5", "seed-6"]
    assert 0 <= figures["held_out"]["disagreement"] <= 1
    assert figures["held_out"]["mean"]["overall"]["pairs"] > 0


def test_data_come_in_batches_of_like_length_in_another_order_each_epoch():
    lengths = np.random.default_rng(0).integers(1, 1000, 1003).tolist()
    runs = Runs(lengths, 8, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        runs.set_epoch(epoch)
        orders.append(list(runs))
    assert sorted(orders[0]) == list(range(1003)) and len(runs) == 1003
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != list(Runs(lengths, 8, seed=2))

    def padded(order):
        return sum(8 * max(lengths[i] for i in order[start : start + 8]) for start in range(0, 1000, 8))

    assert padded(orders[0]) < 0.65 * padded(list(range(1003)))
    firsts = [lengths[orders[0][start]] for start in range(0, 1000, 8)]
    assert sorted(firsts) != firsts and np.std(firsts[:30]) > 100


def test_what_fills_no_batch_is_not_always_the_longest():
    """It comes last, when the learning rate is lowest, and has more weight to a row."""
    runs, last = Runs(range(31), 16, seed=1), set()
    for epoch in range(8):
        runs.set_epoch(epoch)
        last |= set(list(runs)[16:])
    assert last == set(range(31))


# -- stopping and going on ---------------------------------------------------------------------------------------------


def test_it_stops_after_so_many_measurements_without_a_better_one_and_keeps_the_best(
    causal_base, tmp_path, monkeypatch
):
    accuracies = iter([0.5, 0.75, 0.75, 0.7, 0.9, 0.9, 0.9, 0.9])
    seen = []

    def figures(self, scores):
        seen.append(scores.copy())
        return Figures(Share(4, next(accuracies)), {})

    monkeypatch.setattr(HeldOut, "figures", figures)
    recipe = replace(RECIPE, max_steps=20, eval_steps=2, early_stopping_patience=2)
    material = material_of(causal_base)
    trained = member.train_member(material, recipe, 0, tmp_path / "out")
    assert trained.num_steps == 8  # the fourth measurement is the second without a better one than 0.75
    assert len(seen) == 6  # four; the best model's once more, to measure it and to report it
    assert np.array_equal(trained.held_out_scores, seen[1])  # the best model, from step 4
    assert not np.array_equal(seen[3], seen[1])


def test_without_patience_it_goes_to_the_end(causal_base, tmp_path):
    recipe = replace(RECIPE, max_steps=6, eval_steps=2, learning_rate=1e-12)
    assert member.train_member(material_of(causal_base), recipe, 0, tmp_path / "out").num_steps == 6


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_run_that_was_killed_goes_on_to_the_very_same_weights(causal_base, tmp_path, lora_rank):
    """Data order, dropout, optimizer and learning rate all go on where they were: in the midst of an epoch, too."""
    recipe = replace(RECIPE, max_steps=7, eval_steps=2, lora_rank=lora_rank)
    material = material_of(causal_base)
    whole = member.train_member(material, recipe, 3, tmp_path / "whole")
    with pytest.raises(Killed):
        member.train_member(material, recipe, 3, tmp_path / "killed", callbacks=[KillAt(5)])
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    resumed = member.train_member(material, recipe, 3, tmp_path / "killed", resume=True)
    assert resumed.num_steps == whole.num_steps == 7
    assert same_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed"))
    assert np.array_equal(whole.held_out_scores, resumed.held_out_scores)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2, "early_stopping_patience": 9}])
def test_a_run_that_was_killed_after_its_last_step_takes_no_other(causal_base, tmp_path, monkeypatch, options):
    recipe = replace(RECIPE, max_steps=4, eval_steps=2, schedule="constant", **options)
    material = material_of(causal_base)
    whole = member.train_member(material, recipe, 3, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(member, "write", lambda *given: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            member.train_member(material, recipe, 3, tmp_path / "killed")
    resumed = member.train_member(material, recipe, 3, tmp_path / "killed", resume=True)
    assert resumed.num_steps == whole.num_steps == 4
    assert same_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed"))
    assert np.array_equal(whole.held_out_scores, resumed.held_out_scores)


def test_a_checkpoint_whose_writing_was_cut_short_is_passed_over(causal_base, tmp_path):
    recipe = replace(RECIPE, max_steps=5, eval_steps=2)
    material = material_of(causal_base)
    with pytest.raises(Killed):
        member.train_member(material, recipe, 3, tmp_path / "killed", callbacks=[KillAt(3)])
    whole = tmp_path / "killed" / "checkpoints" / "checkpoint-2"
    torn = whole.with_name("checkpoint-4")
    torn.mkdir()
    (torn / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:1000])
    assert member.train_member(material, recipe, 3, tmp_path / "killed", resume=True).num_steps == 5


def test_a_run_that_goes_on_remembers_for_how_long_nothing_was_better(causal_base, tmp_path):
    recipe = replace(RECIPE, epochs=9, eval_steps=2, early_stopping_patience=3, learning_rate=1e-12)
    material = material_of(causal_base)
    with pytest.raises(Killed):
        member.train_member(material, recipe, 0, tmp_path / "killed", callbacks=[KillAt(7)])
    assert member.train_member(material, recipe, 0, tmp_path / "killed", resume=True).num_steps == 8
    assert member.train_member(material, recipe, 0, tmp_path / "whole").num_steps == 8


# -- held-out figures --------------------------------------------------------------------------------------------------


def test_accuracy_counts_each_comparison_once_and_equal_scores_half():
    judged = [
        Judged(0, 1, 1.0, 0.0, "a"),
        Judged(1, 2, 1.0, 0.0, "b"),
        Judged(0, 3, 0.9, 0.0, "b"),
        Judged(3, 2, 1, 0, ""),
    ]
    held_out = HeldOut(tuple(np.arange(n + 1) for n in range(4)), tuple(judged), ())
    figures = held_out.figures(np.array([1.0, 1.0, 3.0, 0.0]))
    assert (figures.overall.pairs, figures.overall.accuracy) == (4, 0.375)
    assert {name: (share.pairs, share.accuracy) for name, share in figures.domains.items()} == {
        "a": (1, 0.5),
        "b": (2, 0.5),
    }


def test_together_members_are_the_mean_of_their_scores(causal_base, tmp_path, monkeypatch):
    """One member has a pair the wrong way round, the other one more than makes up for it; on the second they agree."""
    ids = tuple(np.arange(3) for _ in range(4))
    held_out = HeldOut(ids, (Judged(0, 1, 1.0, 0.0, ""), Judged(2, 3, 1.0, 0.0, "")), ())
    scores = {0: np.array([0.0, 1.0, 5.0, 4.0]), 1: np.array([3.0, 0.0, 9.0, 4.0])}

    def trained(material, recipe, seed, folder, *more):
        folder.mkdir()
        return member.Trained(1, 1.0, held_out.figures(scores[seed]), scores[seed])

    monkeypatch.setattr(ensemble, "train_member", trained)
    material = replace(material_of(causal_base), held_out=held_out)
    members, together = ensemble.train_members(material, RECIPE, (0, 1), tmp_path, {})
    assert [member.figures.overall.accuracy for member in members] == [0.5, 1.0]
    assert together.figures.overall.accuracy == 1.0 and together.disagreement == 0.5
