"""The fused pooling kernel against its twin in plain torch, and both against themselves, cut; interpreted, on a CPU."""

import pytest
import torch
from rewardserve_kernels.pooling import reference
from rewardserve_kernels.pooling.reference import Norm, NormKind, Pooled, Pooling

pytest.importorskip("triton", reason="triton is not installed")
from rewardserve_kernels.pooling import triton as kernel

interpreted = pytest.mark.interpreted
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # numpy on NaN
both = pytest.mark.parametrize("way", [reference, pytest.param(kernel, marks=interpreted)], ids=["torch", "triton"])
NAN = float("nan")
SIZE = 200  # no power of two
SPANS = ((3, 4), (4, 11), (20, 20), (12, 60))  # one row, some, none, many; rows between belong to no one
NORMS = {
    "none": None,
    "rms": Norm(NormKind.RMS, torch.linspace(0.5, 2, SIZE), 0.01),
    "gemma": Norm(NormKind.RMS, torch.linspace(-0.3, 0.3, SIZE), 0.02, plus_one=True),
    "layer": Norm(NormKind.LAYER, torch.linspace(0.5, 2, SIZE), 0.03, torch.linspace(-1, 1, SIZE).bfloat16()),
}
norms = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


@pytest.fixture(autouse=True)
def poisoned_results():
    """What is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows a stride apart; those in no span are NaN. With a mean far from 0, which a LayerNorm takes away."""
    torch.manual_seed(0)
    hidden = (torch.randn(64, SIZE + 8) + 1).to(dtype)[:, :SIZE]
    unread = torch.ones(64, dtype=torch.bool)
    for begin, end in SPANS:
        unread[begin:end] = False
    hidden[unread] = NAN
    return hidden, int32(SPANS), torch.randn(3, SIZE) / SIZE, torch.randn(3)


def plain(hidden: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """torch's own norms, in fp64."""
    hidden = hidden.double()
    if norm is None:
        return hidden
    weight = norm.weight.double() + norm.plus_one
    if norm.kind is NormKind.LAYER:
        return torch.nn.functional.layer_norm(hidden, (SIZE,), weight, norm.bias.double(), norm.eps)
    return torch.nn.functional.rms_norm(hidden, (SIZE,), weight, norm.eps)


@both
@norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_are_those_of_the_last_normed_row(way, norm: Norm | None, dtype: torch.dtype) -> None:
    hidden, spans, weight, bias = make_case(dtype)
    got = way.pool_head(hidden, spans, weight, bias, norm)
    last = torch.stack([plain(hidden, norm)[end - 1] for begin, end in SPANS if end > begin])
    wanted = last @ weight.double().T + bias.double()
    assert got.dtype == torch.float32
    assert got[2].isnan().all(), "a span without a row has no score"
    assert (got[[0, 1, 3]] - wanted).norm() / wanted.norm() < 1e-6


@both
@norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_those_of_the_mean_of_normed_rows_earlier_ones_among_them(
    way, norm: Norm | None, dtype: torch.dtype
) -> None:
    hidden, spans, weight, _ = make_case(dtype)
    normed = plain(hidden, norm)
    earlier = [torch.randn(count, SIZE) for count in (0, 5, 9, 2)]
    before = Pooled(torch.stack([rows.sum(0) for rows in earlier]), int32([len(rows) for rows in earlier]))
    sums = torch.full((4, SIZE), NAN)
    got = way.pool_head(hidden, spans, weight, None, norm, Pooling.MEAN, before, sums)
    rows = [torch.cat([past, normed[begin:end]]) for past, (begin, end) in zip(earlier, SPANS, strict=True)]
    wanted = torch.stack([r.mean(0) for r in rows]) @ weight.double().T
    assert (got - wanted).norm() / wanted.norm() < 1e-6
    torch.testing.assert_close(sums.double(), torch.stack([r.sum(0) for r in rows]), rtol=1e-5, atol=1e-4)


@both
@norms
def test_where_the_rows_of_a_mean_are_cut_changes_no_bit(way, norm: Norm | None) -> None:
    hidden, spans, weight, bias = make_case(torch.bfloat16)
    wanted, wanted_sums = torch.full((2, SIZE), NAN), torch.full((2, SIZE), NAN)
    spans = spans[[1, 3]]
    wanted = way.pool_head(hidden, spans, weight, bias, norm, Pooling.MEAN, sums=wanted_sums)
    first, rest = spans.clone(), spans.clone()
    first[:, 1] = rest[:, 0] = int32([5, 47])
    sums = torch.full((2, SIZE), NAN)
    way.pool_head(hidden, first, weight, bias, norm, Pooling.MEAN, sums=sums)
    before = Pooled(sums, first[:, 1] - first[:, 0])
    got = way.pool_head(hidden, rest, weight, bias, norm, Pooling.MEAN, before, sums)  # the sums in place
    assert torch.equal(got, wanted) and torch.equal(sums, wanted_sums)


@both
@pytest.mark.parametrize("pooling", Pooling)
def test_a_span_alone_is_bitwise_what_it_is_among_others(way, pooling: Pooling) -> None:
    hidden, spans, weight, bias = make_case(torch.bfloat16)
    wanted = way.pool_head(hidden, spans, weight, bias, NORMS["layer"], pooling)
    for index in (0, 1, 3):
        got = way.pool_head(hidden, spans[index : index + 1], weight, bias, NORMS["layer"], pooling)
        assert torch.equal(got[0], wanted[index])


@both
def test_no_spans_have_no_scores(way) -> None:
    hidden, spans, weight, _ = make_case(torch.float32)
    assert way.pool_head(hidden, spans[:0], weight).shape == (0, 3)


def test_arguments_that_are_not_meant_are_refused() -> None:
    hidden, spans, weight, bias = make_case(torch.float32)
    before = Pooled(torch.zeros(4, SIZE), int32([1, 1, 1, 1]))
    for wrong, message in (
        ({"spans": spans.long()}, "spans is not int32"),
        ({"spans": spans.T}, r"spans has shape \[2, 4\] instead of \[2, 2\]"),
        ({"head_weight": weight[:, :-1]}, r"head_weight has shape \[3, 199\] instead of \[3, 200\]"),
        ({"head_bias": bias[:2]}, "head_bias has shape"),
        ({"hidden": hidden.T.contiguous().T}, "contiguous last axis"),
        ({"before": before}, "the last row alone has no sums"),
        ({"pooling": Pooling.MEAN, "sums": torch.zeros(4, SIZE).half()}, "sums is not fp32 and contiguous"),
        ({"pooling": Pooling.MEAN, "before": Pooled(before.sums, spans[:, 0].long())}, "before.counts is not int32"),
        ({"norm": Norm(NormKind.RMS, bias, 1e-6)}, "norm.weight has shape"),
        ({"norm": Norm(NormKind.RMS, hidden[0], 1e-6, hidden[0])}, "an RMS norm has no bias"),
    ):
        for way in (reference, kernel):
            arguments = {"hidden": hidden, "spans": spans, "head_weight": weight, "head_bias": bias} | wrong
            with pytest.raises(ValueError, match=message):
                way.pool_head(**arguments)
    if isinstance(kernel.pool_span, kernel.triton.JITFunction):
        with pytest.raises(ValueError, match=r"pooling\.triton is for cuda, not cpu"):
            kernel.pool_head(hidden, spans, weight)
