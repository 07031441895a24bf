"""Tree attention for CUDA: one Triton kernel that reads stored beginnings from the pool and own rows from the pack.

A tile is BLOCK_M lanes: some query rows of one segment, each once for every head that shares a kv head. It goes over
its keys in blocks of BLOCK_N positions with an online softmax in fp32 (Dao 2023, arXiv:2307.08691).

Batch invariance. All tiles of a model have one shape, so a row is always multiplied by the same instructions. Blocks
of keys are cut at absolute positions of the sequence, and a key's place, in the pool or in the pack, is chosen key by
key, so the one block in which stored and own keys meet is a block like any other. A block of which a row sees nothing
leaves that row as it is: its weights are 0 and what was summed is multiplied by exactly 1. Keys are never split over
programs. What the compiler could contract in one loop and not in the other is written as fused, and contraction is
switched off. So a row is the same bit for bit alone or in a pack, in whichever tile, and wherever its sequence was cut
into stored and own rows. That a matrix instruction treats all lanes alike, and adds a product with 0 exactly, is the
hardware's part; no GPU was at hand to show it.

Nothing here waits for the device: a plan is one buffer and goes there in one copy.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment
from rewardserve_kernels.workspace import Workspace

LOG2_E = tl.constexpr(math.log2(math.e))
TILE_FIELDS = tl.constexpr(6)  # of a tile; named in `_lay_out`


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a tile is shaped and compiled. Results of different tunings differ in the last bits; a model keeps one."""

    block_m: int  # lanes: query rows x heads of one kv head
    block_n: int  # keys at a time; divides BLOCK_TOKENS
    num_warps: int
    num_stages: int  # blocks of keys in shared memory; with three, one is multiplied while the next is on its way
    max_registers: int = 0  # of a thread; 0: as many as it takes. 128 of 8 warps: two tiles to a multiprocessor


# NOT YET MEASURED ON A GPU. All that is known of these is what the compiler says: keys are loaded a whole block ahead,
# nothing is spilled, everything fits in shared memory (tests/kernels/test_triton_compiles_ahead_of_time.py). How many
# bytes a tile reads for its arithmetic depends on block_m alone, hence the greatest that registers hold. Measured
# figures go here, behind each entry: GPU, TFLOP/s, date. `tree_attention(tuning=)` is for finding them.
#     (compute capability from, greatest padded head size) -> Tuning
TUNINGS_16_BIT = {
    ((8, 0), 64): Tuning(128, 64, 8, 3),
    ((8, 0), 128): Tuning(128, 64, 8, 3),
    ((9, 0), 256): Tuning(128, 32, 8, 3),
    ((8, 0), 256): Tuning(64, 32, 8, 3),
}
LITTLE_SHARED = {(8, 6), (8, 9), (12, 0), (12, 1)}  # GPUs whose blocks have 99 KB of shared memory, not 163 or more
TUNINGS_16_BIT_LITTLE_SHARED = {
    ((8, 0), 64): Tuning(128, 64, 8, 3),
    ((8, 0), 128): Tuning(128, 32, 8, 3),
    ((8, 0), 256): Tuning(64, 16, 8, 3),
}
TUNINGS_32_BIT = {  # matrix instructions take no fp32: for comparisons, not for speed
    ((8, 0), 64): Tuning(32, 32, 4, 2),
    ((8, 0), 128): Tuning(32, 16, 8, 2),
    ((8, 0), 256): Tuning(32, 16, 8, 2),
}


