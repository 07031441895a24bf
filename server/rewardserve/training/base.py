"""The checkpoint that training begins with -> a model with the head, the open layers and the adapters of a recipe."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from rewardserve.errors import LoadFailed
from rewardserve.models.checkpoint import SPEC_FILE, Checkpoint, as_trained, attention_of, first_line
from rewardserve.models.families import AT_LAST
from rewardserve.models.head_parts import keys_below
from rewardserve.models.spec import read_spec
from rewardserve.training.heads import MLP_KEYS, LinearHead, MlpHead
from rewardserve.training.recipe import ALL_LAYERS, Recipe

if TYPE_CHECKING:
    from peft import PeftModel

HEADS = {"linear": LinearHead, "mlp": MlpHead}
HEAD_WEIGHT = "score.weight"  # of transformers' classes, where a head is linear
OF_LANGUAGE = ("lm_head.", "output.", "embed_out.")  # what the weights of a language model's own head begin with
OWN_KEY = "rewardserve"  # of config.json: {"head": "mlp"}
LORA_ALPHA = 2  # times the rank


def read_config(folder: Path) -> PreTrainedConfig:
    """Raises LoadFailed if the folder holds no decoder."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a config can be wrong in as many ways as it has keys
        raise LoadFailed(f"{folder}/config.json: {first_line(error)}") from error
    if config.is_encoder_decoder:
        raise LoadFailed(f"{folder}: an encoder-decoder model; only decoders can become reward models here")
    return as_trained(config)


def max_length_of(config: PreTrainedConfig) -> int:
    """Tokens that serving will take of this model."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "seq_length")
    return next((int(getattr(text, name)) for name in names if getattr(text, name, None)), 2048)


def choose_dtype(asked: str, folder: Path) -> torch.dtype:
    """`auto` is bfloat16 for a base that is stored in 16 bits, else float32."""
    if asked != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[asked]
    stored = {_stored_dtype(file) for file in sorted(folder.glob("*.safetensors"))}
    return torch.bfloat16 if stored & {"BF16", "F16"} else torch.float32


def _stored_dtype(file: Path) -> str:
    """Of a file's first matrix."""
    with safe_open(file, framework="pt") as tensors:
        slices = (tensors.get_slice(key) for key in sorted(tensors.keys()) if key != HEAD_WEIGHT)
        return next((found.get_dtype() for found in slices if len(found.get_shape()) > 1), "F32")


def load_base(folder: Path, recipe: Recipe, seed: int) -> PreTrainedModel:
    """A causal language model, or a reward model to go on with, in fp32, with the recipe's head.

    The base's own head is kept if it is of the recipe's kind, unless a new one is asked for; `seed` decides a new one's
    weights. Raises LoadFailed where a weight beside the head is missing: transformers would make one up.
    """
    config = read_config(folder)
    config.num_labels = 1
    transformers_logging.set_verbosity_error()  # what is missing we say ourselves
    transformers_logging.disable_progress_bar()
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,  # the optimizer's steps are lost in 16 bits
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that they are reported; they are refused below
            **attention_of(config),
        )
    except Exception as error:  # what a config describes may not be buildable, in as many ways
        raise LoadFailed(f"{folder}: no decoder that a reward model can be made of: {first_line(error)}") from error
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise LoadFailed(f"{folder}: {type(model).__name__} has no head named 'score'; choose a decoder")
    missing, misshapen = (sorted(map(_key, info[kind])) for kind in ("missing_keys", "mismatched_keys"))
    if HEAD_WEIGHT in misshapen and not recipe.new_head:
        raise LoadFailed(f"{folder}: its head has more than one label, and cannot go on as it is: --new-head")
    of_backbone = [key for key in (*missing, *misshapen) if key != HEAD_WEIGHT]
    if of_backbone:
        raise LoadFailed(f"{folder}: weights missing or of the wrong shape: {', '.join(of_backbone[:10])}")
    _place_head(model, folder, config, HEAD_WEIGHT not in (*missing, *misshapen), recipe, seed)
    model.config.id2label, model.config.label2id = {0: "reward"}, {"reward": 0}
    return model


def _key(found: Any) -> str:
    """Of a weight that is missing, or of one whose shapes stand beside it."""
    return found if isinstance(found, str) else str(found[0])


def _place_head(
    model: PreTrainedModel, folder: Path, config: PreTrainedConfig, has_linear: bool, recipe: Recipe, seed: int
) -> None:
    own = None if recipe.new_head else _own_head(folder, config, has_linear)
    if own is not None and own != recipe.head:
        raise LoadFailed(f"{folder} has a head of kind '{own}': go on with --head {own}, or start anew with --new-head")
    set_seed(seed)
    head = HEADS[recipe.head](config.get_text_config().hidden_size, recipe.head_dropout)
    if own is not None:
        weights = model.score.state_dict() if recipe.head == "linear" else _read_mlp(folder)
        head.load_state_dict(weights)
    model.score = head
    if recipe.head != "linear":
        setattr(model.config, OWN_KEY, {"head": recipe.head})
    elif hasattr(model.config, OWN_KEY):
        delattr(model.config, OWN_KEY)  # a linear head is the plain kind, that every reader of a checkpoint expects


