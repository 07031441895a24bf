from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judged import pair, pairs, rated
from rewardserve.evaluation.data import Judged, pairs_of
from rewardserve.evaluation.intervals import Share, difference, mean, share
from rewardserve.evaluation.ranking import ranking
from scipy import stats

GROUPS = st.lists(
    st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 3)), min_size=2, max_size=6), min_size=1, max_size=6
)


def prompts_of(groups, transform=float):
    return [
        rated([transform(score) for score, _ in group], [rating for _, rating in group], str(number))
        for number, group in enumerate(groups)
    ]


@given(GROUPS, st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
def test_pairs_are_those_that_differ_in_the_order_of_their_responses(groups, min_gap, with_members):
    prompts = [pair(1.5, "of a pair", "b", (3, 4)), *prompts_of(groups)]
    members = [[(score, 2.0 * score) for score, _ in group] if with_members else None for group in groups]
    prompts[1:] = [
        rated(each.scores, each.ratings, each.prompt, "long name", range(len(each.scores)), of_members)
        for each, of_members in zip(prompts[1:], members, strict=True)
    ]
    wanted = [
        (number, each.domain, a.score - b.score, a.num_characters, b.num_characters)
        for number, each in enumerate(prompts)
        for a in each.responses
        for b in each.responses
        if (a.rating is None and a is not b and a is each.responses[0])
        or (a.rating is not None and a.rating - b.rating > min_gap)
    ]
    found = pairs_of(prompts, min_gap)
    columns = (found.prompt, found.domain, found.margin, found.preferred_characters, found.other_characters)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == wanted
    assert found.members is None, "one row has none"
    found = pairs_of(prompts[1:], min_gap)
    assert (found.members is not None) == (with_members and len(found) > 0)
    if found.members is not None:
        assert found.members.tolist() == [[margin, 2 * margin] for margin in found.margin.tolist()]


def accuracy(prompts) -> Share | None:
    found = pairs_of(prompts)
    return share(found.margin, found.prompt)


@given(GROUPS)
def test_no_monotone_transform_of_the_scores_changes_accuracy(groups):
    plain = accuracy(prompts_of(groups))
    for transform in (lambda x: x**3, lambda x: 2.0**x, lambda x: 5 * x - 7.0):
        assert accuracy(prompts_of(groups, transform)) == plain


@given(GROUPS)
def test_turned_around_scores_are_right_where_they_were_wrong(groups):
    plain, turned = accuracy(prompts_of(groups)), accuracy(prompts_of(groups, lambda x: -float(x)))
    assert (plain is None) == (turned is None)
    if plain and turned:
        assert turned.value == pytest.approx(1 - plain.value) and turned.num_ties == plain.num_ties
        assert (turned.low, turned.high) == pytest.approx((1 - plain.high, 1 - plain.low))


@given(GROUPS)
def test_an_interval_holds_its_value_and_no_impossible_one(groups):
    found = accuracy(prompts_of(groups))
    if found:
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.num_prompts <= len(groups)


def test_a_tie_counts_one_half_and_is_reported():
    found = ranking(pairs([1.0, 0.0, 0.0, -1.0])).accuracy
    assert (found.value, found.num_ties, found.num_pairs) == (0.5, 2, 4)


def test_responses_rated_alike_make_no_pair_and_a_gap_drops_more():
    prompt = rated([1, 2, 3], [0.5, 0.5, 0.8])
    assert len(pairs_of([prompt])) == 2
    assert len(pairs_of([prompt], 0.3 + 1e-9)) == 0
    assert len(pairs_of([pair(1.0, gap=0.1), pair(1.0, gap=0.5), pair(1.0)], 0.2)) == 2


def test_a_gap_is_as_large_as_it_is_written():
    """0.9 - 0.7 is a little more than 0.2 in floats, and 0.3 - 0.1 a little less."""
    tenths = [rated([1, 2], [high / 10, (high - 2) / 10]) for high in range(2, 11)]
    assert len(pairs_of(tenths, 0.2)) == 0 and len(pairs_of(tenths, 0.199)) == 9
    assert len(pairs_of([rated([1, 2], [1.0, 1.0 + 1e-12])])) == 1


def test_independent_pairs_get_wilsons_interval():
    margins = [1.0] * 700 + [-1.0] * 300
    found = share(np.array(margins), np.arange(1000))
    wilson = stats.binomtest(700, 1000).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high), abs=2e-4)


def test_saying_everything_five_times_makes_nothing_surer():
    once = pairs([1.0, -1.0, 1.0, 1.0, -1.0, 1.0] * 5)
    five = np.repeat(once.margin, 5), np.repeat(once.prompt, 5)
    a, b = share(once.margin, once.prompt), share(*five)
    assert (a.low, a.high) == pytest.approx((b.low, b.high)) and b.num_pairs == 5 * a.num_pairs