def default_tuning(head_size: int, v_head_size: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tuning:
    """`capability` is that of the GPU, (9, 0) for an H100. Raises ValueError for heads larger than 256."""
    needed = max(_padded(head_size), _padded(v_head_size))
    of_16_bit = TUNINGS_16_BIT_LITTLE_SHARED if capability in LITTLE_SHARED else TUNINGS_16_BIT
    for (since, greatest), tuning in (TUNINGS_32_BIT if dtype.itemsize > 2 else of_16_bit).items():
        if needed <= greatest and capability >= since:
            return tuning
    raise ValueError(
        f"attention.triton takes heads of up to 256 on GPUs of compute capability 8.0 and later, not {head_size} and "
        f"{v_head_size} on {'.'.join(map(str, capability))}"
    )


def rows_per_tile(heads: int, kv_heads: int, tuning: Tuning) -> int:
    """Raises ValueError where not even one row's heads fit in a tile."""
    group = heads // kv_heads
    if group > tuning.block_m:
        raise ValueError(f"attention.triton takes up to {tuning.block_m} heads to a kv head, not {group}")
    return tuning.block_m // group


def rows_per_tile_of(
    heads: int, kv_heads: int, head_size: int, v_head_size: int, dtype: torch.dtype, device: torch.device
) -> int:
    """What `tree_attention` makes of such tensors by itself. Raises ValueError where it takes none of them."""
    return rows_per_tile(heads, kv_heads, default_tuning(head_size, v_head_size, dtype, _capability(device)))


@dataclass(frozen=True, slots=True)
class Work:
    """What the kernel reads of a plan."""

    buffer: torch.Tensor  # int32 on the device: TILE_FIELDS of each tile; block tables after them
    num_tiles: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Which rows attend to which keys, the same for all layers of one window.

    How many rows make a tile is known with the first layer's shapes; that layer lays the tiles out, the others find
    them.
    """

    num_rows: int
    window: int
    device: torch.device
    pieces: np.ndarray  # [segments, TILE_FIELDS] int64: a tile of any number of rows
    blocks: np.ndarray  # int64: block tables, one after the other
    _work: dict[int, Work] = field(default_factory=dict)

    def work(self, rows: int) -> Work:
        """Tiles of up to `rows` rows."""
        if rows not in self._work:
            buffer, num_tiles = self.lay_out(rows)
            self._work[rows] = Work(_to_device(buffer, self.device), num_tiles)
        return self._work[rows]

    def lay_out(self, rows: int) -> tuple[np.ndarray, int]:
        """The buffer of tiles of up to `rows` rows, [n] int32, and how many tiles there are."""
        tiles = _cut(self.pieces, rows, self.window)
        laid_out = _lay_out(tiles, len(tiles), FixedPlan.size_of(len(tiles)))
        return np.concatenate([laid_out, self.blocks.astype(np.int32)]), len(tiles)

    def adopt(self, rows: int, buffer: torch.Tensor, num_tiles: int) -> None:
        """What `lay_out` returned lies on the device already: whoever has more to send there sent it along."""
        self._work[rows] = Work(buffer, num_tiles)


class FixedPlan:
    """A plan whose buffer stays where it is, for a CUDA graph: tiles it does not use do nothing.

    Capture with it, and before each replay copy what `lay_out` returns to the beginning of the buffer, and the plan's
    block table to `table` integers after it. Rows of the result that no tile covers are not written, and hold anything.
    """

    def __init__(self, buffer: torch.Tensor, num_rows: int, max_tiles: int, window: int = 0) -> None:
        """`buffer` [at least size_of(max_tiles)] int32 on the device: zeros, or what was laid out."""
        self.num_rows = num_rows
        self.window = window
        self._work = Work(buffer, max_tiles)

    @staticmethod
    def size_of(max_tiles: int) -> int:
        """Integers of the tiles."""
        return max_tiles * TILE_FIELDS.value

    def work(self, rows: int) -> Work:
        """The same for any number of rows: `lay_out` was told it."""
        return self._work

    def lay_out(self, plan: Plan, rows: int, table: int) -> np.ndarray:
        """`plan` in tiles of up to `rows` rows (`rows_per_tile`): [size_of(max_tiles)] int32.

        Raises ValueError where it is too small, or for another window.
        """
        tiles = _cut(plan.pieces, rows, plan.window)
        if plan.window != self.window:
            raise ValueError(f"a plan for a window of {plan.window} does not go into one for {self.window}")
        if plan.num_rows > self.num_rows or len(tiles) > self._work.num_tiles:
            needed, there = (
                f"{plan.num_rows} rows and {len(tiles)} tiles",
                f"{self.num_rows} and {self._work.num_tiles}",
            )
            raise ValueError(f"a plan of {needed} does not go into one of {there}")
        return _lay_out(tiles, self._work.num_tiles, table)


def plan_attention(
    segments: Sequence[Segment], dtype: torch.dtype, device: torch.device, window: int = 0, last_rows_only: bool = False
) -> Plan:
    """As chunked.plan_attention; the precision does not matter."""
    pieces: list[tuple[int, ...]] = []
    blocks: list[int] = []
    tables: dict[tuple[int, ...], int] = {}
    row = 0
    for segment in segments:
        stored = segment.blocks[: -(-segment.start // BLOCK_TOKENS)]
        if stored not in tables:  # one table for all that share a beginning
            tables[stored] = len(blocks)
            blocks += stored
        num_rows = 1 if last_rows_only else segment.num_rows
        first = segment.end - num_rows
        pieces.append((row, num_rows, first, segment.start, segment.row - segment.start, tables[stored]))
        row += num_rows
    shape = (len(pieces), TILE_FIELDS.value)
    return Plan(row, window, device, np.array(pieces, np.int64).reshape(shape), np.array(blocks, np.int64))


def _cut(pieces: np.ndarray, rows: int, window: int) -> np.ndarray:
    """Tiles of up to `rows` rows, those with the most keys first: the last to start are the first to end."""
    counts = -(-pieces[:, 1] // rows)
    tiles = np.repeat(pieces, counts, axis=0)
    skipped = rows * (np.arange(len(tiles)) - np.repeat(np.cumsum(counts) - counts, counts))
    tiles[:, 0] += skipped
    tiles[:, 1] = np.minimum(tiles[:, 1] - skipped, rows)
    tiles[:, 2] += skipped
    num_keys = tiles[:, 2] + tiles[:, 1]
    if window:
        num_keys = np.minimum(num_keys, tiles[:, 1] + window)
    return tiles[np.argsort(-num_keys, kind="stable")]


def _lay_out(tiles: np.ndarray, num_tiles: int, table: int) -> np.ndarray:
    """Of each tile, padded to `num_tiles` with tiles of no rows,

    0 the first query row; 1 the number of query rows; 2 the position of the first; 3 the number of stored keys;
    4 what added to a position after those gives its row in the pack; 5 where in the buffer its block table begins, of
    which the plan's first is at `table`.
    """
    fields = np.zeros((num_tiles, TILE_FIELDS.value), np.int32)
    fields[: len(tiles)] = tiles
    fields[: len(tiles), 5] += table
    return fields.reshape(-1)


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """From memory that the device can fetch by itself. torch keeps it until a copy that is under way has ended."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pool_k: torch.Tensor,
    pool_v: torch.Tensor,
    plan: Plan | FixedPlan,
    workspace: Workspace,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    tuning: Tuning | None = None,
) -> torch.Tensor:
    """As chunked.tree_attention, with `scale` above 0; it takes nothing from the workspace.

    `tuning` is for sweeps. Raises ValueError for tensors that are not on a GPU or not of one precision, and for head
    sizes and numbers of heads that are not taken.
    """
    heads, _, head_size = q.shape
    kv_heads, _, v_head_size = v.shape
    if isinstance(attend_tile, triton.JITFunction) and q.device.type != "cuda":
        raise ValueError(f"attention.triton is for cuda, not {q.device.type}")
    if len({t.dtype for t in (q, k, v, pool_k, pool_v)}) > 1:
        raise ValueError("attention.triton takes queries, keys and values of one precision")
    tuning = tuning or default_tuning(head_size, v_head_size, q.dtype, _capability(q.device))
    work = plan.work(rows_per_tile(heads, kv_heads, tuning))
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    assert pool_k.is_contiguous() and pool_v.is_contiguous()
    out = q.new_empty(plan.num_rows, heads, v_head_size)
    if work.num_tiles:
        attend_tile[(work.num_tiles * kv_heads,)](
            *(q, k, v, pool_k, pool_v, out, work.buffer),
            q if sinks is None else sinks.contiguous(),
            *(stride for t in (q, k, v) for stride in t.stride()[:2]),
            LOG2_E.value if softcap else scale * LOG2_E.value,
            *(softcap, 2 * LOG2_E.value * scale / softcap if softcap else 0.0, plan.window),
            **constants(heads, kv_heads, head_size, v_head_size, tuning),
            ALIGNED=all(_is_aligned(t) for t in (k, v, pool_k, pool_v)),
            HAS_WINDOW=plan.window > 0,
            HAS_SOFTCAP=softcap > 0,
            HAS_SINKS=sinks is not None,
            **compiler_options(tuning),
        )
    return out


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Of an H100 where there is none: under Triton's interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _is_aligned(tensor: torch.Tensor) -> bool:
    """Whether each row begins at a multiple of 16 bytes."""
    return not any(offset % 16 for offset in (tensor.data_ptr(), *(s * tensor.itemsize for s in tensor.stride()[:-1])))


