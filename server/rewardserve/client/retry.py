"""Whether to try again, and when. Pure: no clock but Deadline's, no network, no randomness of its own.

Scoring is a pure function of its request, so trying again is always safe; the only questions are whether it can help
and whether there is time.
"""

import math
import time
from dataclasses import dataclass

import grpc

from rewardserve.client.errors import RewardClientError

ATTEMPTS_AT_STRANGERS = 6  # a second or two: an address may be wrong, and then waiting is no help
LONGEST_S = 1e9  # 30 years: what is beyond overflows somewhere in gRPC


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff, as long as there is time.

    Without `max_attempts` a server that is restarting or replaced is waited for until the deadline: where it said when
    to come back, or has answered this client before. An endpoint that never has is given up after 6 attempts.

    An attempt goes through all endpoints: one that is unavailable is passed over without waiting, and only when none
    is left does the attempt count as failed and the backoff begin. `max_attempts=1` hence means no waiting, but still
    another endpoint.
    """

    max_attempts: int | None = None
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 5.0
    multiplier: float = 2.0
    jitter: float = 1.0  # the share of each backoff that is drawn at random: 1 is full jitter, 0 none

    def __post_init__(self) -> None:
        if self.max_attempts is not None and self.max_attempts < 1:
            raise ValueError(f"max_attempts is at least 1, not {self.max_attempts}")
        if not 0 <= self.initial_backoff_s <= self.max_backoff_s < math.inf:
            raise ValueError("backoffs are finite and 0 <= initial_backoff_s <= max_backoff_s")
        if not 1 <= self.multiplier < math.inf or not 0 <= self.jitter <= 1:
            raise ValueError("multiplier is finite and at least 1, jitter lies between 0 and 1")


@dataclass(frozen=True, slots=True)
class Deadline:
    at_s: float  # on the monotonic clock

    @classmethod
    def after(cls, timeout_s: float) -> "Deadline":
        if not 0 < timeout_s < math.inf:
            raise ValueError(f"a timeout is a positive, finite number of seconds, not {timeout_s}")
        return cls(time.monotonic() + min(timeout_s, LONGEST_S))

    def remaining_s(self) -> float:
        return self.at_s - time.monotonic()


def is_worth_retrying(error: RewardClientError) -> bool:
    """RESOURCE_EXHAUSTED only with RetryInfo: without, it is a message too large, and will be so again."""
    if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return error.retry_after_s is not None
    return error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.CANCELLED)


def backoff_s(policy: RetryPolicy, attempt: int, fraction: float) -> float:
    """Seconds to wait after the attempt-th attempt (from 1); `fraction` is uniform in [0, 1)."""
    try:
        longest_s = min(policy.max_backoff_s, policy.initial_backoff_s * policy.multiplier ** (attempt - 1))
    except OverflowError:
        longest_s = policy.max_backoff_s
    return longest_s * (1 - policy.jitter + policy.jitter * fraction)


def retry_delay_s(
    policy: RetryPolicy,
    error: RewardClientError,
    attempt: int,
    remaining_s: float,
    fraction: float,
    has_answered: bool = False,
) -> float | None:
    """Seconds to wait before the next attempt, or None to give up.

    Never earlier than the server asked for: the backoff is added to its wish, so that callers who were all told the
    same time do not all return at that time. None as well where the wait would outlast the deadline: sleeping until
    then only delays the news. `has_answered`: the endpoint, at some time before.
    """
    if not is_worth_retrying(error) or attempt >= _most_attempts(policy, error, has_answered):
        return None
    delay_s = (error.retry_after_s or 0.0) + backoff_s(policy, attempt, fraction)
    return delay_s if delay_s < remaining_s else None


def _most_attempts(policy: RetryPolicy, error: RewardClientError, has_answered: bool) -> float:
    if policy.max_attempts is not None:
        return policy.max_attempts
    will_be_back = error.retry_after_s is not None or (has_answered and not error.is_reply)
    return math.inf if will_be_back else ATTEMPTS_AT_STRANGERS
