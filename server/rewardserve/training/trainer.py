"""TRL's RewardTrainer with our losses, data order and measure. The loop, optimizer and checkpoints are theirs."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback, TrainerState
from trl import RewardConfig, RewardTrainer

from rewardserve.training import losses
from rewardserve.training.held_out import HeldOut
from rewardserve.training.recipe import Recipe

RUNS_SORTED = 50  # batches among which those of like length are put together

Batch = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Collator:
    """Examples of data.py -> a batch of padded sequences; of pairs, first all better ones, then all worse ones."""

    padding_id: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Batch:
        if "ids" in examples[0]:
            rows = [example["ids"] for example in examples]
        else:
            rows = [example[key] for key in ("chosen_ids", "rejected_ids") for example in examples]
        lengths = torch.tensor([len(row) for row in rows])
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=self.padding_id)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        known = {
            key: torch.tensor([example[key] for example in examples], dtype=torch.float32)
            for key in ("label", "margin", "target")
            if key in examples[0]
        }
        return {"input_ids": ids.long(), "attention_mask": mask, **known}


def choose_padding_id(preferred: int | None, last_ids: set[int]) -> int:
    """An id that no sequence ends with.

    transformers reads the score at the last token that is not padding. Where a template closes with the token that also
    pads, as many do, it would read the one before, and training would see another number than serving, which reads the
    last token. `last_ids` are those that sequences end with.
    """
    if preferred is not None and preferred not in last_ids:
        return preferred
    return next(candidate for candidate in range(len(last_ids) + 1) if candidate not in last_ids)


class Runs(Sampler[int]):
    """Batches of like length in random order: little padding, and no step sees the short ones only.

    The order depends on seed and epoch alone, so that a run that goes on continues where it was.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self._seed, self._epoch))
        order = rng.permutation(len(self._lengths)).tolist()
        filled = len(order) - len(order) % self._batch_size
        size = RUNS_SORTED * self._batch_size
        chunks = [
            sorted(order[i : min(i + size, filled)], key=self._lengths.__getitem__) for i in range(0, filled, size)
        ]
        runs = [chunk[i : i + self._batch_size] for chunk in chunks for i in range(0, len(chunk), self._batch_size)]
        rng.shuffle(runs)
        # What fills no batch comes last: in the middle it would shift all that follow out of their runs. It is any of
        # them, not the longest: the last steps have the lowest learning rate.
        return iter([index for run in (*runs, order[filled:]) for index in run])


class Progress(ProgressCallback):
    """transformers' bar, with the last figures beside it instead of a dictionary for each."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {"loss": "loss", "accuracy": "accuracy", "eval_accuracy": "held out"}
            figures = {name: f"{logs[key]:.3f}" for key, name in shown.items() if logs and key in logs}
            self.training_bar.set_postfix(figures)


class RewardModelTrainer(RewardTrainer):
    """Trains on what data.py makes, and measures on what is held out."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: RewardConfig,
        recipe: Recipe,
        train_dataset: Dataset,
        held_out: HeldOut | None,
        tokenizer: PreTrainedTokenizerBase,
        padding_id: int,
        **options: Any,
    ) -> None:
        self._recipe = recipe
        self._held_out = held_out
        self.held_out_scores: np.ndarray | None = None  # [responses], of the last evaluation
        self.measured_at_step = -1
        self._mean_size = 0.0  # sequences in a micro-batch, over those of the step under way
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(padding_id),
            train_dataset=train_dataset,
            eval_dataset=None if held_out is None else held_out.dataset(),
            processing_class=tokenizer,
            **options,
        )
        self.model.config.get_text_config().pad_token_id = padding_id  # where its forward looks for the last token

    def _send_telemetry(self) -> None:
        """Nobody is told what is trained here."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        """It is token ids already: serving's, which TRL's own tokenization need not agree with."""
        return dataset

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        lengths = (self.train_dataset if train_dataset is None else train_dataset)["length"]
        return Runs(list(lengths), self.args.per_device_train_batch_size, self.args.seed)

    def go_on(self, checkpoint: str | None) -> None:
        """Trains to the end, from `checkpoint` where there is one. Where that is the end, no step more is taken:
        transformers looks whether it was the last one behind a step, not before it."""
        if checkpoint is None:
            self.train()
            return
        state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        if state.global_step < state.max_steps:
            self.train(resume_from_checkpoint=checkpoint)
            return
        self.state = state
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        """The micro-batches of the next step."""
        batches, num_items = super().get_batch_samples(*args, **options)
        self._mean_size = sum(len(batch["input_ids"]) for batch in batches) / max(len(batches), 1)
        return batches, num_items

    def rewards(self, model: nn.Module, inputs: Batch) -> torch.Tensor:
        """Scores of a batch's sequences, [sequences] fp32."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        return outputs.logits.squeeze(-1).float()

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        scores = self.rewards(model, inputs)
        if self._recipe.is_pairwise:
            better, worse = scores.chunk(2)
            loss = self._pair_loss(better, worse, inputs["label"], inputs["margin"])
            right = (better > worse)[inputs["label"] > 0.5].float()
            if len(right):
                self._metrics["train"]["accuracy"].append(right.mean().item())
        else:
            loss = losses.POINTWISE[self._recipe.loss](scores, inputs["target"])
        if self._mean_size:  # micro-batches are averaged, and the last one of an epoch may have fewer rows
            loss = loss * (len(scores) / self._mean_size)
        return (loss, {"logits": scores}) if return_outputs else loss

    def _pair_loss(
        self, better: torch.Tensor, worse: torch.Tensor, label: torch.Tensor, margin: torch.Tensor
    ) -> torch.Tensor:
        loss = losses.bradley_terry(better, worse, label, margin)
        if self._recipe.center_rewards:
            loss = loss + self._recipe.center_rewards * losses.centering(better, worse)
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, torch.Tensor, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return None, self.rewards(model, inputs), None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Scores each held-out response once; accuracy over all comparisons and by domain, and the loss."""
        assert self._held_out is not None and eval_dataset is None, "it is held-out data of ours that is measured"
        started = time.monotonic()
        predictions = self.predict(self.eval_dataset, ignore_keys).predictions
        scores = self.held_out_scores = self._held_out.in_order(np.asarray(predictions))
        self.measured_at_step = self.state.global_step
        figures = self._held_out.figures(scores)
        metrics = {
            f"{metric_key_prefix}_loss": self._held_out_loss(scores),
            f"{metric_key_prefix}_accuracy": figures.overall.accuracy,
            **{f"{metric_key_prefix}_accuracy_{name}": share.accuracy for name, share in figures.domains.items()},
            f"{metric_key_prefix}_runtime": time.monotonic() - started,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _held_out_loss(self, scores: np.ndarray) -> float:
        assert self._held_out is not None
        if not self._recipe.is_pairwise:
            of_single = losses.POINTWISE[self._recipe.loss]
            return of_single(torch.from_numpy(scores), torch.tensor(self._held_out.targets)).item()
        better, worse, label, margin = self._held_out.columns()
        values = (scores[better], scores[worse], label, margin)
        return self._pair_loss(*(torch.from_numpy(value).float() for value in values)).item()
