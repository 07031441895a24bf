"""Keys and values of one layer to their slots, in one launch for CUDA.

torch needs a gather and a scatter for either, and makes their indices 64 bits wide before. Not yet measured on a GPU.
"""

import torch
import triton
import triton.language as tl

from rewardserve_kernels.kv_cache.paged import StoreIndex

ROWS = 32  # of a program: enough bytes under way, and hundreds of programs for a step's rows
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # Triton 3.9 warns where the second is not said


def store_rows(pool_k: torch.Tensor, pool_v: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: StoreIndex) -> None:
    """As paged.store_rows. Raises ValueError for tensors that are not on a GPU or not of the pool's precision."""
    if isinstance(store_tile, triton.JITFunction) and k.device.type != "cuda":
        raise ValueError(f"kv_cache.triton is for cuda, not {k.device.type}")
    if len({t.dtype for t in (k, v, pool_k, pool_v)}) > 1:
        raise ValueError("kv_cache.triton stores keys and values in the precision they have")
    count = len(index.rows)
    if not count:
        return
    assert pool_k.is_contiguous() and pool_v.is_contiguous()
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
    store_tile[(triton.cdiv(count, ROWS), len(k))](
        *(k, v, pool_k, pool_v, index.rows, index.blocks, index.slots, count),
        *(stride for t in (k, v) for stride in t.stride()[:2]),
        **constants(pool_k.shape[2], k.shape[2], v.shape[2]),
        **OPTIONS,
    )


def constants(pool_block: int, head_size: int, v_head_size: int) -> dict[str, int]:
    """Those of `store_tile` that a model fixes."""
    return {
        "POOL_BLOCK": pool_block,
        "HEAD_SIZE": head_size,
        "V_HEAD_SIZE": v_head_size,
        "ROWS": ROWS,
        "BLOCK_D": triton.next_power_of_2(head_size),
        "BLOCK_V": triton.next_power_of_2(v_head_size),
    }


# How many rows there are, and where in a copy the index lies, must not make other kernels of it while serving.
@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["rows", "blocks", "slots"])
def store_tile(
    k,  # [kv_heads, rows, HEAD_SIZE], by strides
    v,  # [kv_heads, rows, V_HEAD_SIZE], by strides
    pool_k,  # [blocks, kv_heads, POOL_BLOCK, HEAD_SIZE]
    pool_v,  # [blocks, kv_heads, POOL_BLOCK, V_HEAD_SIZE]
    rows,  # [count]
    blocks,  # [count]
    slots,  # [count]
    count,
    k_head,  # strides, in elements
    k_row,
    v_head,
    v_row,
    POOL_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    V_HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Some rows of one kv head. Rows that go to one slot are those of a block that nobody reads."""
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = i < count
    row = tl.load(rows + i, mask=there, other=0).to(tl.int64)  # offsets may be past 2^31
    block = tl.load(blocks + i, mask=there, other=0).to(tl.int64)
    place = (block * tl.num_programs(1) + head) * POOL_BLOCK + tl.load(slots + i, mask=there, other=0)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    keep, keep_v = there[:, None] & (d < HEAD_SIZE)[None, :], there[:, None] & (dv < V_HEAD_SIZE)[None, :]
    keys = tl.load(k + (head * k_head + row * k_row)[:, None] + d[None, :], mask=keep)
    values = tl.load(v + (head * v_head + row * v_row)[:, None] + dv[None, :], mask=keep_v)
    tl.store(pool_k + (place * HEAD_SIZE)[:, None] + d[None, :], keys, mask=keep)
    tl.store(pool_v + (place * V_HEAD_SIZE)[:, None] + dv[None, :], values, mask=keep_v)
