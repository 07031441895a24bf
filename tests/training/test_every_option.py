"""No option is without effect: each changes what is learned, or what is written, or how."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from preferences import material_of, pair_rows, rated_rows, same_weights, save_reward_base, weights_of
from rewardserve.cli.train import TrainOptions, _on_cpu
from rewardserve.options import ConfigError
from rewardserve.training import member
from rewardserve.training.recipe import Recipe
from safetensors import safe_open
from transformers import Trainer, TrainerCallback
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

# Options that change the weights of a run of a few steps, each with what it is compared with.
CHANGES: dict[str, tuple[list[str], list[str]]] = {
    "loss": ([], ["--loss", "classification"]),
    "head": (["--new-head"], ["--new-head", "--head", "mlp"]),
    "new_head": ([], ["--new-head"]),
    "head_dropout": ([], ["--head-dropout", "0.2"]),
    "open_layers": ([], ["--open-layers", "1"]),
    "lora_rank": ([], ["--lora-rank", "2"]),
    "seed": ([], ["--seed", "1"]),
    "bagging": ([], ["--bagging"]),
    "epochs": ([], ["--epochs", "2"]),
    "max_steps": ([], ["--max-steps", "1"]),
    "batch_size": ([], ["--batch-size", "4"]),
    "learning_rate": ([], ["--learning-rate", "2e-3"]),
    "warmup": ([], ["--warmup", "0.9"]),
    "schedule": ([], ["--schedule", "constant"]),
    "weight_decay": ([], ["--weight-decay", "0.5"]),
    "center_rewards": ([], ["--center-rewards", "1"]),
    "held_out": ([], ["--held-out", "0.5"]),
    "held_out_domain": ([], ["--held-out-domain", "b"]),
    "max_length": (["--held-out", "0"], ["--held-out", "0", "--max-length", "40"]),
    "pairs_per_prompt": (["--held-out", "0"], ["--held-out", "0", "--pairs-per-prompt", "1"]),
    "dtype": ([], ["--dtype", "bfloat16"]),
}
TESTED_APART = {
    "config": "test_config.py",
    "data": "below",
    "base": "test_what_is_trained.py",
    "output": "below",
    "adapter": "below",
    "seeds": "test_a_run.py",
    "micro_batch_size": "below",
    "eval_data": "below",
    "eval_steps": "below",
    "early_stopping_patience": "test_a_run.py, and below",
    "gradient_checkpointing": "below",
    "device": "below",
    "threads": "below",
    "resume": "tests/cli",
}
DOMAINS = ("a", "b")


def rows_for(option):
    return rated_rows(12) if option == "pairs_per_prompt" else pair_rows(24, DOMAINS)


def test_every_option_is_tested():
    assert {*CHANGES, *TESTED_APART} == set(TrainOptions.model_fields)


@pytest.fixture(scope="module")
def before() -> dict[str, dict[str, torch.Tensor]]:
    """Weights of the runs that others are compared with: most are compared with the same one."""
    return {}


@pytest.mark.parametrize("option", CHANGES)
def test_it_changes_what_is_learned(run_train, before, option):
    usual, changed = CHANGES[option]
    rows = rows_for(option)
    key = f"{usual} {len(rows)}"
    if key not in before:
        before[key] = weights_of(run_train(*usual, rows=rows))
    assert not same_weights(before[key], weights_of(run_train(*changed, rows=rows)))


@pytest.mark.parametrize("option", [option for option in TrainOptions.model_fields if option != "config"])
def test_its_help_fits_a_line(option):
    description = TrainOptions.model_fields[option].description
    assert description and not description.endswith(".") and "\n" not in description
    assert len(description) <= 100 or option == "data"  # which shows what a row is


@pytest.fixture
def arguments_seen(monkeypatch):
    """What TRL's trainer was told, by each run."""
    seen = []
    make = member.arguments
    monkeypatch.setattr(member, "arguments", lambda *given: seen.append(make(*given)) or seen[-1])
    return seen


class Noted(TrainerCallback):
    """Calls `note` with the model before each optimizer step."""

    def __init__(self, note):
        self.note = note

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.note(model)


def test_a_micro_batch_is_what_is_computed_at_once(run_train, monkeypatch):
    shapes, compute = [], member.RewardModelTrainer.compute_loss

    def watch(self, model, inputs, *more, **options):
        shapes.append(len(inputs["input_ids"]))
        return compute(self, model, inputs, *more, **options)

    monkeypatch.setattr(member.RewardModelTrainer, "compute_loss", watch)
    weights = [weights_of(run_train("--held-out", 0, "--max-steps", 1, "--micro-batch-size", size)) for size in (0, 2)]
    assert shapes == [16] + [4] * 4  # pairs are two sequences
    assert all(torch.allclose(weights[0][key], weights[1][key], atol=3e-3) for key in weights[0])


