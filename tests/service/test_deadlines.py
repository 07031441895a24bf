"""One timer for all deadlines: each is kept, none is kept for nothing, and no other cancellation is taken for one."""

import asyncio
import random
import time

import pytest
from rewardserve.errors import DeadlineExceeded
from rewardserve.service.deadlines import MAX_STALE_TICKS, Deadlines


async def wait(deadlines: Deadlines, deadline: float | None, seconds: float) -> str:
    try:
        with deadlines.until(deadline):
            await asyncio.sleep(seconds)
    except DeadlineExceeded:
        return "passed"
    return "done"


async def test_whoever_is_late_is_given_up_and_nobody_else() -> None:
    deadlines, now = Deadlines(), time.monotonic()
    numbers = random.Random(0)
    late = [wait(deadlines, now + numbers.uniform(0, 0.2), 60) for _ in range(100)]
    early = [wait(deadlines, now + numbers.uniform(60, 90), numbers.uniform(0, 0.2)) for _ in range(100)]
    free = [wait(deadlines, None, 0.1) for _ in range(10)]
    async with asyncio.timeout(30):
        ends = await asyncio.gather(*late, *early, *free)
    assert ends == ["passed"] * 100 + ["done"] * 110


async def test_a_nearer_deadline_is_noticed_after_a_farther_one() -> None:
    deadlines = Deadlines()
    far = asyncio.create_task(wait(deadlines, time.monotonic() + 60, 60))
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        assert await wait(deadlines, time.monotonic() + 0.02, 60) == "passed"
    far.cancel()
    with pytest.raises(asyncio.CancelledError):
        await far


async def test_a_deadline_in_the_past_begins_nothing() -> None:
    begun = False
    with pytest.raises(DeadlineExceeded), Deadlines().until(time.monotonic() - 1):
        begun = True
    assert not begun


async def test_what_is_raised_inside_comes_out_as_it_is() -> None:
    deadlines = Deadlines()
    with pytest.raises(KeyError), deadlines.until(time.monotonic() + 60):
        raise KeyError
    with pytest.raises(ValueError), deadlines.until(None):
        raise ValueError


async def test_a_task_that_was_given_up_can_go_on_waiting() -> None:
    """The cancellation is used up, as asyncio.timeout's is."""
    deadlines = Deadlines()
    assert await wait(deadlines, time.monotonic() + 0.02, 60) == "passed"
    assert asyncio.current_task().cancelling() == 0
    assert await wait(deadlines, time.monotonic() + 60, 0.01) == "done"


async def test_deadlines_that_were_met_leave_nothing_behind() -> None:
    deadlines, now = Deadlines(), time.monotonic()
    for number in range(5 * MAX_STALE_TICKS):
        assert await wait(deadlines, now + 60 + number, 0) == "done"
    assert not deadlines._waiting
    assert len(deadlines._ticks) <= MAX_STALE_TICKS