def _own_head(folder: Path, config: PreTrainedConfig, has_linear: bool) -> str | None:
    """The kind of head that the base has; None for a language model. Raises LoadFailed for a reward model whose head is
    none that is trained here: it would be left behind without a word."""
    if told := (getattr(config, OWN_KEY, None) or {}).get("head"):
        return told
    try:
        spec = read_spec(str(folder))
    except LoadFailed:  # nothing that is served as it is: a language model
        return "linear" if has_linear else None
    served, checkpoint = spec.recipe, spec.checkpoint
    if all(key.startswith(OF_LANGUAGE) for key in served.head_keys):
        return None  # its own logits are read
    told_beside = (folder / SPEC_FILE).is_file()
    is_plain = served.reads == AT_LAST and served.appended is None and not served.is_probability and not told_beside
    if is_plain and has_linear:
        return "linear"
    if is_plain and set(keys_below(checkpoint, "score")) == set(MLP_KEYS) and _is_square(checkpoint):
        return "mlp"
    raise LoadFailed(
        f"{folder} is a reward model ({served.family}) with a head that cannot be trained here; begin with a new one: "
        "--new-head"
    )


def _is_square(checkpoint: Checkpoint) -> bool:
    """Whether an MLP is as wide inside as the hidden state, as those are that are trained here."""
    size = checkpoint.hidden_size
    return [checkpoint.shape(key) for key in MLP_KEYS if key.endswith("weight")] == [(size, size), (1, size)]


def _read_mlp(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an MLP head without their prefix. Raises LoadFailed if one is missing."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {key: tensors.get_tensor(key) for key in MLP_KEYS if key in tensors.keys()}  # noqa: SIM118
    if found.keys() != set(MLP_KEYS):
        missing = ", ".join(key for key in MLP_KEYS if key not in found)
        raise LoadFailed(f"{folder}: config.json says that the head is an MLP, and {missing} are not there")
    return {key.removeprefix("score."): weight.float() for key, weight in found.items()}


# -- what is trained ---------------------------------------------------------------------------------------------------


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """What the backbone calls its layers, and they themselves. Raises LoadFailed where they are not found."""
    backbone = getattr(model, model.base_model_prefix)
    number = model.config.get_text_config().num_hidden_layers
    for name, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return name.rpartition(".")[2], module
    raise LoadFailed(f"{type(model).__name__}: its {number} layers are not found, so none can be kept closed")


def open_last_layers(model: PreTrainedModel, number: int) -> None:
    """Trains the last `number` layers, the final norm and the head; with 0 the head alone, with ALL_LAYERS everything.

    Raises LoadFailed if there are not as many layers.
    """
    if number == ALL_LAYERS:
        return
    _, layers = decoder_layers(model)
    _check_number(number, len(layers))
    model.requires_grad_(False)
    model.score.requires_grad_(True)
    if number:
        for module in (*layers[-number:], *_final_norms(model)):
            module.requires_grad_(True)


def _check_number(number: int, num_layers: int) -> None:
    if number > num_layers:
        raise LoadFailed(f"--open-layers {number}: the base has {num_layers} layers")


def _final_norms(model: PreTrainedModel) -> list[nn.Module]:
    """The norms of the backbone that no layer contains."""
    backbone = getattr(model, model.base_model_prefix)
    return [module for name, module in backbone.named_children() if "norm" in name or name == "ln_f"]


def with_adapters(model: PreTrainedModel, recipe: Recipe) -> "PeftModel":
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on every matrix of the open layers; the head is trained as
    it is. Raises LoadFailed if there are not as many layers."""
    from peft import LoraConfig, get_peft_model

    called, layers = decoder_layers(model)
    config: dict[str, Any] = {}
    if recipe.open_layers != ALL_LAYERS:
        _check_number(recipe.open_layers, len(layers))
        first = len(layers) - recipe.open_layers
        config |= {"layers_to_transform": list(range(first, len(layers))), "layers_pattern": called}
    names = {
        name.rpartition(".")[2] for name, module in layers.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    }
    return get_peft_model(
        model,
        LoraConfig(
            task_type="SEQ_CLS",  # by which the head is trained, and saved, as it is
            r=recipe.lora_rank,
            lora_alpha=LORA_ALPHA * recipe.lora_rank,
            lora_dropout=0.0,
            target_modules=sorted(names),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in layers.modules()),
            **config,
        ),
    )
