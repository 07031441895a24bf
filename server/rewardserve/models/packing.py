"""Which decoders run on packs: those that keep nothing of a sequence outside the attention interface."""

from torch import nn
from transformers import PreTrainedConfig

PACKABLE_LAYERS = {"full_attention", "sliding_attention"}


class NotPackable(Exception):
    """This backbone does not run right on packs; the padded path must serve it. The message says why."""


def rope_switch(config: PreTrainedConfig) -> int | None:
    """The length, in tokens, beyond which this model's rotary embedding is another one ("longrope"); None: it never is.

    Hugging Face decides it once for a forward, by the longest sequence in it. So a sequence has a score of its own only
    in a forward without sequences from the other side of the switch.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    for kind in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if kind.get("rope_type") == "longrope":
            original = kind.get("original_max_position_embeddings")
            return int(original or getattr(config, "original_max_position_embeddings", config.max_position_embeddings))
    return None


def keep_rope(module: nn.Module) -> None:
    """As it is up to the length from which it changes, which no packed sequence reaches: see check_packable, and a
    model's own positions. Looking for that in every forward makes the host wait for a GPU, and no graph can capture it.
    """

    def kept(kind: str) -> str:
        return "default" if kind == "longrope" or "dynamic" in kind else kind

    for part in module.modules():
        kinds = getattr(part, "rope_type", None)
        if isinstance(kinds, str):
            part.rope_type = kept(kinds)
        elif isinstance(kinds, dict):  # by kind of layer
            part.rope_type = {layer: kept(kind) for layer, kind in kinds.items()}


def check_packable(config: PreTrainedConfig, max_length: int) -> None:
    """Raises NotPackable for what is known to keep its mask, or a state, outside the attention interface.

    Necessary, not sufficient: the calls are counted on every forward, and the canary compares scores at load.
    """
    text = config.get_text_config()
    switch = rope_switch(text)
    if switch is not None and max_length > switch:
        raise NotPackable(
            f"its rotary embedding is another one for sequences beyond {switch} tokens, and one pack holds both kinds; "
            f"with max_length = {switch} it can be packed"
        )
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if not kinds <= PACKABLE_LAYERS:
        raise NotPackable(f"it has layers of kind {', '.join(sorted(kinds - PACKABLE_LAYERS))}")
    if getattr(text, "attention_chunk_size", None):
        raise NotPackable("its attention is chunked by its mask")
    if getattr(text, "use_bidirectional_attention", False) or getattr(text, "is_causal", True) is False:
        raise NotPackable("its attention is not causal")
