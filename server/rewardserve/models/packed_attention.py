"""Attention of a pack: whatever a Hugging Face decoder asks of transformers' attention interface is asked of ours.

The interface hands over queries, keys and values after rotary embedding; we route them to one opaque operator, so that
torch.compile sees a black box and one graph serves every layer. What the operator needs to know of the pack it reads
from the calling thread's context: not every model family passes keyword arguments through.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from rewardserve_kernels.kv_cache.paged import StoreIndex, store_segment
from rewardserve_kernels.pooling.running_mean import MeanRows
from rewardserve_kernels.ragged import Segment
from rewardserve_kernels.workspace import Workspace
from torch import nn
from transformers import AttentionInterface

from rewardserve.models.kv_pool import KVPool

COMPUTED = (torch.float32, torch.bfloat16, torch.float16)
ATTENTION = {dtype: f"rewardserve_{str(dtype).removeprefix('torch.')}" for dtype in COMPUTED}


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
class Forward:
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
            pack.plans[key] = plan_for(self.attention, pack.segments, pack.reads, key, q.dtype, q.device)
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


def plan_for(
    attention: TreeAttention,
    segments: Sequence[Segment],
    reads: Sequence[Segment],
    key: tuple[int, bool],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """Of a forward's layers with this `key`: their window, and whether they are of the read rows only."""
    window, reads_only = key
    return attention.plan_attention(reads if reads_only else segments, dtype, device, window, reads_only)


_current = threading.local()


@contextlib.contextmanager
def running(forward: Forward) -> Iterator[None]:
    """`forward` is the calling thread's meanwhile."""
    _current.forward = forward
    try:
        yield
    finally:
        _current.forward = None


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
    forward: Forward = _current.forward
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
def _attend_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
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


class PrunedLayer(nn.Module):
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
        forward: Forward | None = getattr(_current, "forward", None)
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
