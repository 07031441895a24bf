"""How a reward model is trained: the options of a run, as plain values."""

from dataclasses import dataclass
from typing import Literal

Loss = Literal["bradley-terry", "mse", "classification"]
Head = Literal["linear", "mlp"]
Schedule = Literal["cosine", "linear", "constant"]

ALL_LAYERS = -1


@dataclass(frozen=True, slots=True)
class Recipe:
    """The same for all members of an ensemble, which differ in their seed."""

    loss: Loss = "bradley-terry"
    head: Head = "linear"
    new_head: bool = False  # begin with a new head even where the base has one of this kind
    head_dropout: float = 0.0
    open_layers: int = ALL_LAYERS  # how many of the last layers are trained; embeddings only if all are
    lora_rank: int = 0  # of adapters on the open layers; 0: their weights themselves are trained
    bagging: bool = False  # each member learns from prompts drawn for it with replacement
    epochs: float = 1.0
    max_steps: int = 0  # 0: as many as the epochs have
    batch_size: int = 16  # pairs, or responses where the loss is of single ones, per optimizer step
    micro_batch_size: int = 0  # how many of them at once; 0: all
    learning_rate: float = 2e-5
    warmup: float = 0.05  # share of the steps; from 1 up, their number
    schedule: Schedule = "cosine"
    weight_decay: float = 0.0
    center_rewards: float = 0.0
    early_stopping_patience: int = 0  # 0: none
    eval_steps: int = 0  # 0: once an epoch
    half: bool = False  # bfloat16 products; weights, norms and head stay in fp32
    gradient_checkpointing: bool = False
    use_cpu: bool = False

    @property
    def is_pairwise(self) -> bool:
        return self.loss == "bradley-terry"
