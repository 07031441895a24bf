"""Each loss against the statement of its paper, number by number."""

import math

import pytest
import torch
from rewardserve.training.losses import bradley_terry, centering, cross_entropy, squared_error

BETTER, WORSE = [0.3, -2.0, 5.0, 40.0], [0.1, 1.5, 5.0, -40.0]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def bt(label=None, margin=None):
    tensors = [None if values is None else torch.tensor(values) for values in (BETTER, WORSE, label, margin)]
    return bradley_terry(*tensors).item()


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_bradley_terry_is_minus_the_log_probability_that_the_better_one_wins():
    assert bt() == pytest.approx(mean(-math.log(sigmoid(b - w)) for b, w in zip(BETTER, WORSE, strict=True)), rel=1e-6)


def test_a_margin_is_taken_off_the_difference():
    margin = [1.0, 0.0, 0.5, 2.0]
    plain = mean(-math.log(sigmoid(b - w - m)) for b, w, m in zip(BETTER, WORSE, margin, strict=True))
    assert bt(margin=margin) == pytest.approx(plain, rel=1e-6)
    assert bt(margin=margin) > bt()


def test_a_label_is_a_share_of_votes():
    label = [1.0, 0.75, 0.5, 0.9]
    plain = mean(
        -(p * math.log(sigmoid(b - w)) + (1 - p) * math.log(sigmoid(w - b)))
        for b, w, p in zip(BETTER, WORSE, label, strict=True)
    )
    assert bt(label=label) == pytest.approx(plain, rel=1e-6)
    assert bt(label=[1.0] * 4) == bt()


def test_exchanging_the_responses_and_the_label_changes_nothing():
    label, margin = torch.tensor([1.0, 0.75, 0.5, 0.6]), torch.tensor([1.0, 0.0, 0.5, 2.0])
    better, worse = torch.tensor(BETTER), torch.tensor(WORSE)
    assert torch.equal(bradley_terry(better, worse, label, margin), bradley_terry(worse, better, 1 - label, margin))


@pytest.mark.parametrize("margin", [0.0, 1.5])
def test_a_tie_pulls_both_together_from_either_side(margin):
    better = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    half, margins = torch.full((3,), 0.5), torch.full((3,), margin)
    bradley_terry(better, torch.zeros(3), half, margins).backward()
    left, middle, right = better.grad.tolist()
    assert left < 0 < right and left == -right and middle == 0


def test_scores_far_apart_overflow_nothing():
    far = torch.tensor([1e4], requires_grad=True)
    loss = bradley_terry(-far, far)
    loss.backward()
    assert loss.item() == pytest.approx(2e4) and far.grad.isfinite().all()


def test_the_losses_of_single_responses():
    scores, wanted = torch.tensor([0.3, -2.0]), torch.tensor([1.0, 0.25])
    assert squared_error(scores, wanted).item() == pytest.approx(mean([0.7**2, 2.25**2]))
    plain = mean([-math.log(sigmoid(0.3)), -(0.25 * math.log(sigmoid(-2)) + 0.75 * math.log(sigmoid(2)))])
    assert cross_entropy(scores, wanted).item() == pytest.approx(plain)


def test_centering_is_least_where_a_pairs_scores_cancel():
    scores = torch.tensor([2.0, -1.0])
    assert centering(scores, -scores) == 0
    assert centering(scores, torch.tensor([1.0, 0.0])).item() == pytest.approx(mean([9.0, 1.0]))


@pytest.mark.parametrize("loss", [bradley_terry, squared_error, cross_entropy, centering])
def test_16_bits_are_reckoned_with_in_32(loss):
    one, other = torch.tensor([0.3, 3.0]).bfloat16(), torch.tensor([0.25, 0.5]).bfloat16()
    assert loss(one, other).dtype is torch.float32
    assert loss(one, other) == loss(one.float(), other.float())
