"""An unmodified Hugging Face decoder run on packs: its attention is routed to ours, its last layer is cut short."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rewardserve_kernels.attention import chunked
from rewardserve_kernels.kv_cache.paged import store_rows
from rewardserve_kernels.pooling.reference import Norm, NormKind, normed
from rewardserve_kernels.ragged import Segment
from torch import nn
from transformers import PreTrainedModel

from rewardserve.models.kv_pool import KVPool
from rewardserve.models.packed_attention import (
    ATTENTION,
    AttentionShape,
    Forward,
    Pack,
    PrunedLayer,
    StoreRows,
    TreeAttention,
    plan_for,
    running,
)
from rewardserve.models.packing import NotPackable, check_packable, keep_rope

NORMED_TWICE = {"dory", "nanochat"}  # the final norm stands before the first layer as well
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


class _FullPrecisionNorm(nn.Module):
    """The final norm in fp32, so that what the head reads was not rounded to the backbone's precision once more."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm.float()
        self.skipped = False  # whoever reads the hidden states norms them

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states if self.skipped else self.norm(hidden_states.float())


def _look_for_nothing(*_: Any) -> None: ...


class Backbone:
    """A Hugging Face decoder without its head. Not safe for use by several threads at once."""

    def __init__(self, module: PreTrainedModel) -> None:
        self.module = module
        self.config = module.config.get_text_config()
        self.device, self._dtype = module.device, module.dtype
        self.loaded_as = {name: tensor.dtype for name, tensor in module.state_dict().items()}
        self._padded_attention = module.config._attn_implementation
        self._layers = _decoder_layers(module, self.config.num_hidden_layers)
        self._pruned = self._compiled = False
        self.attention: TreeAttention = chunked
        self.compile_options: dict[str, Any] = {}  # torch.compile's
        self.store_rows: StoreRows = store_rows
        # Of the layers, by the key of their plans, as forwards met them.
        self.attention_shapes: dict[tuple[int, bool], AttentionShape] = {}
        # Between layers, hidden states in fp32: what every layer adds to is not rounded each time. For layers whose
        # products take any precision (rewardserve_kernels.linear).
        self.residual_in_fp32 = False
        self._final_norm = _widen_final_norm(module)
        self._knows_use_cache = "use_cache" in inspect.signature(module.forward).parameters  # no encoder does

    def prepare_packed(self, prune: bool, max_length: int) -> None:
        """Routes attention to ours and, with `prune`, cuts the last layer short. Raises NotPackable."""
        check_packable(self.config, max_length)
        name = ATTENTION[self._dtype]
        self.module.set_attn_implementation(name)
        if self.module.config._attn_implementation != name:
            raise NotPackable("it does not take another attention implementation")
        # Some families look for padding in every forward, to warn of it: on a GPU that waits for it, and no graph
        # can capture it. A pack has none.
        self.module.warn_if_padding_and_no_attention_mask = _look_for_nothing
        keep_rope(self.module)
        if prune and self._layers is not None:
            self._layers[-1] = PrunedLayer(self._layers[-1])
            self._pruned = True

    def prepare_padded(self) -> None:
        """Back to the model as it was loaded; weights that were laid out anew stay so, and may round less."""
        self.set_compiled(False)
        self.module.set_attn_implementation(self._padded_attention)
        if self._pruned and self._layers is not None:
            self._layers[-1] = self._layers[-1].layer
            self._pruned = False

    @property
    def decoder_layers(self) -> Sequence[nn.Module]:
        """Layers that are all of one kind; empty where they cannot be told."""
        return [] if self._layers is None else list(self._layers)

    def set_compiled(self, compiled: bool) -> None:
        """Runs the decoder layers through torch.compile, or as they are. What was compiled once is kept.

        One graph serves all layers, the last one too where it is pruned: our attention ends its first forward half-way.
        """
        self._compiled = compiled
        for layer in self.decoder_layers:
            if isinstance(layer, PrunedLayer):
                layer = layer.layer
            if compiled:
                layer.compile(dynamic=True, fullgraph=True, options=self.compile_options or None)
            else:
                layer._compiled_call_impl = None  # torch has no public way back

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """With layers as they are, for what must not become part of those that are compiled."""
        compiled = self._compiled
        self.set_compiled(False)
        try:
            yield
        finally:
            self.set_compiled(compiled)

    def run_packed(self, pack: Pack, pool: KVPool) -> torch.Tensor:
        """Final hidden states of the rows that are read and asked for, [pack.num_reads, hidden_size].

        Raises NotPackable if not every layer asked our attention exactly once: such a backbone's states are wrong.
        """
        hidden = self._run(pack, pool)
        return (hidden if self._pruned else hidden[pack.read_rows])[: pack.num_reads]

    def run_all_rows(self, pack: Pack, pool: KVPool) -> torch.Tensor:
        """Final hidden states, [rows, hidden_size]. Raises NotPackable likewise; the last layer must not be pruned."""
        assert not self._pruned
        return self._run(pack, pool)

    def _run(self, pack: Pack, pool: KVPool) -> torch.Tensor:
        last_layer = self.config.num_hidden_layers - 1 if self._pruned else -1
        forward = Forward(pack, pool, self.attention, self.store_rows, last_layer)
        with running(forward):
            hidden = self.module(
                **self._inputs(pack.input_ids[None]), position_ids=pack.position_ids[None], use_cache=False
            ).last_hidden_state[0]
        self.attention_shapes = {**self.attention_shapes, **forward.shapes}  # another thread may be reading the old one
        expected = self.config.num_hidden_layers + (1 if self._pruned and pack.reads else 0)
        if forward.num_calls != expected:
            raise NotPackable(f"attention was called {forward.num_calls} times instead of {expected} in a forward")
        return hidden

    def plan_attention(self, segments: Sequence[Segment], reads: Sequence[Segment], key: tuple[int, bool]) -> Any:
        """Ahead of the forward that asks for it; `key` is one of `attention_shapes`."""
        return plan_for(self.attention, segments, reads, key, self.attention_shapes[key].dtype, self.device)

    def leave_out_final_norm(self) -> Norm | None:
        """From here on hidden states come before the final norm, which is returned.

        None, and all stays as it is, where what the norm does is none of the kinds known: it is told by trying it.
        """
        if self._final_norm is None:
            return None
        norm = _recognized(self._final_norm.norm, self.config.hidden_size, self.device)
        self._final_norm.skipped = norm is not None
        return norm

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Of hidden states before the final norm."""
        return torch.float32 if self.residual_in_fp32 else self._dtype

    def restore_final_norm(self) -> None:
        """Hidden states come after the final norm again."""
        if self._final_norm is not None:
            self._final_norm.skipped = False

    def _inputs(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.residual_in_fp32:
            return {"input_ids": input_ids}
        return {"inputs_embeds": self.module.get_input_embeddings()(input_ids).float()}

    def run_padded(self, rows: Sequence[torch.Tensor], reads: Sequence[Sequence[int]]) -> torch.Tensor:
        """Final hidden states at positions `reads` of each row, [all reads, hidden_size], by a right-padded forward."""
        hidden = self._run_padded(rows)
        picked = [hidden[i, list(positions)] for i, positions in enumerate(reads)]
        return torch.cat(picked)

    def means_padded(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Means over the tokens of each row, [len(rows), hidden_size]."""
        hidden = self._run_padded(rows).double()
        return torch.stack([hidden[i, : len(row)].mean(0) for i, row in enumerate(rows)]).float()

    def _run_padded(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """[len(rows), longest, hidden_size]. Where a row ends is told by its length, never by looking for a pad id."""
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        input_ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(self.device)
        mask = (torch.arange(input_ids.shape[1], device=self.device)[None] < lengths[:, None]).long()
        options = {"use_cache": False} if self._knows_use_cache else {}
        return self.module(input_ids=input_ids, attention_mask=mask, **options).last_hidden_state


def bare_module(module: nn.Module, path: str) -> nn.Module:
    """What a model's class has at `path`, whatever was put around it here."""
    for name in filter(None, path.split(".")):
        module = getattr(module, name)
        if isinstance(module, PrunedLayer):
            module = module.layer
        elif isinstance(module, _FullPrecisionNorm):
            module = module.norm
    return module


def _decoder_layers(module: nn.Module, num_layers: int) -> nn.ModuleList | None:
    """The list of decoder layers, or None where it cannot be told (then nothing is pruned or compiled)."""
    lists = [m for m in module.children() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    return lists[0] if len(lists) == 1 else None


def _widen_final_norm(module: PreTrainedModel) -> _FullPrecisionNorm | None:
    if module.config.model_type in NORMED_TWICE:  # layers take nothing wider than they are
        return None
    for name in FINAL_NORMS:
        norm = getattr(module, name, None)
        if isinstance(norm, nn.Module):
            wide = _FullPrecisionNorm(norm)
            setattr(module, name, wide)
            return wide
    return None


def _recognized(norm: nn.Module, hidden_size: int, device: torch.device) -> Norm | None:
    """What `norm` computes, by comparing it with each kind there is; a class may call its parts what it likes."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    eps = next((float(value) for name in ("variance_epsilon", "eps") if (value := getattr(norm, name, None))), None)
    if weight is None or eps is None:
        return None
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(4, hidden_size, generator=generator, device=device) * torch.tensor([[1e-3], [1], [30], [3]]).to(
        device
    )
    with torch.inference_mode():
        wanted = norm(rows)
        for kind, plus_one in ((NormKind.RMS, False), (NormKind.RMS, True), (NormKind.LAYER, False)):
            if bias is not None and kind is not NormKind.LAYER:
                continue
            candidate = Norm(kind, weight, eps, bias, plus_one)
            if torch.allclose(normed(rows, candidate), wanted, rtol=1e-4, atol=1e-6):
                return candidate
    return None
