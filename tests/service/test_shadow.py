"""Two versions rank alike where they order the responses to one prompt alike."""

import pytest
from rewardserve.service.shadow import mean_rank_correlation


def test_an_order_that_is_reversed_within_every_prompt_is_not_hidden_by_what_prompts_have_in_common() -> None:
    groups = [[(100 * n + i, 100 * n - i) for i in range(4)] for n in range(10)]
    assert mean_rank_correlation(groups) == -1.0


def test_groups_count_alike_and_those_without_an_order_do_not_count() -> None:
    same, other = [(1.0, 1.0), (2.0, 2.0)], [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]
    assert mean_rank_correlation([same, other, [(5.0, 5.0)], [(1.0, 1.0), (2.0, 1.0)]]) == 0.0


def test_of_single_responses_it_is_that_of_all_together() -> None:
    assert mean_rank_correlation([[(float(i), float(i**3))] for i in range(5)]) == pytest.approx(1.0)
    assert mean_rank_correlation([[(1.0, 1.0)]]) is None
    assert mean_rank_correlation([[(1.0, 1.0), (2.0, 1.0)]]) is None
