"""Every way of tree attention against the dense oracle, on weird shapes, with poisoned memory."""

import pytest
import torch
from built import why_not
from rewardserve_kernels.attention import avx512, chunked, reference
from rewardserve_kernels.kv_cache.paged import gather_prefix, store_segment
from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment
from rewardserve_kernels.workspace import Workspace

# (start, rows) of segments; starts in mid-block, a single row, exactly a block, one more than a block
RAGGED = ((0, 1), (0, 129), (70, 33), (128, 128), (200, 5), (255, 1), (130, 300), (0, 128))
OPTIONS = {
    "plain": {},
    "window": {"window": 50},
    "window over a block": {"window": 140},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": True},
    "all": {"window": 100, "softcap": 30.0, "sinks": True},
}


missing = why_not(avx512.load)
built = pytest.param(avx512, marks=pytest.mark.skipif(bool(missing), reason=missing), id="avx512")
both = pytest.mark.parametrize("kernel", [pytest.param(chunked, id="chunked"), built])
# Of keys and of values: matrix units, where a CPU has them, take whole 32 inner dimensions.
sizes_of_heads = pytest.mark.parametrize("sizes", [(24, 16), (64, 48)], ids=["24/16", "64/48"])


def attend(kernel, q, k, v, pool_k, pool_v, segments, scale, window=0, last_rows_only=False, **options):
    plan = kernel.plan_attention(segments, q.dtype, q.device, window, last_rows_only)
    return kernel.tree_attention(q, k, v, pool_k, pool_v, plan, Workspace(), scale, **options)


