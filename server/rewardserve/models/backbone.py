"""An unmodified Hugging Face decoder run on packs: its attention is routed to ours, its last layer is cut short.

Every decoder that calls transformers' attention interface runs here as it is. The interface hands over queries, keys
and values after rotary embedding; we route them to one opaque operator, so that torch.compile sees a black box and one
graph serves every layer. What the operator needs to know of the pack it reads from the calling thread's context: not
every model family passes keyword arguments through.
"""

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from rewardserve_kernels.attention import chunked
from rewardserve_kernels.kv_cache.paged import StoreIndex, store_rows, store_segment
from rewardserve_kernels.pooling.reference import Norm, NormKind, normed
from rewardserve_kernels.pooling.running_mean import MeanRows
from rewardserve_kernels.ragged import Segment
from rewardserve_kernels.workspace import Workspace
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from rewardserve.models.kv_pool import KVPool

COMPUTED = (torch.float32, torch.bfloat16, torch.float16)
ATTENTION = {dtype: f"rewardserve_{str(dtype).removeprefix('torch.')}" for dtype in COMPUTED}
PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
NORMED_TWICE = {"dory", "nanochat"}  # the final norm stands before the first layer as well
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


class NotPackable(Exception):
    """This backbone does not run right on packs; the padded path must serve it. The message says why."""


class TreeAttention(Protocol):
    """A module of rewardserve_kernels.attention: cuts the attention of a pack once, computes it in every layer."""

    def plan_attention(
        self, segments: Sequence[Segment], dtype: torch.dtype, device: torch.device, window: int, last_rows_only: bool
    ) -> Any: ...

    def tree_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pool_k: torch.Tensor,
        pool_v: torch.Tensor,
        plan: Any,
        workspace: Workspace,
        scale: float,
        softcap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor: ...


# pools of keys and values, keys and values, where they go: rewardserve_kernels.kv_cache
StoreRows = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, StoreIndex], None]


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward: the tokens of all segments end to end."""

    input_ids: torch.Tensor  # [rows] int32
    position_ids: torch.Tensor  # [rows] int32
    segments: tuple[Segment, ...]
    reads: tuple[Segment, ...]  # for every row that is read, its segment up to it
    read_rows: torch.Tensor  # [len(reads)] int32: the last row of each
    stored: StoreIndex | None = None  # of the rows to store, for one launch; None: segment by segment
    # Of the attention, by window and whether it is that of the read rows only; made when first asked for.
    plans: dict[tuple[int, bool], Any] = field(default_factory=dict)
    means: MeanRows | None = None  # what a head that reads means sums up
    num_reads: int | None = None  # how many of the reads, from the first, are asked for; None: all


@dataclass(frozen=True, slots=True)
class AttentionShape:
    heads: int
    kv_heads: int
    head_size: int
    v_head_size: int
    dtype: torch.dtype


@dataclass(slots=True)
class _Forward:
    """State of the forward under way on one thread."""

    pack: Pack
    pool: KVPool
    attention: TreeAttention
    store_rows: StoreRows
    last_layer: int  # index of the pruned layer, -1 without pruning
    num_calls: int = 0
    capturing: bool = False
    captured: tuple[torch.Tensor, torch.Tensor] | None = None
    shapes: dict[tuple[int, bool], AttentionShape] = field(default_factory=dict)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pools: tuple[torch.Tensor, torch.Tensor],
        scale: float,
        window: int,
        softcap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """By the pack's plan, or, once keys are captured, by that of its read rows; made once for a window."""
        pack = self.pack
        key = (window, self.captured is not None)
        if key not in pack.plans:
            pack.plans[key] = _plan(self.attention, pack.segments, pack.reads, key, q.dtype, q.device)
        self.shapes[key] = AttentionShape(len(q), len(k), q.shape[2], v.shape[2], q.dtype)
        plan, workspace = pack.plans[key], self.pool.workspace
        return self.attention.tree_attention(q, k, v, *pools, plan, workspace, scale, softcap, sinks)

    def store(self, pools: tuple[torch.Tensor, torch.Tensor], k: torch.Tensor, v: torch.Tensor) -> None:
        """Keys and values of the rows that are to be kept: in one go, or, on a CPU, segment by segment."""
        if self.pack.stored is not None:
            self.store_rows(*pools, k, v, self.pack.stored)
            return
        for segment in self.pack.segments:
            if segment.store:
                own = slice(segment.row, segment.row + segment.num_rows)
                for pool, rows in zip(pools, (k, v), strict=True):
                    store_segment(pool, rows[:, own], segment)


