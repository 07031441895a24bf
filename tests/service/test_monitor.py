"""What Prometheus gets of passing traffic is what the replies say."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from rewardserve.metrics import Metrics, ModelMetrics
from rewardserve.service.monitor import observe_traffic
from rewardserve.types import GroupScore, ItemCode, ItemFailure, ItemScore, ScoreResult, Timings

TIMINGS = Timings(0.0, 0.0, 0.0, 0.0, 0.0)


class Watched:
    """One model's series, after these groups of (score or None, tokens)."""

    def __init__(self, *groups: Sequence[tuple[float | None, int]], std: float | None = None) -> None:
        self._registry = CollectorRegistry()
        made = [GroupScore("", tuple([self._item(*each, std) for each in group])) for group in groups]
        observe_traffic(ModelMetrics(Metrics(self._registry), "m"), ScoreResult("r", "m", "v1", tuple(made), TIMINGS))

    def _item(self, score: float | None, tokens: int, std: float | None) -> ItemScore:
        failure = ItemFailure(ItemCode.OUT_OF_RANGE, "too long") if score is None else None
        return ItemScore(score, failure, 3, tokens, 0, tokens > 1000, raw=score, std=std)

    def __call__(self, name: str, **labels: str) -> float:
        value = self._registry.get_sample_value(f"rewardserve_{name}", {"model": "m", **labels})
        assert value is not None
        return value


def test_slope_and_correlation_with_length_are_those_within_groups() -> None:
    random = np.random.default_rng(0)
    lengths, groups = random.integers(10, 500, (6, 8)), []
    for number, row in enumerate(lengths):  # prompts differ far more than their responses, and that counts for nothing
        groups.append([(100.0 * number + 0.02 * n + random.normal(), int(n) + 1000 * number) for n in row])
    watched = Watched(*groups)
    scores = np.concatenate([np.array([s for s, _ in group]) - np.mean([s for s, _ in group]) for group in groups])
    tokens = np.concatenate([np.array([n for _, n in group]) - np.mean([n for _, n in group]) for group in groups])
    products, of_lengths = watched("group_length_score_products"), watched("group_length_squares_total")
    assert products / of_lengths == pytest.approx(np.polyfit(tokens, scores, 1)[0])
    correlation = products / math.sqrt(of_lengths * watched("group_score_squares_total"))
    assert correlation == pytest.approx(np.corrcoef(tokens, scores)[0, 1])


def test_what_has_no_score_or_no_sibling_says_nothing_of_groups() -> None:
    alone, failed, one_left = [(3.0, 5)], [(None, 7), (None, 8)], [(2.0, 4), (None, 9)]
    watched = Watched(alone, failed, one_left, [(1.0, 10), (2.0, 20), (None, 500)])
    assert watched("group_score_std_count") == 1
    assert watched("group_score_std_sum") == 0.5
    assert watched("group_length_squares_total") == 50
    assert watched("group_length_score_products") == 5
    assert watched("response_tokens_count") == 4 and watched("response_tokens_sum") == 39
    assert watched("truncated_pairs_total") == 0


@pytest.mark.parametrize("score", [0.1, -7.3, 0.0])
def test_a_group_of_equal_scores_has_no_spread_at_all(score: float) -> None:
    watched = Watched([(score, 5), (score, 6), (score, 7)], [(score, 5), (score + 1e-6, 5)])
    assert watched("group_score_std_bucket", le="0.0") == 1
    assert watched("group_score_std_bucket", le="0.01") == 2


def test_uncertainty_and_what_was_cut_off_are_counted() -> None:
    watched = Watched([(1.0, 5), (2.0, 1001), (None, 2000)], std=0.25)
    assert watched("score_std_sum") == 0.5 and watched("score_std_count") == 2
    assert watched("truncated_pairs_total") == 1
    assert Watched([(1.0, 5)])("score_std_count") == 0
