"""Who is served next."""

from rewardserve.engine.native.fair_queue import MAX_CLIENTS, FairQueue


class Work:
    def __init__(self, client: str, cost: int) -> None:
        self.client, self.cost, self.left = client, cost, cost


def queue_of(*works: Work, quantum: int = 100, priority: int = 0) -> FairQueue[Work]:
    queue: FairQueue[Work] = FairQueue(quantum)
    for work in works:
        queue.add(work, work.client, work.cost, priority)
    return queue


def serve(queue: FairQueue[Work], quantum: int = 100) -> Work:
    """Serves one quantum of what is next."""
    work = queue.peek()
    assert work is not None
    served = min(work.left, quantum)
    work.left -= served
    if work.left:
        queue.charge(work, served)
    else:
        queue.remove(work)
    return work


def test_equal_work_is_served_in_the_order_it_came() -> None:
    works = [Work("a", 50), Work("b", 50), Work("c", 50)]
    queue = queue_of(*works)
    assert [serve(queue) for _ in works] == works
    assert queue.peek() is None


def test_a_small_request_does_not_wait_behind_anothers_huge_one() -> None:
    huge, small = Work("a", 1_000_000), Work("b", 10)
    queue = queue_of(huge)
    for _ in range(50):
        serve(queue)
    queue.add(small, "b", small.cost, 0)
    assert small in [serve(queue) for _ in range(2)]


def test_a_stream_of_small_requests_does_not_starve_a_huge_one() -> None:
    huge = Work("a", 100_000)
    queue = queue_of(huge)
    served = 0
    for _ in range(2000):
        while len(queue) < 5:
            small = Work("b", 100)
            queue.add(small, "b", 100, 0)
        served += serve(queue) is huge
    assert served >= 999, "half of the service is its share"


def test_a_client_with_many_requests_gets_no_more_than_one_with_few() -> None:
    queue = queue_of(*[Work("many", 100) for _ in range(1000)], *[Work("few", 100) for _ in range(20)])
    first = [serve(queue).client for _ in range(40)]
    assert first.count("few") == 20


def test_higher_priority_goes_first_whoever_came_before() -> None:
    low = [Work("a", 10) for _ in range(3)]
    queue = queue_of(*low)
    urgent = Work("a", 10)
    queue.add(urgent, "a", 10, priority=5)
    assert serve(queue) is urgent


def test_an_idle_queue_owes_nobody_anything() -> None:
    first = Work("a", 1_000_000)
    queue = queue_of(first)
    while queue.peek():
        serve(queue)
    late, other = Work("a", 100), Work("b", 100)
    queue.add(late, "a", 100, 0)
    queue.add(other, "b", 100, 0)
    assert serve(queue) is late


def test_removed_work_is_never_served() -> None:
    works = [Work("a", 10) for _ in range(10)]
    queue = queue_of(*works)
    for work in works[::2]:
        queue.remove(work)
    assert [serve(queue) for _ in range(5)] == works[1::2]
    assert len(queue) == 0


def test_clients_that_were_served_are_forgotten_however_busy_the_queue() -> None:
    """Every connection is a client of its own; a server under constant load would remember each for ever."""
    queue: FairQueue[object] = FairQueue(quantum=10)
    for number in range(3 * MAX_CLIENTS):
        queue.add(object(), f"client-{number}", 10, 0)
        if number > 5:
            served = queue.peek()
            assert served is not None
            queue.remove(served)
    assert len(queue) > 0
    assert len(queue._client_finish) <= MAX_CLIENTS