def _plan(
    attention: TreeAttention,
    segments: Sequence[Segment],
    reads: Sequence[Segment],
    key: tuple[int, bool],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    window, reads_only = key
    return attention.plan_attention(reads if reads_only else segments, dtype, device, window, reads_only)


_current = threading.local()


class _KeysCaptured(Exception):
    """Leaves the last layer once its keys and values are known: the rest of it is needed for rows that are read."""


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q [1, heads, rows, head_size], k and v [1, kv_heads, rows, ...] -> [1, rows, heads, v_head_size]."""
    forward: _Forward = _current.forward
    layer = forward.num_calls
    forward.num_calls += 1
    if forward.captured is not None:
        keys, values = forward.captured
        pools = forward.pool.layer(forward.last_layer, keys, values)
        return forward.attend(q[0], keys, values, pools, scale, window, softcap, sinks)[None]
    keys, values = k[0], v[0]
    pools = forward.pool.layer(layer, keys, values)
    forward.store(pools, keys, values)
    if forward.capturing:
        forward.captured = (keys, values)
        raise _KeysCaptured
    return forward.attend(q[0], keys, values, pools, scale, window, softcap, sinks)[None]


_library = torch.library.Library("rewardserve", "DEF")
_library.define("attend(Tensor q, Tensor k, Tensor v, float scale, int window, float softcap, Tensor? sinks) -> Tensor")
_library.impl("attend", _attend, "CompositeExplicitAutograd")


@torch.library.register_fake("rewardserve::attend", lib=_library)
def _attend_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _attention_interface(dtype: torch.dtype) -> Callable[..., tuple[torch.Tensor, None]]:
    """That of a model in `dtype`; what it is given may be more precise."""

    def interface(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        out = torch.ops.rewardserve.attend(query, key, value, scale, sliding_window or 0, softcap or 0.0, s_aux)
        return out, None

    return interface


for _dtype, _name in ATTENTION.items():
    AttentionInterface.register(_name, _attention_interface(_dtype))


class _PrunedLayer(nn.Module):
    """The last decoder layer: keys and values of all rows, everything else of the rows that are read."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        """Models ask their layers for attributes (attention_type, ...); they are the wrapped layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        forward: _Forward | None = getattr(_current, "forward", None)
        if forward is None:
            return self.layer(hidden_states, *args, **kwargs)
        forward.capturing = True
        try:
            self.layer(hidden_states, *args, **kwargs)
        except _KeysCaptured:
            forward.capturing = False
        rows = forward.pack.read_rows
        num_rows = hidden_states.shape[1]
        if not len(rows):
            return hidden_states[:, :0]
        args, kwargs = _pick(args, rows, num_rows), _pick(kwargs, rows, num_rows)
        return self.layer(hidden_states[:, rows], *args, **kwargs)


def _pick(value: Any, rows: torch.Tensor, num_rows: int) -> Any:
    """`value` with every tensor [_, num_rows, ...] in it reduced to `rows`."""
    if isinstance(value, torch.Tensor):
        return value[:, rows] if value.dim() >= 2 and value.shape[1] == num_rows else value
    if isinstance(value, tuple | list):
        return type(value)(_pick(v, rows, num_rows) for v in value)
    if isinstance(value, dict):
        return {k: _pick(v, rows, num_rows) for k, v in value.items()}
    return value


class _FullPrecisionNorm(nn.Module):
    """The final norm in fp32, so that what the head reads was not rounded to the backbone's precision once more."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm.float()
        self.skipped = False  # whoever reads the hidden states norms them

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states if self.skipped else self.norm(hidden_states.float())


def _look_for_nothing(*_: Any) -> None: ...


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


def _keep_rope(module: nn.Module) -> None:
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


class Backbone:
    """A Hugging Face decoder without its head. Not safe for use by several threads at once."""

    def __init__(self, module: PreTrainedModel) -> None:
        self.module = module
        self.config = module.config.get_text_config()
        self.device, self._dtype = module.device, module.dtype
        self.loaded_as = {name: tensor.dtype for name, tensor in module.state_dict().items()}
        self._padded_attention = module.config._attn_implementation
        self._layers = _decoder_layers(module, self.config.num_hidden_layers)
        self._pruned = False
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
        _keep_rope(self.module)
        if prune and self._layers is not None:
            self._layers[-1] = _PrunedLayer(self._layers[-1])
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
        for layer in self.decoder_layers:
            if isinstance(layer, _PrunedLayer):
                layer = layer.layer
            if compiled:
                layer.compile(dynamic=True, fullgraph=True, options=self.compile_options or None)
            else:
                layer._compiled_call_impl = None  # torch has no public way back

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
        forward = _Forward(pack, pool, self.attention, self.store_rows, last_layer)
        _current.forward = forward
        try:
            hidden = self.module(
                **self._inputs(pack.input_ids[None]), position_ids=pack.position_ids[None], use_cache=False
            ).last_hidden_state[0]
        finally:
            _current.forward = None
        self.attention_shapes = {**self.attention_shapes, **forward.shapes}  # another thread may be reading the old one
        expected = self.config.num_hidden_layers + (1 if self._pruned and pack.reads else 0)
        if forward.num_calls != expected:
            raise NotPackable(f"attention was called {forward.num_calls} times instead of {expected} in a forward")
        return hidden

    def plan_attention(self, segments: Sequence[Segment], reads: Sequence[Segment], key: tuple[int, bool]) -> Any:
        """Ahead of the forward that asks for it; `key` is one of `attention_shapes`."""
        return _plan(self.attention, segments, reads, key, self.attention_shapes[key].dtype, self.device)

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
        if isinstance(module, _PrunedLayer):
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
