"""The gate, first part: every kernel against what it has to give, in fp64 or to the bit."""

import torch
from attention_case import Case, Inputs, attend, ragged
from checks import Checks
from kernels_of import index_of, pool_kernel, store_kernel, sum_kernel
from part import Part
from rewardserve_kernels.attention import reference
from rewardserve_kernels.kv_cache.paged import store_segment
from rewardserve_kernels.pooling.reference import Norm, NormKind, Pooled, Pooling
from rewardserve_kernels.pooling.running_mean import plan_means, sum_pieces
from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment
from rewardserve_kernels.upload import Upload

# Scores before a softcap have a spread of 1: of a greater cap nothing would show in the result.
WINDOW, SOFTCAP = 140, 1.0
# A kernel of its own each. What an option does does not depend on the size of the heads.
CASES = (
    Case(128, 128),
    Case(128, 128, window=WINDOW),
    Case(128, 128, softcap=SOFTCAP),
    Case(128, 128, sinks=True),
    Case(128, 128, window=WINDOW, softcap=SOFTCAP, sinks=True),
    Case(64, 64),
    Case(80, 96),
    Case(256, 256),
)
ATTENTION_TOLERANCE = 1e-2  # of results in bf16, whose weights were rounded to it as well
POOLING_TOLERANCE = 1e-5


def kernel_checks(part: Part) -> None:
    """What a kernel leaves out shows: all memory that is given out is full of what is no number."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills it (torch.utils.deterministic)
    check = Checks(part)
    check("memory that is given out is poisoned", lambda: _memory_is_poisoned(part))
    for case in CASES[: 2 if part.tiny and part.on_gpu else None]:
        check(f"tree_attention {case}", lambda: attention_is_right(part, case))  # noqa: B023
    check("tree_attention, a row's bits are its own", lambda: _attention_is_invariant(part))
    check("keys and values stored at once", lambda: _storing_is_right(part))
    for name, (norm, pooling) in pooled_ways(part).items():
        check(f"pool_head {name}", lambda: pool_head_is_right(part, norm, pooling))  # noqa: B023
    check("pool_head, a mean that was begun before", lambda: _pool_head_goes_on(part))
    check("sums of rows", lambda: _sums_are_right(part))


def _memory_is_poisoned(part: Part) -> tuple[bool, str]:
    given = torch.ones(1 << 10, device=part.device).new_empty(1 << 20)
    return bool(given.isnan().all()), f"{given.isnan().float().mean().item():.0%} of it"


def attention_is_right(part: Part, case: Case) -> tuple[bool, str]:
    inputs = ragged(part, case)
    got = attend(part, case, inputs)
    exact = (tensor.double().cpu() for tensor in inputs.tensors)
    wanted = reference.tree_attention(
        *exact,
        inputs.segments,
        case.head_size**-0.5,
        case.window,
        case.softcap,
        None if inputs.sinks is None else inputs.sinks.double().cpu(),
    )
    error = _relative(got, wanted)
    return error < ATTENTION_TOLERANCE, f"relative error {error:.1e} to fp64"


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Infinite where a result is not a number."""
    error = ((got.double().cpu() - wanted).norm() / wanted.norm()).item()
    return error if error == error else float("inf")