def test_a_row_counts_the_same_in_a_micro_batch_that_is_not_full(causal_base, tmp_path):
    """Seven pairs make one step: all at once, or as five and two."""
    moved = []
    for size in (0, 5):
        recipe = Recipe(epochs=1, batch_size=10, micro_batch_size=size, schedule="constant", warmup=0, use_cpu=True)
        model = member.prepare(causal_base, recipe, 0)
        material = replace(material_of(causal_base, pair_rows(7)), held_out=None)
        trainer = member.make_trainer(model, material, recipe, 0, tmp_path / str(size))
        gradients = []
        trainer.add_callback(Noted(lambda model, seen=gradients: seen.append(model.score.weight.grad.clone())))
        trainer.train()
        moved += gradients
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_computes_twice_and_learns_the_same(run_train, monkeypatch):
    calls, compute = [], Qwen3MLP.forward

    def watch(self, *given, **options):
        calls.append(1)
        return compute(self, *given, **options)

    monkeypatch.setattr(Qwen3MLP, "forward", watch)
    found = []
    for flags in ([], ["--gradient-checkpointing"]):
        calls.clear()
        found.append((weights_of(run_train("--held-out", 0, "--max-steps", 1, *flags)), len(calls)))
    assert found[1][1] == 2 * found[0][1]
    assert all(torch.allclose(found[0][0][key], found[1][0][key], atol=1e-6) for key in found[0][0])


def test_eval_steps_are_steps_between_measurements_and_checkpoints(run_train, monkeypatch):
    measured, saved = [], []

    def noting(steps, work):
        def noted(self, *given, **options):
            steps.append(self.state.global_step)
            return work(self, *given, **options)

        return noted

    monkeypatch.setattr(member.RewardModelTrainer, "evaluate", noting(measured, member.RewardModelTrainer.evaluate))
    monkeypatch.setattr(Trainer, "_save_checkpoint", noting(saved, Trainer._save_checkpoint))
    run_train("--held-out", "0.3", "--max-steps", 5, "--eval-steps", 2)
    assert measured == [2, 4, 5] and saved[:2] == [2, 4]


def test_early_stopping_reaches_the_trainer(run_train, arguments_seen):
    run_train("--held-out", "0.3", "--max-steps", 1)
    run_train("--held-out", "0.3", "--max-steps", 1, "--early-stopping-patience", 2)
    assert [args.load_best_model_at_end for args in arguments_seen] == [False, True]
    assert arguments_seen[1].metric_for_best_model == "accuracy" and arguments_seen[1].greater_is_better


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_device_cpu_keeps_to_the_cpu_and_auto_takes_a_gpu_where_there_is_one(monkeypatch, num_gpus):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert [_on_cpu(device) for device in ("auto", "cpu")] == [num_gpus == 0, True]


def test_of_several_gpus_one_must_be_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        _on_cpu("auto")


def test_threads_are_torchs(run_train):
    run_train("--max-steps", 1, "--threads", 3)
    assert torch.get_num_threads() == 3


def test_an_adapter_is_a_small_part_of_the_model(run_train):
    folder = run_train("--max-steps", 1, "--lora-rank", 1, "--adapter")
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    }


def test_eval_data_are_measured_with_and_their_prompts_not_trained_on(run_train, write, capfd):
    others = write(pair_rows(6, ("x",)), "eval.jsonl")
    folder = run_train("--eval-data", others, rows=pair_rows(24))
    figures = json.loads((folder / "training.json").read_text())
    assert figures["num_examples"] == 18 and figures["held_out"]["domains"]["x"]["pairs"] == 6
    assert "6 rows of" in capfd.readouterr().err


def test_a_held_out_domain_is_measured_with_whole(run_train):
    folder = run_train("--held-out", 0, "--held-out-domain", "b", rows=pair_rows(24, DOMAINS))
    figures = json.loads((folder / "training.json").read_text())
    assert figures["num_examples"] == 12
    assert {name: share["pairs"] for name, share in figures["held_out"]["domains"].items()} == {"b": 12}


def test_figures_say_what_was_asked_for_and_what_it_was_made_with(run_train):
    folder = run_train("--held-out", 0, "--max-steps", 2, "--head-dropout", "0.25")
    figures = json.loads((folder / "training.json").read_text())
    assert figures["options"]["head_dropout"] == 0.25 and figures["num_steps"] == 2 and figures["held_out"] is None
    assert {"rewardserve", "torch", "transformers", "trl"} <= figures["libraries"].keys()
    assert str(Path(folder).parent) not in json.dumps({k: v for k, v in figures.items() if k != "base"})


def test_auto_dtype_is_the_bases_own(run_train, tmp_path):
    base = save_reward_base(tmp_path / "half", dtype=torch.bfloat16)
    found = []
    for flags in ([], ["--dtype", "float32"]):
        with safe_open(run_train("--max-steps", 1, *flags, base=base) / "model.safetensors", "pt") as tensors:
            found.append(tensors.get_slice("model.layers.0.mlp.up_proj.weight").get_dtype())
    assert found == ["BF16", "F32"]
