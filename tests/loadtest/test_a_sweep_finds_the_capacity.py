import pytest
from rewardserve.loadtest.loadgen import ClosedLoop, Failure, Load, OpenLoop, Run
from rewardserve.loadtest.sweep import capacity, find_capacity, offer_shares


def run(load: Load, requests_per_s: float, failures: dict | None = None, interrupted: bool = False) -> Run:
    return Run(load, 1.0, [0.01], [0.0], failures or {}, requests_per_s, 0.0, 0.0, 1, 1, 0, interrupted)


class Server:
    """Answers `full` requests per second, each caller at most 10; refuses beyond `max_callers`."""

    def __init__(self, full: float = 100.0, max_callers: int = 10**6, stop_after: int = 10**6) -> None:
        self.full, self.max_callers, self.stop_after = full, max_callers, stop_after
        self.loads: list[Load] = []
        self.shares: list[float | None] = []

    async def __call__(self, load: Load, share: float | None) -> Run:
        self.loads.append(load)
        self.shares.append(share)
        stopped = len(self.loads) > self.stop_after
        if isinstance(load, OpenLoop):
            return run(load, load.requests_per_s, interrupted=stopped)
        refused = {"RESOURCE_EXHAUSTED": Failure(3, "full")} if load.num_callers > self.max_callers else {}
        return run(load, min(self.full, 10.0 * load.num_callers), refused, stopped)


async def test_callers_are_added_as_long_as_they_bring_more():
    server = Server()
    runs = await find_capacity(server, (4, 16, 64, 256))
    assert [load.num_callers for load in server.loads] == [4, 16, 64] and capacity(runs) == 100


async def test_a_load_that_was_refused_is_no_capacity():
    runs = await find_capacity(Server(full=10**6, max_callers=16), (4, 16, 64, 256))
    assert len(runs) == 3 and capacity(runs) == 160
    assert capacity(await find_capacity(Server(max_callers=1), (4, 16))) == 0


async def test_failures_of_single_requests_are_no_sign_of_a_full_server():
    too_long = {"OUT_OF_RANGE": Failure(1, "too long")}
    assert capacity([run(ClosedLoop(4), 40.0, too_long)]) == 40


async def test_the_open_loop_gets_its_shares_each_with_arrivals_of_its_own():
    server = Server()
    await offer_shares(server, 100.0, (0.5, 0.8), seed=7)
    assert server.shares == [0.5, 0.8]
    assert [load.requests_per_s for load in server.loads] == pytest.approx([50, 80])
    assert len({load.seed for load in server.loads}) == 2


async def test_nothing_is_begun_after_an_interruption():
    server = Server(stop_after=0)
    assert len(await find_capacity(server, (4, 16))) == 1
    assert len(await offer_shares(server, 100.0, (0.5, 0.8))) == 1
