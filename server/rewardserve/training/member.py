"""One model, or one member of an ensemble: base, data, recipe and seed -> a folder that can be served."""

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import RewardConfig

from rewardserve.errors import RewardServeError
from rewardserve.models.tokenizer import load_tokenizer
from rewardserve.training import base, data, save
from rewardserve.training.held_out import Figures, HeldOut
from rewardserve.training.recipe import Recipe
from rewardserve.training.trainer import Progress, RewardModelTrainer, choose_padding_id

# transformers calls it by another name from 5.18 or so on, and warns of the old one
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(RewardConfig, "activation_checkpointing") else "gradient_checkpointing"
)
CHECKPOINTS = "checkpoints"  # in the output folder, until it is complete
LOGGING_STEPS = 10


@dataclass(frozen=True, slots=True)
class Material:
    """What all members are made of."""

    base: Path
    base_name: str  # as it was asked for
    train: Dataset
    held_out: HeldOut | None
    dtype: torch.dtype  # of the weights that are written
    as_adapter: bool = False


class Diverged(RewardServeError):
    """Training has ended in weights that are no numbers."""

    grpc = "FAILED_PRECONDITION"


class OutOfMemory(RewardServeError):
    """A step does not fit."""

    grpc = "RESOURCE_EXHAUSTED"


@dataclass(frozen=True, slots=True)
class Trained:
    num_steps: int
    seconds: float
    figures: Figures | None
    held_out_scores: np.ndarray | None  # [responses]


def train_member(
    material: Material,
    recipe: Recipe,
    seed: int,
    folder: Path,
    resume: bool = False,
    show_progress: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Trains and writes everything but the figures. With `resume` it goes on from the last checkpoint in `folder`, or
    begins where there is none. Raises LoadFailed for a base that cannot be used, and Diverged."""
    started = time.monotonic()
    if recipe.bagging:
        material = replace(material, train=data.drawn(material.train, seed))
    model = prepare(material.base, recipe, seed)
    trainer = make_trainer(model, material, recipe, seed, folder / CHECKPOINTS, show_progress, callbacks)
    trainer.go_on(_last_checkpoint(folder / CHECKPOINTS) if resume else None)
    _check_finite(trainer.model)
    figures = None
    if material.held_out is not None:
        if recipe.early_stopping_patience or trainer.measured_at_step != trainer.state.global_step:
            trainer.evaluate()  # of the best model, which may have been an earlier one
        assert trainer.held_out_scores is not None
        figures = material.held_out.figures(trainer.held_out_scores)
    write(trainer.model, material, folder)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return Trained(trainer.state.global_step, time.monotonic() - started, figures, trainer.held_out_scores)


def _check_finite(model: torch.nn.Module) -> None:
    """An accuracy of such weights is 0, and nobody could serve them."""
    broken = [name for name, weight in model.named_parameters() if weight.requires_grad and not weight.isfinite().all()]
    if broken:
        raise Diverged(
            f"training has diverged: {broken[0]} is no longer a number, so nothing is written; try a lower "
            "--learning-rate and another --output, or --early-stopping-patience, which keeps the best of before"
        )


def _last_checkpoint(scratch: Path) -> str | None:
    """The last one that is whole: a run may have been killed while it wrote one, of which the state is written last."""
    for file in scratch.glob("checkpoint-*"):
        if not (file / TRAINER_STATE_NAME).is_file():
            shutil.rmtree(file)
    return get_last_checkpoint(str(scratch)) if scratch.is_dir() else None


def prepare(folder: Path, recipe: Recipe, seed: int) -> Any:
    """The base with its head, of which only what the recipe opens is trained. Raises LoadFailed."""
    model = base.load_base(folder, recipe, seed)
    if recipe.lora_rank:
        return base.with_adapters(model, recipe)
    base.open_last_layers(model, recipe.open_layers)
    return model


def make_trainer(
    model: PreTrainedModel,
    material: Material,
    recipe: Recipe,
    seed: int,
    scratch: Path,
    show_progress: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> RewardModelTrainer:
    """`scratch` is where checkpoints go."""
    tokenizer = load_tokenizer(material.base)
    padding_id = choose_padding_id(tokenizer.pad_token_id, last_ids(material))
    if tokenizer.pad_token is None:  # TRL takes the closing token then, if there is one
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding_id)
    stopping = [EarlyStoppingCallback(recipe.early_stopping_patience)] if recipe.early_stopping_patience else []
    trainer = RewardModelTrainer(
        model=model,
        args=arguments(recipe, seed, scratch, material.held_out is not None, show_progress),
        recipe=recipe,
        train_dataset=material.train,
        held_out=material.held_out,
        tokenizer=tokenizer,
        padding_id=padding_id,
        callbacks=[*stopping, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    if show_progress:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress)
    return trainer


def last_ids(material: Material) -> set[int]:
    """Those that sequences end with."""
    columns = [column for column in ("ids", "chosen_ids", "rejected_ids") if column in material.train.column_names]
    trained = {ids[-1] for column in columns for ids in material.train[column]}
    return trained | {int(ids[-1]) for ids in (material.held_out.ids if material.held_out else ())}


def arguments(recipe: Recipe, seed: int, scratch: Path, is_measured: bool, show_progress: bool) -> RewardConfig:
    """The recipe in TRL's words."""
    micro = recipe.micro_batch_size or recipe.batch_size
    strategy = "steps" if recipe.eval_steps else "epoch"
    stops = recipe.early_stopping_patience > 0
    return RewardConfig(
        output_dir=str(scratch),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=2 * micro,  # a pair in training is two sequences
        gradient_accumulation_steps=recipe.batch_size // micro,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(recipe.schedule, recipe.schedule),
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        bf16=recipe.half,
        **{CHECKPOINTING: recipe.gradient_checkpointing},
        use_cpu=recipe.use_cpu,
        dataloader_pin_memory=not recipe.use_cpu and torch.cuda.is_available(),
        seed=seed,
        max_length=None,  # what is too long was left out before
        remove_unused_columns=False,
        eval_strategy=strategy if is_measured else "no",
        save_strategy=strategy,
        eval_steps=recipe.eval_steps or None,
        **({"save_steps": recipe.eval_steps} if recipe.eval_steps else {}),
        restore_callback_states_from_checkpoint=True,  # how long nothing was better
        save_total_limit=1,  # and the best one, where one is sought
        load_best_model_at_end=stops,
        metric_for_best_model="accuracy" if stops else None,
        greater_is_better=True if stops else None,
        logging_steps=LOGGING_STEPS,
        report_to=[],
        disable_tqdm=not show_progress,
    )


def write(model: Any, material: Material, folder: Path) -> None:
    """Nothing is made up: what was trained, in the precision that was asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    if material.as_adapter:
        # Beside the adapter, if it is a folder: both may be moved together, and no path of a machine is written.
        base_name = os.path.relpath(material.base, folder) if os.path.isdir(material.base_name) else material.base_name
        save.save_adapter(model, folder, base_name)
        return
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    save.save_model(model, folder, material.dtype, material.base, base.read_config(material.base))
