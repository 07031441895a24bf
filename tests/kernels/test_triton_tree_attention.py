"""The Triton kernel against the dense oracle, bit for bit against itself, with poisoned memory; on a CPU, interpreted.

In fp32 and fp16: the interpreter multiplies matrices of bf16 wrongly.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from rewardserve_kernels.attention import reference
from rewardserve_kernels.attention import triton as kernel
from rewardserve_kernels.attention.triton import FixedPlan, Tuning
from rewardserve_kernels.kv_cache.paged import store_segment
from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment
from rewardserve_kernels.workspace import Workspace

interpreted = pytest.mark.interpreted
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # numpy on NaN
NAN = float("nan")
SMALL = Tuning(64, 64, 4, 2)  # few enough lanes that a segment has several tiles
FP32, FP16 = (torch.float32, 3e-6), (torch.float16, 1e-3)
# (start, rows) of segments; starts in mid-block and at borders, a single row, exactly a block, one more than a block
RAGGED = ((0, 1), (0, 129), (70, 33), (128, 128), (200, 5), (255, 1), (130, 70))
OPTIONS = {
    "plain": {},
    "window": {"window": 50},
    "window over a block, softcap": {"window": 140, "softcap": 20.0},
    "all": {"window": 100, "softcap": 30.0, "sinks": True},
}


@pytest.fixture(autouse=True)
def poisoned_results():
    """What is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def lanes_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products as a GPU makes them: a row of the result does not depend on its place among the rows.

    In those of numpy's BLAS it does, and no bit could be promised.
    """

    def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return (a.astype(dtype)[:, None, :] * np.ascontiguousarray(b.T).astype(dtype)[None]).sum(-1)

    monkeypatch.setattr(np, "matmul", matmul)


def attend(
    tensors, segments, window=0, last_rows_only=False, scale=0.2, tuning: Tuning | None = SMALL, **options
) -> torch.Tensor:
    q, *rest = tensors
    plan = kernel.plan_attention(segments, q.dtype, q.device, window, last_rows_only)
    return kernel.tree_attention(q, *rest, plan, Workspace(), scale, tuning=tuning, **options)


def make_case(
    dtype: torch.dtype, sizes: tuple[int, int] = (32, 16), heads: int = 6, kv_heads: int = 2, ragged=RAGGED
) -> tuple[list[torch.Tensor], list[Segment]]:
    """Segments over a pool, and in a pack, of which everything they may not read is NaN."""
    torch.manual_seed(0)
    pools = [torch.full((16, kv_heads, BLOCK_TOKENS, size), NAN, dtype=dtype) for size in sizes]
    free = iter(torch.randperm(16).tolist())
    segments, row = [], 3
    for start, rows in ragged:
        blocks = tuple(next(free) for _ in range(-(-start // BLOCK_TOKENS)))
        for pool, size in zip(pools, sizes, strict=True):
            stored = torch.randn(kv_heads, start, size).to(dtype)
            store_segment(pool, stored, Segment(0, start, 0, blocks, store=True))
        segments.append(Segment(row, rows, start, blocks, store=False))
        row += rows
    k, v = (torch.randn(kv_heads, row + 3, size).to(dtype) for size in sizes)
    for rows in (slice(0, 3), slice(row, None)):
        k[:, rows], v[:, rows] = NAN, NAN
    # As a model has it: rows, then heads.
    return [torch.randn(row - 3, heads, sizes[0]).to(dtype).transpose(0, 1), k, v, *pools], segments


def error_to_the_oracle(
    tensors: Sequence[torch.Tensor],
    segments: Sequence[Segment],
    scale: float = 0.2,
    sinks: bool = False,
    **options,
) -> float:
    """Relative; not a number where a result is none."""
    q, *rest = tensors
    logits = torch.randn(q.shape[0]) if sinks else None
    got = attend(tensors, segments, scale=scale, sinks=logits, **options)
    options.pop("tuning", None)
    in_pack = torch.full((q.shape[0], rest[0].shape[1], q.shape[2]), NAN, dtype=torch.float64)
    in_pack[:, 3:-3] = q.double()
    rest = [t.double() for t in rest]
    wanted = reference.tree_attention(in_pack, *rest, segments, scale, sinks=logits, **options)[3:-3]
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@interpreted
@pytest.mark.parametrize(("name", "precision"), [(name, FP32) for name in OPTIONS] + [("all", FP16)])
def test_attention_equals_the_dense_oracle(name: str, precision: tuple[torch.dtype, float]) -> None:
    dtype, tolerance = precision
    assert error_to_the_oracle(*make_case(dtype), **OPTIONS[name]) < tolerance


@interpreted
@pytest.mark.parametrize(
    ("sizes", "heads", "kv_heads"),
    [((64, 64), 7, 1), ((128, 128), 4, 1), ((256, 256), 2, 1), ((80, 80), 2, 2), ((192, 128), 3, 1), ((20, 33), 5, 1)],
)
def test_any_head_size_and_any_number_of_heads_are_taken(sizes: tuple[int, int], heads: int, kv_heads: int) -> None:
    """With the tunings of a GPU; sizes that are no power of two, values of another size, rows that are not aligned."""
    case = make_case(torch.float16, sizes, heads, kv_heads, ((0, 3), (130, 70)))
    assert error_to_the_oracle(*case, tuning=None) < FP16[1]


@interpreted
@pytest.mark.usefixtures("lanes_alike")
@pytest.mark.parametrize("name", ["plain", "all"])
def test_a_segment_alone_is_bitwise_what_it_is_in_a_pack(name: str) -> None:
    (q, *rest), segments = make_case(torch.float16)
    options = dict(OPTIONS[name])
    options["sinks"] = torch.randn(6) if options.pop("sinks", None) else None
    everything = attend((q, *rest), segments, **options)
    for segment in segments[2:4]:
        rows = slice(segment.row - 3, segment.row - 3 + segment.num_rows)
        assert torch.equal(attend((q[:, rows], *rest), [segment], **options), everything[rows])


@interpreted
@pytest.mark.usefixtures("lanes_alike")
@pytest.mark.parametrize("name", ["plain", "all"])
def test_the_last_rows_alone_are_bitwise_what_they_are_among_all(name: str) -> None:
    (q, *rest), segments = make_case(torch.float16)
    options = dict(OPTIONS[name])
    options["sinks"] = torch.randn(6) if options.pop("sinks", None) else None
    everything = attend((q, *rest), segments, **options)
    last = [s.row - 3 + s.num_rows - 1 for s in segments]
    assert torch.equal(attend((q[:, last], *rest), segments, last_rows_only=True, **options), everything[last])


@interpreted
@pytest.mark.usefixtures("lanes_alike")
@pytest.mark.parametrize("window", [0, 75])
def test_where_a_sequence_is_cut_into_stored_and_own_rows_changes_no_bit(window: int) -> None:
    """Also not the size of its tiles, which is another one for another number of heads."""
    torch.manual_seed(0)
    length, blocks = 220, (1, 0)
    q, k, v = (torch.randn(heads, length, 32).half() for heads in (4, 2, 2))
    pools = [torch.full((2, 2, BLOCK_TOKENS, 32), NAN, dtype=torch.float16) for _ in range(2)]
    for pool, rows in zip(pools, (k, v), strict=True):
        store_segment(pool, rows, Segment(0, length, 0, blocks, store=True))
    wanted = attend((q, k, v, *pools), [Segment(0, length, 0, blocks, store=True)], window)
    for cut in (1, 33, 64, 127, 128, 219):
        tail = Segment(0, length - cut, cut, blocks, store=False)
        got = attend((q[:, cut:], k[:, cut:], v[:, cut:], *pools), [tail], window)
        assert torch.equal(got, wanted[cut:]), cut


@interpreted
@pytest.mark.usefixtures("lanes_alike")
def test_siblings_that_share_their_beginning_do_not_see_one_another() -> None:
    """The beginning is stored by the same pack. NaN in one sibling does not reach the next."""
    (q, k, v, *pools), _ = make_case(torch.float16)
    segments = [Segment(3, 100, 0, (3,), store=True)]
    store_segment(pools[0], k[:, 3:103], segments[0])
    store_segment(pools[1], v[:, 3:103], segments[0])
    segments += [Segment(103, 40, 100, (3,), store=False), Segment(143, 3, 100, (3,), store=False)]
    assert len(kernel.plan_attention(segments, q.dtype, q.device).blocks) == 1
    wanted = attend((q[:, :143], k, v, *pools), segments)
    assert not wanted.isnan().any()
    k[:, 103:143], v[:, 103:143] = NAN, NAN
    got = attend((q[:, :143], k, v, *pools), segments)
    assert got[100:140].isnan().any()
    assert torch.equal(got[140:], wanted[140:]) and torch.equal(got[:100], wanted[:100])


@interpreted
def test_scores_far_from_one_another_give_weights_of_0_and_1() -> None:
    """Scores of tens of thousands, the greatest one first or last: nothing overflows."""
    case = make_case(torch.float32, ragged=((130, 70), (0, 40)))
    assert error_to_the_oracle(*case, scale=2e4) < 1e-3


@interpreted
@pytest.mark.usefixtures("lanes_alike")
def test_a_fixed_plan_takes_one_pack_after_another_and_its_spare_tiles_do_nothing() -> None:
    """As a CUDA graph replays it: same buffer, same number of tiles, rows of the result that are no one's untouched."""
    (q, *rest), segments = make_case(torch.float16, ragged=RAGGED[2:5])
    rows = kernel.rows_per_tile(6, 2, SMALL)
    table = FixedPlan.size_of(14) + 3  # with something between
    fixed = FixedPlan(torch.zeros(table + 6, dtype=torch.int32), q.shape[1], 14, window=50)
    assert kernel.tree_attention(q, *rest, fixed, Workspace(), 0.2, tuning=SMALL).isnan().all()
    buffer = fixed.work(rows).buffer
    for some in (segments, segments[:2]):
        plan = kernel.plan_attention(some, q.dtype, q.device, 50)
        for begin, part in ((0, fixed.lay_out(plan, rows, table)), (table, plan.blocks.astype(np.int32))):
            buffer[begin : begin + len(part)] = torch.from_numpy(part)
        got = kernel.tree_attention(q, *rest, fixed, Workspace(), 0.2, tuning=SMALL)
        assert torch.equal(got[: plan.num_rows], attend((q[:, : plan.num_rows], *rest), some, 50))
        assert got[plan.num_rows :].isnan().all()
    assert fixed.work(rows).buffer is buffer


