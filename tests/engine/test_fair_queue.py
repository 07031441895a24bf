"""Who is served next."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from rewardserve.engine.native.fair_queue import MAX_CLIENTS, FairQueue

QUANTUM = 100
costs = st.sampled_from([1, 10, 30, 60, 100, 150, 250])
clients = st.sampled_from("ab")


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
    queue.charge(work, served)
    if not work.left:
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


def test_what_waited_and_was_dropped_costs_its_client_nothing() -> None:
    queue = queue_of(*[Work("b", 100) for _ in range(20)])
    dropped = [Work("a", 100) for _ in range(50)]
    for work in dropped:
        queue.add(work, "a", work.cost, 0)
    for work in dropped:
        queue.remove(work)
    for _ in range(20):
        queue.add(Work("a", 100), "a", 100, 0)
    assert Counter(serve(queue).client for _ in range(20)) == {"a": 10, "b": 10}


def test_what_a_client_was_served_at_another_priority_does_not_count() -> None:
    """Nor does it count that the others waited meanwhile: who comes now has the same share as they."""
    queue = queue_of(*[Work("waits", 100) for _ in range(20)])
    for _ in range(50):
        queue.add(Work("hurries", 100), "hurries", 100, priority=1)
        serve(queue)
    for client in ("hurries", "comes now"):
        for _ in range(20):
            queue.add(Work(client, 100), client, 100, 0)
    assert Counter(serve(queue).client for _ in range(30)) == {"waits": 10, "hurries": 10, "comes now": 10}


def test_what_is_given_back_was_not_paid_and_is_the_first_of_its_client_again() -> None:
    first, second, *others = Work("a", 100), Work("a", 100), *[Work("b", 100) for _ in range(3)]
    queue = queue_of(first, second, *others)
    assert serve(queue) is first
    first.left = 100
    queue.add(first, "a", 100, 0)
    queue.give_back(first, 100, 100)
    assert [serve(queue) for _ in range(4)] == [others[0], first, second, others[1]]


class Backlog:
    """Two clients that always have two items waiting, at least, and what they were served."""

    def __init__(self) -> None:
        self.queue: FairQueue[Work] = FairQueue(QUANTUM)
        self.served = Counter(a=0, b=0)
        self.history: list[tuple[Work, int]] = []
        for client in "aabb":
            self.come(client, QUANTUM)

    def come(self, client: str, cost: int) -> None:
        self.queue.add(Work(client, cost), client, cost, 0)

    def serve(self, cost_of_next: int) -> None:
        work = self.queue.peek()
        assert work is not None
        self.come(work.client, cost_of_next)
        before = work.left
        assert serve(self.queue, QUANTUM) is work
        self.served[work.client] += before - work.left
        self.history.append((work, before - work.left))

    def drop(self, client: str, index: int, cost_of_next: int) -> None:
        self.come(client, cost_of_next)
        waiting = [work for work in self.queue if work.client == client]
        self.queue.remove(waiting[index % len(waiting)])

    def fail(self, how_many: int) -> None:
        """The last ones that were served were not, after all."""
        for _ in range(min(how_many, len(self.history))):
            work, tokens = self.history.pop()
            self.served[work.client] -= tokens
            work.left += tokens
            if work not in self.queue:
                self.queue.add(work, work.client, work.left, 0)
            self.queue.give_back(work, tokens, work.left)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just(Backlog.serve), costs),
            st.tuples(st.just(Backlog.come), clients, costs),
            st.tuples(st.just(Backlog.drop), clients, st.sampled_from([0, 0, 1, 5]), costs),
            st.tuples(st.just(Backlog.fail), st.integers(1, 3)),
        ),
        max_size=200,
    )
)
def test_clients_that_always_have_work_are_served_the_same_whatever_is_dropped_or_fails(steps: list[tuple]) -> None:
    backlog = Backlog()
    for step, *arguments in steps:
        step(backlog, *arguments)
        assert abs(backlog.served["a"] - backlog.served["b"]) <= QUANTUM


def test_a_client_whose_next_item_is_always_dropped_is_owed_its_share_by_those_that_follow() -> None:
    backlog = Backlog()
    for _ in range(300):
        backlog.drop("a", 0, QUANTUM)
        backlog.serve(10)
        assert abs(backlog.served["a"] - backlog.served["b"]) <= QUANTUM


def test_what_was_dropped_is_not_remembered_while_others_are_served() -> None:
    queue = queue_of(Work("first", 10), priority=1)
    for _ in range(10_000):
        gone = Work("gone", 10)
        queue.add(gone, "gone", 10, 0)
        queue.remove(gone)
    assert len(queue._heap) < 100


def test_clients_that_were_served_are_forgotten_however_busy_the_queue() -> None:
    """Every connection is a client of its own; a server under constant load would remember each for ever."""
    queue: FairQueue[object] = FairQueue(quantum=10)
    for number in range(3 * MAX_CLIENTS):
        queue.add(object(), f"client-{number}", 10, 0)
        if number > 5:
            served = queue.peek()
            assert served is not None
            queue.charge(served, 10)
            queue.remove(served)
    assert len(queue) > 0
    assert len(queue._finish) <= MAX_CLIENTS