def constants(heads: int, kv_heads: int, head_size: int, v_head_size: int, tuning: Tuning) -> dict[str, int]:
    """Those of `attend_tile` that a model and its tuning fix."""
    return {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "HEAD_SIZE": head_size,
        "V_HEAD_SIZE": v_head_size,
        "POOL_BLOCK": BLOCK_TOKENS,
        "BLOCK_M": tuning.block_m,
        "BLOCK_N": tuning.block_n,
        "BLOCK_D": _padded(head_size),
        "BLOCK_V": _padded(v_head_size),
    }


def compiler_options(tuning: Tuning) -> dict[str, Any]:
    limit = {"maxnreg": tuning.max_registers} if tuning.max_registers else {}
    return {"num_warps": tuning.num_warps, "num_stages": tuning.num_stages, "enable_fp_fusion": False, **limit}


def _padded(head_size: int) -> int:
    """To a power of two, and to the least that a matrix instruction takes."""
    return max(16, triton.next_power_of_2(head_size))


# Plans lie where there is room in a copy; aligned or not must not make two kernels of it, one compiled while serving.
@triton.jit(do_not_specialize_on_alignment=["work"])
def attend_tile(
    q,  # [heads, rows, HEAD_SIZE], by strides
    k,  # [KV_HEADS, rows, HEAD_SIZE], by strides
    v,  # [KV_HEADS, rows, V_HEAD_SIZE], by strides
    pool_k,  # [blocks, KV_HEADS, POOL_BLOCK, HEAD_SIZE]
    pool_v,  # [blocks, KV_HEADS, POOL_BLOCK, V_HEAD_SIZE]
    out,  # [query rows, heads, V_HEAD_SIZE]
    work,  # what _lay_out returns, and block tables
    sinks,  # [heads]
    q_head,  # strides, in elements
    q_row,
    k_head,
    k_row,
    v_head,
    v_row,
    unit,  # what makes scores powers of two
    softcap,
    squash,  # 2 * log2(e) * scale / softcap
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    V_HEAD_SIZE: tl.constexpr,
    POOL_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One tile of one kv head. All kv heads of a tile are neighbours, so that long tiles start first."""
    kv_head = tl.program_id(0) % KV_HEADS
    tile = work + tl.program_id(0) // KV_HEADS * TILE_FIELDS
    first_row, num_rows, position = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    num_stored, to_row, table = tl.load(tile + 3), tl.load(tile + 4), work + tl.load(tile + 5)

    lane = tl.arange(0, BLOCK_M)
    row, head = lane // GROUP, kv_head * GROUP + lane % GROUP
    used = row < num_rows
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(position - window + 1, 0) // BLOCK_N * BLOCK_N
    # Which block of the pool a block of keys lies in is looked up one block of keys before: looked up where it is
    # needed it would take a stage of its own, and of three stages none would be left for keys and values.
    block = tl.load(table + first // POOL_BLOCK, mask=first < num_stored, other=0)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    query = q + (first_row + row).to(tl.int64) * q_row + head.to(tl.int64) * q_head  # may be past 2^31
    queries = tl.load(query[:, None] + d[None, :], mask=used[:, None] & (d < HEAD_SIZE)[None, :], other=0.0)

    if HAS_SINKS:  # as a key that was seen already, whose value is 0
        top = tl.load(sinks + head, mask=used, other=0.0).to(tl.float32) * LOG2_E
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    k += kv_head.to(tl.int64) * k_head
    v += kv_head.to(tl.int64) * v_head
    pool_k += kv_head.to(tl.int64) * (POOL_BLOCK * HEAD_SIZE)
    pool_v += kv_head.to(tl.int64) * (POOL_BLOCK * V_HEAD_SIZE)
    row_position, end = position + row, position + num_rows
    all_stored = num_stored // BLOCK_N * BLOCK_N  # of the blocks before, every key is stored, and every row sees it
    # One loop would do, the second. The first is spared what its blocks do not need: a third of its instructions
    # (sm_90, head size 128). A third, for own keys that all rows see, is expected to save less than it costs to begin
    # one, with nothing on its way yet: what only hidden keys need is branched over.
    for begin in range(first, all_stored, BLOCK_N):
        top, total, sums, block = _add_block(
            *(top, total, sums, block, queries, position, row_position, begin, end, k, v, k_row, v_row, pool_k, pool_v),
            *(num_stored, to_row, table, unit, softcap, squash, window, True, KV_HEADS, HEAD_SIZE, V_HEAD_SIZE),
            *(POOL_BLOCK, BLOCK_N, BLOCK_D, BLOCK_V, ALIGNED, HAS_WINDOW, HAS_SOFTCAP),
        )
    for begin in range(tl.maximum(first, all_stored), end, BLOCK_N):
        top, total, sums, block = _add_block(
            *(top, total, sums, block, queries, position, row_position, begin, end, k, v, k_row, v_row, pool_k, pool_v),
            *(num_stored, to_row, table, unit, softcap, squash, window, False, KV_HEADS, HEAD_SIZE, V_HEAD_SIZE),
            *(POOL_BLOCK, BLOCK_N, BLOCK_D, BLOCK_V, ALIGNED, HAS_WINDOW, HAS_SOFTCAP),
        )

    # Loaded once more, or else what follows from them is held through the loops, in registers that are short.
    first_row, num_rows = tl.load(tile, volatile=True), tl.load(tile + 1, volatile=True)
    result = out + (first_row + row).to(tl.int64) * (KV_HEADS * GROUP * V_HEAD_SIZE) + head * V_HEAD_SIZE
    mask = (row < num_rows)[:, None] & (dv < V_HEAD_SIZE)[None, :]
    tl.store(result[:, None] + dv[None, :], (sums / total[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_block(
    top,  # [BLOCK_M] the greatest score so far, as a power of two
    total,  # [BLOCK_M] sum of weights, a score of `top` having weight 1
    sums,  # [BLOCK_M, BLOCK_V] sum of values by those weights
    block,  # of the pool, in which the first key is, if it is stored
    queries,  # [BLOCK_M, BLOCK_D]
    position,  # of the first row
    row_position,  # [BLOCK_M]
    begin,  # position of the block's first key
    end,  # position after the last key there is
    k,  # from here to table: of this kv head
    v,
    k_row,
    v_row,
    pool_k,
    pool_v,
    num_stored,
    to_row,
    table,
    unit,
    softcap,
    squash,
    window,
    ALL_STORED: tl.constexpr,  # and seen by every row, but for the window
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    V_HEAD_SIZE: tl.constexpr,
    POOL_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """`top`, `total` and `sums` with one more block of keys; and the block of the pool in which the next ones begin.

    What floating point instructions a row goes through, and in which order, must not depend on ALL_STORED: that would
    depend on where the sequence was cut.
    """
    key = begin + tl.arange(0, BLOCK_N)
    after = begin + BLOCK_N
    next_block = tl.load(table + after // POOL_BLOCK, mask=after < num_stored, other=0)
    block = block.to(tl.int64)
    own_row = (begin + to_row).to(tl.int64)

    keys = _load(
        *(pool_k + block * (KV_HEADS * POOL_BLOCK * HEAD_SIZE) + begin % POOL_BLOCK * HEAD_SIZE, k + own_row * k_row),
        *(k_row, key < num_stored, key < end, ALL_STORED, HEAD_SIZE, BLOCK_N, BLOCK_D, ALIGNED),
    )
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    if HAS_SOFTCAP:  # softcap * tanh(scale * scores / softcap)
        scores = softcap - 2.0 * softcap / (1.0 + tl.exp2(scores * squash))
    if not ALL_STORED:  # noqa: SIM102  # known when it is compiled, the other not
        if after > position + 1:  # not every row sees every key, and perhaps not every key is there
            scores = tl.where(key[None, :] <= row_position[:, None], scores, float("-inf"))
    if HAS_WINDOW:
        scores = tl.where(row_position[:, None] - key[None, :] < window, scores, float("-inf"))

    new_top = tl.maximum(top, tl.max(scores, 1) * unit)
    origin = new_top
    if HAS_WINDOW:  # a row that has seen no key yet: -inf - -inf is not a number
        origin = tl.where(new_top == float("-inf"), 0.0, new_top)
    kept = tl.exp2(top - origin)
    no_scores = tl.zeros_like(scores)
    weights = tl.exp2(tl.fma(scores, no_scores + unit, no_scores - origin[:, None]))
    total = tl.fma(total, kept, tl.sum(weights, 1))
    values = _load(
        *(
            pool_v + block * (KV_HEADS * POOL_BLOCK * V_HEAD_SIZE) + begin % POOL_BLOCK * V_HEAD_SIZE,
            v + own_row * v_row,
        ),
        *(v_row, key < num_stored, key < end, ALL_STORED, V_HEAD_SIZE, BLOCK_N, BLOCK_V, ALIGNED),
    )
    sums = tl.dot(weights.to(values.dtype), values, sums * kept[:, None], input_precision="ieee")
    return new_top, total, sums, next_block


@triton.jit
def _load(
    in_pool,  # where the block's first key is, if it is stored
    in_pack,  # where it is if not; before the pack, perhaps, where it is
    pack_row,
    stored,  # [BLOCK_N]
    there,  # [BLOCK_N]
    ALL_STORED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A block of keys, or of values, [BLOCK_N, BLOCK_SIZE]: each from where it is; 0 where there is none."""
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_SIZE)
    at = in_pool + n * SIZE
    if not ALL_STORED:
        at = tl.where(stored, at, in_pack + n * pack_row)
        if ALIGNED:  # which the compiler cannot see through `where`; without it nothing is loaded ahead
            at = tl.multiple_of(at, 16)
    at = at[:, None] + d[None, :]
    if not ALL_STORED:
        return tl.load(at, mask=there[:, None] & (d < SIZE)[None, :], other=0.0)
    elif SIZE < BLOCK_SIZE:
        return tl.load(at, mask=(d < SIZE)[None, :], other=0.0)
    else:
        return tl.load(at)