def test_a_fixed_plan_that_is_too_small_says_so() -> None:
    nothing = torch.zeros(0, dtype=torch.int32)
    plan = kernel.plan_attention([Segment(0, 100, 300, (0, 1, 2), store=False)], torch.float16, nothing.device)
    with pytest.raises(ValueError, match="100 rows and 7 tiles does not go into one of 100 and 6"):
        FixedPlan(nothing, 100, 6).lay_out(plan, 16, 0)
    with pytest.raises(ValueError, match="99"):
        FixedPlan(nothing, 99, 7).lay_out(plan, 16, 0)
    with pytest.raises(ValueError, match="window of 0 does not go into one for 5"):
        FixedPlan(nothing, 100, 7, window=5).lay_out(plan, 16, 0)


@pytest.mark.parametrize("window", [0, 200])
def test_tiles_cover_every_row_once_those_with_the_most_keys_first(window: int) -> None:
    segments = [Segment(0, 40, 0, (), store=False), Segment(40, 20, 300, (5, 6, 7, 8), store=False)]
    segments += [Segment(60, 7, 300, (5, 6, 7, 8), store=False), Segment(67, 1, 128, (9,), store=False)]
    plan = kernel.plan_attention(segments, torch.float16, torch.device("cpu"), window)
    work = plan.work(16)
    assert plan.work(16) is work
    tiles = work.buffer[: 6 * work.num_tiles].view(-1, 6).tolist()
    covered = sorted(row for first, rows, *_ in tiles for row in range(first, first + rows))
    assert covered == list(range(68))
    keys = [min(position + rows, rows + window if window else 1000) for _, rows, position, *_ in tiles]
    assert keys == sorted(keys, reverse=True)
    for first, rows, position, stored, to_row, table in tiles:
        segment = max((s for s in segments if s.row <= first), key=lambda s: s.row)
        assert first - segment.row == position - segment.start and stored == segment.start and 0 < rows <= 16
        assert position + to_row == first
        needed = -(-stored // BLOCK_TOKENS)
        assert work.buffer[table : table + needed].tolist() == list(segment.blocks[:needed])


def test_what_it_cannot_do_is_refused() -> None:
    (q, k, v, *pools), segments = make_case(torch.float16)
    if isinstance(kernel.attend_tile, kernel.triton.JITFunction):
        with pytest.raises(ValueError, match="is for cuda, not cpu"):
            attend((q, k, v, *pools), segments)
    with pytest.raises(ValueError, match="up to 64 heads to a kv head, not 65"):
        kernel.rows_per_tile(65, 1, SMALL)
    with pytest.raises(ValueError, match=r"not 288 and 64 on 9\.0"):
        kernel.default_tuning(288, 64, torch.bfloat16, (9, 0))
    with pytest.raises(ValueError, match=r"not 64 and 64 on 7\.5"):
        kernel.default_tuning(64, 64, torch.float16, (7, 5))


@interpreted
def test_tensors_of_several_precisions_are_refused() -> None:
    (q, k, v, *pools), segments = make_case(torch.float16)
    with pytest.raises(ValueError, match="of one precision"):
        attend((q.float(), k, v, *pools), segments)