@pytest.mark.parametrize(("num_prompts", "per_prompt"), [(5, 20), (12, 10), (60, 20), (200, 1)])
def test_the_interval_covers_the_truth_as_often_as_it_says(num_prompts, per_prompt):
    """Prompts of very different difficulty, whose pairs are right together or wrong together."""
    rng, prompts, hits = np.random.default_rng(3), np.repeat(np.arange(num_prompts), per_prompt), 0
    for _ in range(400):
        chance = np.repeat(rng.beta(2.1, 0.9, num_prompts), per_prompt)
        found = share(np.where(rng.random(len(prompts)) < chance, 1.0, -1.0), prompts)
        hits += found.low <= 0.7 <= found.high
    assert hits >= 0.92 * 400, "95 % less two and a half standard errors of this very count"


def test_a_prompt_with_most_of_the_pairs_makes_nothing_surer_than_the_others_bear_out():
    """64 responses rated one by one are 2016 pairs, and still one prompt."""
    rng, hits, prompts = np.random.default_rng(3), 0, np.repeat(np.arange(31), [2016, *[1] * 30])
    for _ in range(400):
        chance = rng.beta(2.1, 0.9, 31)[prompts]
        found = share(np.where(rng.random(len(prompts)) < chance, 1.0, -1.0), prompts)
        hits += found.low <= 0.7 <= found.high
    assert hits >= 0.88 * 400, "5 % where a prompt is held against a mean that is all but its own"


def test_an_interval_over_pairs_as_if_independent_would_miss_it():
    """What the effective number is for: without it 20 pairs of a prompt count as 20 prompts."""
    rng, prompts, hits = np.random.default_rng(3), np.repeat(np.arange(60), 20), 0
    for _ in range(400):
        chance = np.repeat(rng.beta(2.1, 0.9, 60), 20)
        found = share(np.where(rng.random(1200) < chance, 1.0, -1.0), np.arange(1200))
        hits += found.low <= 0.7 <= found.high
    assert prompts.size == 1200 and hits < 0.8 * 400


def test_all_won_is_not_certain_and_one_prompt_tells_nothing_of_others():
    found = ranking(pairs([1.0] * 20)).accuracy
    assert found.value == found.high == 1.0 and 0.7 < found.low < 0.9
    alone = ranking(pairs([1.0] * 20, num_prompts=1)).accuracy
    assert (alone.low, alone.high) == (0.0, 1.0)


def test_rows_of_one_prompt_are_one_prompt():
    assert ranking(pairs([1.0, -1.0] * 10, num_prompts=4)).accuracy.num_prompts == 4


def test_a_plain_prompt_and_a_conversation_of_one_user_turn_are_one_prompt():
    plain = Judged(1, "Why?", ("a", "b"), None)
    assert replace(plain, prompt=({"role": "user", "content": "Why?"},)).prompt_key == plain.prompt_key
    assert replace(plain, prompt=({"role": "system", "content": "Why?"},)).prompt_key != plain.prompt_key


def test_a_difference_has_newcombes_interval():
    """The example of his paper: 56 of 70 against 48 of 80."""

    def of(won: int, total: int) -> Share:
        ends = stats.binomtest(won, total).proportion_ci(method="wilson")
        return Share(won / total, ends.low, ends.high, total, total, 0)

    found = difference(of(56, 70), of(48, 80))
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


def test_domains_are_told_apart_and_spillover_is_their_difference():
    prompts = [pair(1.0, f"a{i}", "code") for i in range(30)] + [pair((-1.0) ** i, f"b{i}", "law") for i in range(30)]
    found = ranking(pairs_of(prompts), ["code"])
    assert found.accuracy.value == 0.75
    assert {name: each.value for name, each in found.by_domain.items()} == {"code": 1.0, "law": 0.5}
    assert found.spillover.difference.value == 0.5 and found.spillover.difference.low > 0.2
    assert found.spillover.out_of_domain.num_pairs == 30
    assert ranking(pairs_of(prompts)).spillover is None, "no domain was named"
    assert ranking(pairs_of(prompts), ["code", "law"]).spillover is None, "nothing is outside"


def test_the_mean_of_prompts_has_an_interval_of_the_right_width():
    values = np.random.default_rng(0).normal(0.3, 1.0, 400)
    found = mean(values, seed=1)
    error = values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.02
    )
    assert mean(values, seed=1) == found, "seeded"
    assert mean(values[:1], seed=1).low is None and mean(values[:0], seed=1) is None