def _attention_is_invariant(part: Part) -> tuple[bool, str]:
    case = CASES[0]
    whole = ragged(part, case)
    together = attend(part, case, whole)
    for s in whole.segments:
        rows = slice(s.row, s.row + s.num_rows)
        own = (tensor[:, rows] for tensor in (whole.q, whole.k, whole.v))
        alone = Inputs(*own, whole.pool_k, whole.pool_v, [Segment(0, s.num_rows, s.start, s.blocks, False)])
        if not torch.equal(attend(part, case, alone), together[rows]):
            return False, f"{s.num_rows} rows after {s.start} are others alone"
    cuts = (60, 128) if part.tiny else (1, 60, 127, 128, 129, 384, 650)
    length, blocks = max(cuts) + 50, tuple(range(-(-(max(cuts) + 50) // BLOCK_TOKENS)))
    q, k, v = (torch.randn(heads, length, 128, device=part.device).bfloat16() for heads in (8, 2, 2))
    pools = [torch.zeros(len(blocks), 2, BLOCK_TOKENS, 128, device=part.device).bfloat16() for _ in range(2)]
    for pool, rows_ in zip(pools, (k, v), strict=True):
        store_segment(pool, rows_, Segment(0, length, 0, blocks, True))
    uncut = attend(part, case, Inputs(q, k, v, *pools, [Segment(0, length, 0, blocks, True)]))
    for cut in cuts:
        tail = Inputs(q[:, cut:], k[:, cut:], v[:, cut:], *pools, [Segment(0, length - cut, cut, blocks, False)])
        if not torch.equal(attend(part, case, tail), uncut[cut:]):
            return False, f"rows are others where the sequence was cut at {cut}"
    return True, f"alone, packed and cut at {len(cuts)} places"


def _storing_is_right(part: Part) -> tuple[bool, str]:
    """To the bit, as segment by segment; what is not stored is left as it was."""
    torch.manual_seed(0)
    segments = [Segment(0, 130, 0, (4, 1), True), Segment(130, 9, 5, (), False), Segment(139, 300, 70, (5, 0, 2), True)]
    like = {"device": part.device, "dtype": torch.bfloat16}
    rows = [torch.randn(439, 2, size, **like).transpose(0, 1) for size in (192, 128)]
    at_once, one_by_one = ([torch.zeros(7, 2, BLOCK_TOKENS, r.shape[2], **like) for r in rows] for _ in "ab")
    store_kernel(part)(*at_once, *rows, index_of(part, segments))
    for segment in segments:
        for pool, own in zip(one_by_one, rows, strict=True):
            if segment.store:
                store_segment(pool, own[:, segment.row : segment.row + segment.num_rows], segment)
    ok = all(torch.equal(a, b) for a, b in zip(at_once, one_by_one, strict=True))
    return ok, "430 rows of two segments"


HIDDEN_SIZE, SPANS = 2560, ((0, 7), (7, 8), (8, 139), (139, 300))


def pooled_ways(part: Part) -> dict[str, tuple[Norm | None, Pooling]]:
    weight, bias = (torch.rand(HIDDEN_SIZE, device=part.device) + 0.5 for _ in range(2))
    rms, centred = Norm(NormKind.RMS, weight, 1e-6), Norm(NormKind.LAYER, weight, 1e-5, bias)
    return {
        "of a last row": (rms, Pooling.LAST),
        "of a mean": (rms, Pooling.MEAN),
        "without a norm": (None, Pooling.MEAN),
        "after a LayerNorm": (centred, Pooling.MEAN),
        "after a norm by 1 + weight": (Norm(NormKind.RMS, weight, 1e-6, plus_one=True), Pooling.LAST),
    }


def _to_pool(part: Part) -> tuple[torch.Tensor, ...]:
    """Rows that are not about 0, their spans, three heads and their bias."""
    torch.manual_seed(0)
    like = {"device": part.device}
    hidden = (torch.randn(300, HIDDEN_SIZE, **like) + 0.5).bfloat16()
    spans = torch.tensor(SPANS, dtype=torch.int32).to(part.device)
    return hidden, spans, torch.randn(3, HIDDEN_SIZE, **like), torch.randn(3, **like)


def pool_head_is_right(part: Part, norm: Norm | None, pooling: Pooling) -> tuple[bool, str]:
    hidden, spans, weight, bias = _to_pool(part)
    got = pool_kernel(part)(hidden, spans, weight, bias, norm, pooling)
    rows = [_normed(hidden[end - 1 if pooling is Pooling.LAST else begin : end], norm).mean(0) for begin, end in SPANS]
    wanted = torch.stack(rows) @ weight.double().cpu().T + bias.double().cpu()
    error = _relative(got, wanted)
    return error < POOLING_TOLERANCE, f"relative error {error:.1e} to fp64"


def _normed(rows: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """In fp64, by the definition."""
    rows = rows.double().cpu()
    if norm is None:
        return rows
    if norm.kind is NormKind.LAYER:
        rows = rows - rows.mean(-1, keepdim=True)
    rows = rows / (rows.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    rows = rows * (norm.weight.double().cpu() + norm.plus_one)
    return rows if norm.bias is None else rows + norm.bias.double().cpu()


def _pool_head_goes_on(part: Part) -> tuple[bool, str]:
    """A mean in two calls has the bits of one."""
    hidden, spans, weight, bias = _to_pool(part)
    norm, _ = pooled_ways(part)["of a mean"]
    pool_head, cut = pool_kernel(part), torch.tensor([[0, 3], [0, 0], [0, 100], [0, 1]]).int().to(part.device)
    first, rest = (spans.clone() for _ in range(2))
    first[:, 1] = rest[:, 0] = spans[:, 0] + cut[:, 1]
    sums = torch.zeros(len(SPANS), HIDDEN_SIZE, device=part.device)
    pool_head(hidden, first, weight, bias, norm, Pooling.MEAN, sums=sums)
    in_two = pool_head(hidden, rest, weight, bias, norm, Pooling.MEAN, before=Pooled(sums, cut[:, 1].contiguous()))
    in_one = pool_head(hidden, spans, weight, bias, norm, Pooling.MEAN)
    return torch.equal(in_two, in_one), f"off by {(in_two - in_one).abs().max().item():.1e}"


def _sums_are_right(part: Part) -> tuple[bool, str]:
    """To the bit, as row by row."""
    if sum_kernel(part) is sum_pieces:
        return True, "not checked: on a CPU row by row is the only way"
    torch.manual_seed(0)
    segments = (Segment(0, 70, 0, (1, 2), store=True), Segment(70, 90, BLOCK_TOKENS - 40, (0, 3), store=True))
    upload = Upload()
    means = plan_means(segments, (0, 1), upload)
    upload.ship(part.device)
    plan = means()
    rows, sums = (torch.randn(count, HIDDEN_SIZE, device=part.device) for count in (160, 4))
    pairs = [(sum_kernel(part)(rows, p, sums), sum_pieces(rows, p, sums)) for p in (plan.stored, plan.own)]
    return all(torch.equal(a, b) for a, b in pairs), "160 rows of two segments"
