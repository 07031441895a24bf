"""Tree attention as chunked batched matrix products: what a CPU runs, and a GPU where Triton's is not to be had.

On a CPU with bf16 matrix products this is three times as fast as torch's own flash kernel, which multiplies in fp32.

Batch invariance. Work is cut at absolute positions of the sequence, never at positions in the pack or at the border of
prompt and response: the row at position p is always computed against the same number of keys (`_last_key`), those
after p being masked. So the products that make up a row have the same shapes and the same order whatever was cached,
and whatever else is in the pack. What is left to the library is that a row of a matrix product does not depend on how
many other rows there are, which oneDNN keeps in bf16 from two rows on (tests/parity holds it to that); a single one is
given company (engine/native/batch.py).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rewardserve_kernels.kv_cache.paged import gather_prefix
from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment, floor_block, siblings_of
from rewardserve_kernels.workspace import Workspace


@dataclass(frozen=True, slots=True)
class _Product:
    """Rows of one segment within one block of positions: one product with the keys of that block and before."""

    rows: slice  # of the result
    num_rows: int
    queries: slice  # those rows, and some after them so that fewer shapes occur; their results are dropped
    own_rows: slice  # of the pack: those of the segment's own keys that the product sees ...
    own_keys: slice  # ... and where they go in the buffer
    stale: slice | None  # of the buffer: what a longer sibling left there
    ceiling: torch.Tensor  # [queries, last keys]: -inf where a row does not see one of the buffer's last keys, else inf


@dataclass(frozen=True, slots=True)
class _Step:
    """One block of positions after a stored beginning, for all segments that continue it.

    Their products share a buffer of keys [first_key, first_key + num_keys), of which those before `num_stored` are
    gathered once. A buffer as long as the block sees, and no longer, is what the matrix products take without a copy.
    """

    blocks: tuple[int, ...]
    first_key: int
    num_keys: int
    num_stored: int
    num_hideable: int  # last keys that not every row sees
    products: tuple[_Product, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """How the attention of one pack is cut into products: the same for all layers of one window."""

    num_rows: int
    steps: tuple[_Step, ...]


def plan_attention(
    segments: Sequence[Segment], dtype: torch.dtype, device: torch.device, window: int = 0, last_rows_only: bool = False
) -> Plan:
    """`dtype` is that of the queries; `window` is in tokens, 0 for none.

    With `last_rows_only` there is one query row per segment, its last.
    """
    steps: list[_Step] = []
    num_rows = len(segments) if last_rows_only else sum(segment.num_rows for segment in segments)
    row = 0
    for siblings in siblings_of(segments):
        by_block: dict[int, list[_Part]] = {}
        for segment in siblings:
            position = segment.end - 1 if last_rows_only else segment.start
            while position < segment.end:
                by_block.setdefault(floor_block(position), []).append(_Part(segment, position, row))
                stop = min(segment.end, floor_block(position) + BLOCK_TOKENS)
                row, position = row + stop - position, stop
        steps += [_step(block, parts, num_rows, window, dtype, device) for block, parts in by_block.items()]
    return Plan(num_rows, tuple(steps))


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of a segment within one block of positions."""

    segment: Segment
    position: int  # of the first
    row: int


def _step(
    block: int, parts: Sequence[_Part], num_rows: int, window: int, dtype: torch.dtype, device: torch.device
) -> _Step:
    """`block` is the block's first position; `num_rows` are all there are."""
    first_key, last_key = _first_key(block, window), _last_key(block)
    start = parts[0].segment.start
    products, filled = [], 0
    for part in parts:
        segment, position, row = part.segment, part.position, part.row
        stop = min(segment.end, block + BLOCK_TOKENS)
        begin = max(start, first_key)
        own_keys = slice(begin - first_key, stop - first_key)
        own_rows = slice(segment.row + begin - start, segment.row + stop - start)
        stale = slice(own_keys.stop, filled) if filled > own_keys.stop else None
        filled = max(filled, own_keys.stop)
        queries = slice(row, min(row + _rounded(stop - position), num_rows))
        ceiling = _ceiling(position, queries.stop - row, first_key, last_key, window, dtype, device)
        rows = slice(row, row + stop - position)
        products.append(_Product(rows, stop - position, queries, own_rows, own_keys, stale, ceiling))
    num_stored = max(0, min(start, block + BLOCK_TOKENS) - first_key)
    return _Step(
        parts[0].segment.blocks, first_key, last_key - first_key, num_stored, last_key - block, tuple(products)
    )


