"""Finds a server's capacity by a closed loop, then offers shares of it by an open loop: latency against load."""

from collections.abc import Awaitable, Callable, Sequence

from rewardserve.loadtest.loadgen import ClosedLoop, Load, OpenLoop, Run

CALLERS = (4, 16, 64, 256)
SHARES = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95)
GAIN = 1.05  # more callers are tried as long as they bring as much more
FULL = frozenset({"RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"})  # a server that says so is past capacity

Measure = Callable[[Load, float | None], Awaitable[Run]]  # load, share of the capacity


async def find_capacity(measure: Measure, callers: Sequence[int] = CALLERS) -> list[Run]:
    """Ends where more callers bring no more, or the server refuses; a run that was interrupted is the last."""
    runs: list[Run] = []
    for number in callers:
        best = capacity(runs)
        runs.append(await measure(ClosedLoop(number), None))
        if runs[-1].interrupted or _is_past_capacity(runs[-1]) or capacity(runs) < best * GAIN:
            break
    return runs


def capacity(runs: Sequence[Run]) -> float:
    """Requests per second, of the best run in which the server took everything; 0 if there is none."""
    return max((run.requests_per_s for run in runs if not _is_past_capacity(run)), default=0.0)


async def offer_shares(measure: Measure, full: float, shares: Sequence[float] = SHARES, seed: int = 0) -> list[Run]:
    """An open loop at each share of `full`, requests per second; a run that was interrupted is the last."""
    runs: list[Run] = []
    for number, share in enumerate(shares):
        runs.append(await measure(OpenLoop(share * full, seed + number), share))
        if runs[-1].interrupted:
            break
    return runs


def _is_past_capacity(run: Run) -> bool:
    return not FULL.isdisjoint(run.failures)