def _case(dtype: torch.dtype, head_size: int = 24, v_head_size: int = 16, heads: int = 6, kv_heads: int = 2):
    """Segments over a pool of which every slot they may not read is NaN."""
    torch.manual_seed(0)
    pool_k = torch.full((24, kv_heads, BLOCK_TOKENS, head_size), float("nan"), dtype=dtype)
    pool_v = torch.full((24, kv_heads, BLOCK_TOKENS, v_head_size), float("nan"), dtype=dtype)
    free = iter(torch.randperm(24).tolist())
    segments, row = [], 0
    for start, rows in RAGGED:
        blocks = tuple(next(free) for _ in range(-(-start // BLOCK_TOKENS)))
        beginning = Segment(0, start, 0, blocks, store=True)
        store_segment(pool_k, torch.randn(kv_heads, start, head_size).to(dtype), beginning)
        store_segment(pool_v, torch.randn(kv_heads, start, v_head_size).to(dtype), beginning)
        segments.append(Segment(row, rows, start, blocks, store=False))
        row += rows
    q, k = torch.randn(heads, row, head_size).to(dtype), torch.randn(kv_heads, row, head_size).to(dtype)
    return q, k, torch.randn(kv_heads, row, v_head_size).to(dtype), pool_k, pool_v, segments


CHUNKED_FP32 = pytest.param(chunked, torch.float32, 1e-6, id="chunked fp32")
CHUNKED_BF16 = pytest.param(chunked, torch.bfloat16, 1e-2, id="chunked bf16")
ROUNDING = 2.5e-3  # of the result to bf16
AVX512 = pytest.param(*built.values, torch.bfloat16, ROUNDING, marks=built.marks, id="avx512")


@sizes_of_heads
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("kernel", "dtype", "tolerance"), [CHUNKED_FP32, CHUNKED_BF16, AVX512])
def test_attention_equals_the_dense_oracle(
    name: str, kernel, dtype: torch.dtype, tolerance: float, sizes: tuple[int, int]
) -> None:
    is_near_the_oracle(kernel, _case(dtype, *sizes), OPTIONS[name], tolerance)


@pytest.mark.skipif(bool(missing), reason=missing)
@pytest.mark.parametrize("sizes", [(64, 64), (80, 128), (192, 128), (96, 40), (2, 1), (256, 256), (34, 17)])
def test_avx512_attention_takes_any_even_head_size(sizes: tuple[int, int]) -> None:
    is_near_the_oracle(avx512, _case(torch.bfloat16, *sizes, heads=7, kv_heads=1), OPTIONS["all"], ROUNDING)


def is_near_the_oracle(kernel, case, options: dict, tolerance: float) -> None:
    *tensors, segments = case
    heads, dtype, options = tensors[0].shape[0], tensors[0].dtype, dict(options)
    sinks = torch.randn(heads).to(dtype) if options.pop("sinks", None) else None
    got = attend(kernel, *tensors, segments, 0.2, sinks=sinks, **options)
    sinks = None if sinks is None else sinks.double()
    wanted = reference.tree_attention(*(t.double() for t in tensors), segments, 0.2, sinks=sinks, **options)
    assert (got.double() - wanted).norm() / wanted.norm() < tolerance


@pytest.mark.skipif(bool(missing), reason=missing)
def test_avx512_attention_takes_scores_far_from_one_another() -> None:
    """Scores of tens of thousands, the greatest one first or last: weights are 0 or 1, nothing overflows."""
    *tensors, segments = _case(torch.bfloat16)
    got = attend(avx512, *tensors, segments, 2e4)
    wanted = reference.tree_attention(*(t.double() for t in tensors), segments, 2e4)
    assert (got.double() - wanted).norm() / wanted.norm() < ROUNDING


@pytest.mark.skipif(bool(missing), reason=missing)
def test_avx512_attention_refuses_what_it_cannot_do() -> None:
    *tensors, segments = _case(torch.float32)
    with pytest.raises(ValueError, match="is for bfloat16 on a cpu, not torch"):
        attend(avx512, *tensors, segments, 0.2)
    *tensors, segments = _case(torch.bfloat16, head_size=25)
    with pytest.raises(ValueError, match="is for head sizes that are even, not 25"):
        attend(avx512, *tensors, segments, 0.2)


@pytest.mark.skipif(bool(missing), reason=missing)
@pytest.mark.parametrize("num_threads", [1, 3])
@sizes_of_heads
def test_avx512_attention_gives_the_same_bits_with_any_number_of_threads(
    num_threads: int, sizes: tuple[int, int]
) -> None:
    *tensors, segments = _case(torch.bfloat16, *sizes)
    wanted, before = attend(avx512, *tensors, segments, 0.2), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(attend(avx512, *tensors, segments, 0.2), wanted)
    finally:
        torch.set_num_threads(before)


@both
@sizes_of_heads
@pytest.mark.parametrize("name", OPTIONS)
def test_the_last_rows_alone_are_bitwise_what_they_are_among_all(name: str, kernel, sizes: tuple[int, int]) -> None:
    *tensors, segments = _case(torch.bfloat16, *sizes)
    options = dict(OPTIONS[name])
    options["sinks"] = torch.randn(6).bfloat16() if options.pop("sinks", None) else None
    everything = attend(kernel, *tensors, segments, 0.2, **options)
    last = torch.tensor([s.row + s.num_rows - 1 for s in segments])
    q, *rest = tensors
    alone = attend(kernel, q[:, last], *rest, segments, 0.2, last_rows_only=True, **options)
    assert torch.equal(alone, everything[last])


@both
@sizes_of_heads
def test_siblings_that_share_their_beginning_do_not_see_one_another(kernel, sizes: tuple[int, int]) -> None:
    """The shared key buffer is filled once; what one sibling leaves in it must not reach the next, not even as NaN."""
    q, k, v, pool_k, pool_v, _ = _case(torch.bfloat16, *sizes)
    segments = [Segment(0, 100, 0, (3,), store=True)]
    store_segment(pool_k, k[:, :100], segments[0])
    store_segment(pool_v, v[:, :100], segments[0])
    segments += [Segment(100, 90, 100, (3,), store=False), Segment(190, 3, 100, (3,), store=False)]
    k[:, 140:190], v[:, 140:190] = float("nan"), float("nan")  # the first sibling's later rows are broken
    got = attend(kernel, q[:, :193], k[:, :193], v[:, :193], pool_k, pool_v, segments, 0.2)
    alone = [segments[0], Segment(100, 3, 100, (3,), store=False)]
    rows = [*range(100), 190, 191, 192]
    wanted = attend(kernel, q[:, rows], k[:, rows], v[:, rows], pool_k, pool_v, alone, 0.2)
    assert got[141:190].isnan().any()
    assert torch.equal(got[190:], wanted[100:])


@both
@pytest.mark.parametrize("cut", [1, 60, 127, 128, 129, 250])
def test_where_a_sequence_is_cut_into_segments_changes_no_bit_in_bf16(cut: int, kernel) -> None:
    torch.manual_seed(0)
    length, heads, kv_heads, size = 300, 4, 2, 32
    q, k, v = (torch.randn(h, length, size).bfloat16() for h in (heads, kv_heads, kv_heads))
    pools = [torch.zeros(3, kv_heads, BLOCK_TOKENS, size).bfloat16() for _ in range(2)]
    whole = Segment(0, length, 0, (0, 1, 2), store=True)
    for pool, rows in zip(pools, (k, v), strict=True):
        store_segment(pool, rows, whole)
    wanted = attend(kernel, q, k, v, *pools, [whole], 0.17)
    tail = Segment(0, length - cut, cut, (0, 1, 2), store=False)
    got = attend(kernel, q[:, cut:], k[:, cut:], v[:, cut:], *pools, [tail], 0.17)
    assert torch.equal(got, wanted[cut:])


@pytest.mark.skipif(bool(missing), reason=missing)
@pytest.mark.parametrize("num_threads", [1, 2, 3, 4, 5])
def test_siblings_in_one_piece_of_work_each_see_their_own_window(num_threads: int) -> None:
    """The number of threads says how many rows make a piece: in some the end of one sibling meets the next's start."""
    torch.manual_seed(0)
    start, rows, window = 1000, 100, 300
    pools = [torch.randn(10, 2, BLOCK_TOKENS, 32).bfloat16() for _ in range(2)]
    q, k, v = (torch.randn(h, 3 * rows, 32).bfloat16() for h in (4, 2, 2))
    segments = [Segment(n * rows, rows, start, tuple(range(10)), store=False) for n in range(3)]
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        got = attend(avx512, q, k, v, *pools, segments, 0.3, window=window)
    finally:
        torch.set_num_threads(before)
    wanted = reference.tree_attention(*(t.double() for t in (q, k, v, *pools)), segments, 0.3, window=window)
    assert (got.double() - wanted).norm() / wanted.norm() < 1e-2


@both
def test_a_sequence_longer_than_what_is_laid_out_at_a_time_equals_the_dense_oracle(kernel) -> None:
    """2,500 stored keys, 300 own: avx512 lays out 1,024 at a time and cuts the rows into chunks."""
    torch.manual_seed(0)
    start, rows = 2500, 300
    pools = [torch.randn(20, 2, BLOCK_TOKENS, 32).bfloat16() for _ in range(2)]
    q, k, v = (torch.randn(h, 2 * rows, 32).bfloat16() for h in (4, 2, 2))
    blocks = tuple(torch.randperm(20).tolist())
    segments = [Segment(0, rows, start, blocks, store=False), Segment(rows, rows, start, blocks, store=False)]
    for window in (0, 1500):
        got = attend(kernel, q, k, v, *pools, segments, 0.3, window=window)
        tensors = (t.double() for t in (q, k, v, *pools))
        wanted = reference.tree_attention(*tensors, segments, 0.3, window=window)
        assert (got.double() - wanted).norm() / wanted.norm() < 1e-2


@pytest.mark.parametrize(("start", "rows"), [(0, 1), (0, 128), (100, 60), (127, 2), (256, 300)])
def test_what_is_stored_in_blocks_is_read_back_in_order(start: int, rows: int) -> None:
    pool = torch.full((6, 2, BLOCK_TOKENS, 3), float("nan"))
    blocks = (4, 1, 5, 0, 2)
    values = torch.randn(2, start + rows, 3)
    store_segment(pool, values[:, :start], Segment(0, start, 0, blocks, store=True))
    store_segment(pool, values[:, start:], Segment(0, rows, start, blocks, store=True))
    for begin in range(0, start + rows, BLOCK_TOKENS):
        out = torch.full((2, start + rows - begin, 3), float("nan"))
        gather_prefix(pool, blocks, begin, start + rows, out, Workspace())
        assert torch.equal(out, values[:, begin:])
