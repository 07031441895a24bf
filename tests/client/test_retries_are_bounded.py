"""When a call is tried again: the decision, without any network."""

import math

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewardserve.client import RetryPolicy, RewardClientError
from rewardserve.client.retry import Deadline, backoff_s, is_worth_retrying, retry_delay_s

Code = grpc.StatusCode
POLICIES = st.builds(
    lambda first, more, attempts, multiplier, jitter: RetryPolicy(attempts, first, first + more, multiplier, jitter),
    st.floats(0, 10),
    st.floats(0, 100),
    st.integers(1, 50),
    st.floats(1, 1e6),
    st.floats(0, 1),
)
FRACTIONS = st.floats(0, 1, exclude_max=True)
UNAVAILABLE = RewardClientError("", code=Code.UNAVAILABLE)


@given(POLICIES, st.integers(1, 10_000), FRACTIONS)
def test_a_backoff_lies_between_zero_and_the_longest(policy, attempt, fraction):
    assert 0 <= backoff_s(policy, attempt, fraction) <= policy.max_backoff_s * (1 + 1e-12)


@given(POLICIES, st.integers(1, 100))
def test_the_longest_backoff_never_shrinks(policy, attempt):
    longest = [backoff_s(policy, n, 1.0) for n in (attempt, attempt + 1)]
    assert longest[0] <= longest[1] * (1 + 1e-12)


@given(POLICIES, st.integers(1, 100), st.floats(-10, 100), FRACTIONS, st.none() | st.floats(0, 50))
def test_a_retry_is_never_beyond_the_deadline_nor_the_attempts_nor_before_its_time(
    policy, attempt, remaining_s, fraction, retry_after_s
):
    error = RewardClientError("", code=Code.RESOURCE_EXHAUSTED, retry_after_s=retry_after_s)
    delay_s = retry_delay_s(policy, error, attempt, remaining_s, fraction)
    if delay_s is not None:
        assert retry_after_s is not None and retry_after_s <= delay_s < remaining_s
        assert attempt < policy.max_attempts


@pytest.mark.parametrize("code", Code, ids=lambda code: code.name)
def test_only_what_can_get_better_is_retried(code):
    transient = {Code.UNAVAILABLE, Code.ABORTED, Code.CANCELLED}
    assert is_worth_retrying(RewardClientError("", code=code)) is (code in transient)
    with_wish = RewardClientError("", code=code, retry_after_s=0.1)
    assert is_worth_retrying(with_wish) is (code in transient | {Code.RESOURCE_EXHAUSTED})


def test_jitter_is_full_by_default_and_can_be_none():
    assert backoff_s(RetryPolicy(), 3, 0.0) == 0.0
    assert backoff_s(RetryPolicy(), 3, 0.5) == pytest.approx(0.2)
    assert backoff_s(RetryPolicy(jitter=0.0), 3, 0.0) == pytest.approx(0.4)
    assert retry_delay_s(RetryPolicy(), UNAVAILABLE, 6, 100.0, 0.5) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_attempts": 0},
        {"initial_backoff_s": -1},
        {"initial_backoff_s": 9},
        {"max_backoff_s": math.inf},
        {"multiplier": 0.5},
        {"jitter": 2},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError):
        RetryPolicy(**wrong)


def test_a_deadline_runs_down():
    deadline = Deadline.after(50.0)
    assert 0 < deadline.remaining_s() <= 50.0