def _rounded(num_rows: int) -> int:
    """Up to a power of two or a multiple of 16.

    For every new shape oneDNN spends as much time on making a product as on multiplying, and keeps it: half a megabyte.
    """
    return -(-num_rows // 16) * 16 if num_rows > 16 else 1 << (num_rows - 1).bit_length()


def _last_key(block: int) -> int:
    """Keys up to here are multiplied for the rows of a block.

    A multiple of more blocks the further it is from the beginning, of one up to 2048. So a long sequence has few shapes
    too, at the price of an eighth more keys at most.
    """
    end = block + BLOCK_TOKENS
    granule = BLOCK_TOKENS << max(0, (end - 1).bit_length() - 11)
    return -(-end // granule) * granule


def _ceiling(
    position: int, num_rows: int, first_key: int, last_key: int, window: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    if window:
        row, key = torch.arange(position, position + num_rows)[:, None], torch.arange(first_key, last_key)
        return _limits((key > row) | (row - key >= window), dtype, device)
    block = floor_block(position)  # no row of it is before a key before it
    return _triangle(last_key - block, dtype, device)[position - block : position - block + num_rows]


@functools.cache
def _triangle(num_keys: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    row, key = torch.arange(2 * BLOCK_TOKENS)[:, None], torch.arange(num_keys)
    return _limits(key > row, dtype, device)


def _limits(hidden: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.where(hidden, float("-inf"), float("inf")).to(device, dtype)


def _first_key(position: int, window: int) -> int:
    """First key, at a block's border, that the block of rows around `position` can see."""
    return floor_block(max(0, floor_block(position) - window + 1)) if window else 0


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pool_k: torch.Tensor,
    pool_v: torch.Tensor,
    plan: Plan,
    workspace: Workspace,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of every segment of the plan to its stored beginning and to itself.

    q [heads, rows, head_size], k and v [kv_heads, rows, ...]; pools [blocks, kv_heads, BLOCK_TOKENS, ...]. What
    segments store must be in the pools already. Returns [rows of q, heads, v_head_size]. `softcap` 0 means none,
    `sinks` [heads] are logits of keys without a value (GPT-OSS).
    """
    heads, _, head_size = q.shape
    kv_heads = k.shape[0]
    q = q.view(kv_heads, heads // kv_heads, -1, head_size)
    out = q.new_empty(plan.num_rows, kv_heads, heads // kv_heads, v.shape[-1])
    for step in plan.steps:
        keys = workspace.take("keys", (kv_heads, step.num_keys, head_size), k)
        values = workspace.take("values", (kv_heads, step.num_keys, v.shape[-1]), v)
        # What no row sees has weight 0 and is multiplied all the same: it must not be NaN.
        keys[:, -step.num_hideable :], values[:, -step.num_hideable :] = 0, 0
        end = step.first_key + step.num_stored
        gather_prefix(pool_k, step.blocks, step.first_key, end, keys, workspace)
        gather_prefix(pool_v, step.blocks, step.first_key, end, values, workspace)
        for product in step.products:
            keys[:, product.own_keys] = k[:, product.own_rows]
            values[:, product.own_keys] = v[:, product.own_rows]
            if product.stale is not None:
                keys[:, product.stale], values[:, product.stale] = 0, 0
            part = _attend(q, keys, values, product, workspace, scale, softcap, sinks)
            out[product.rows] = part.permute(2, 0, 1, 3)
    return out.view(plan.num_rows, heads, -1)


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    product: _Product,
    workspace: Workspace,
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q [kv_heads, group, rows, head_size] -> the product's rows, [kv_heads, group, num_rows, v_head_size]."""
    kv_heads, group, _, head_size = q.shape
    num_rows = product.ceiling.shape[0]
    flat = q[:, :, product.queries].reshape(kv_heads, group * num_rows, head_size)
    if flat.shape[1] == 1:
        flat = flat.expand(-1, 2, -1)
    scores = workspace.take("scores", (*flat.shape[:2], keys.shape[1]), q)
    torch.baddbmm(flat.new_empty(1), flat, keys.transpose(1, 2), beta=0, alpha=scale, out=scores)
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    per_head = scores.view(kv_heads, -1, num_rows, scores.shape[-1])  # of a doubled row: twice as many heads
    # Four times as fast as masked_fill_ on a CPU.
    per_head[..., -product.ceiling.shape[1] :].clamp_(max=product.ceiling)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(kv_heads, group, 1, 1).expand(-1, per_head.shape[1], num_rows, 1)
        weights = torch.cat([per_head, sink], -1).softmax(-1)[..., :-1].reshape(scores.shape)
    else:
        weights = torch.softmax(scores, -1, out=scores)  # a row is read whole before it is written
    part = torch.bmm(weights, values)[:, : group * num_rows].view(kv_heads, group, num_rows, -1)
    return part[:, :, : product.num_rows]
