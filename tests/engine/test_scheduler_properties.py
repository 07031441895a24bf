"""Whatever comes in whatever order: every block is accounted for, every request ends once, every score is true."""

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from rewardserve.engine.base import EngineRequest
from rewardserve.engine.native.block_pool import BlockPool
from rewardserve.engine.native.prefix_cache import PrefixCache
from rewardserve.engine.native.scheduler import Outcome, Scheduler
from rewardserve.engine.native.sequence import BatchPlan
from rewardserve.models.reads import Pattern, ReadAt, Reader, ReadPlan
from rewardserve.types import EncodedGroup, ItemCode, ItemFailure
from rewardserve_kernels.ragged import BLOCK_TOKENS
from toy_model import ToyModel, true_score

MOST_TOKENS = 420
TOKENS = np.random.default_rng(0).integers(0, 50, 4 * MOST_TOKENS).astype("<i4")
lengths = st.integers(0, MOST_TOKENS)


@st.composite
def groups(draw) -> EncodedGroup:
    """Prompts are beginnings of three texts, so that they often share blocks; responses come from anywhere."""
    text = draw(st.integers(0, 2)) * 7
    prompt = TOKENS[text : text + draw(lengths)]
    responses = []
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, MOST_TOKENS))
        responses.append(TOKENS[start : start + draw(st.integers(1, MOST_TOKENS // 2))].tobytes())
    steps: list[tuple[int, ...]] = []
    if draw(st.booleans()):  # the request says where it wants to be read
        for response in responses:
            positions = st.integers(0, len(prompt) + len(response) // 4 - 1)
            steps.append(tuple(sorted(draw(st.sets(positions, min_size=1, max_size=5)))))
    return EncodedGroup(prompt.tobytes(), tuple(responses), tuple(steps))


AT_BORDER = 2 * BLOCK_TOKENS - 1  # a pattern that begins in one block of the first text and ends in the next
READ_PLANS = {
    "last": ReadPlan(),
    "first": ReadPlan(ReadAt.FIRST),
    "every tag": ReadPlan(ReadAt.EVERY, Pattern((int(TOKENS[5]),))),
    "begins before": ReadPlan(ReadAt.EVERY, Pattern(tuple(TOKENS[AT_BORDER - 1 : AT_BORDER + 2].tolist()))),
    "ends after": ReadPlan(ReadAt.EVERY, Pattern(tuple(TOKENS[AT_BORDER : AT_BORDER + 2].tolist()), offset=1)),
}


def true_steps(plan: ReadPlan, tokens: bytes, named: tuple[int, ...], variant: int) -> list[float]:
    """What is read of a sequence, position by position; empty if there is nothing to read."""
    ids = np.frombuffer(tokens, "<i4").tolist()
    if named:
        positions = list(named)
    elif plan.at is ReadAt.FIRST:
        positions = [0]
    elif plan.pattern is None:
        positions = [len(ids) - 1]
    else:
        wanted = list(plan.pattern.ids)
        starts = [i for i in range(len(ids)) if ids[i : i + len(wanted)] == wanted]
        positions = [start + plan.pattern.offset for start in starts]
    return [true_score(tokens[: 4 * (position + 1)], variant) for position in positions]


class SchedulerMachine(RuleBasedStateMachine):
    """Drives scheduler and cache as the engine does: at most two forwards scheduled, run in their order."""

    @initialize(
        num_blocks=st.integers(6, 10),
        tokens=st.integers(20, 600),
        chunks=st.integers(1, 20),
        cached=st.booleans(),
        host_slots=st.sampled_from([0, 1, 2, 5]),
        read=st.lists(st.sampled_from(sorted(READ_PLANS)), min_size=1, max_size=4),
        trunks=st.lists(st.booleans(), min_size=4, max_size=4),
    )
    def start(
        self,
        num_blocks: int,
        tokens: int,
        chunks: int,
        cached: bool,
        host_slots: int,
        read: list[str],
        trunks: list[bool],
    ) -> None:
        """`trunks`: whether a model's backbone computes what the first one's does."""
        self.read_plans = [READ_PLANS[name] for name in read]
        readers = [Reader(plan) for plan in self.read_plans]
        trunk_of = [0 if variant == 0 or same else 1 for variant, same in zip(range(len(read)), trunks, strict=False)]
        trunk_of = [trunk_of.index(trunk) for trunk in trunk_of]
        self.now = 0.0
        self.cache = PrefixCache(BlockPool(num_blocks), host_slots) if cached else None
        self.scheduler = Scheduler(self.cache, tokens, chunks, lambda: self.now, readers, trunk_of)
        self.model = ToyModel(num_blocks, trunk_of)
        self.plans: list[BatchPlan] = []
        self.requests: dict[str, EngineRequest] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.failed_by_us: set[tuple[int, bytes]] = set()

    @rule(
        members=st.lists(groups(), min_size=1, max_size=3),
        client=st.sampled_from("ab"),
        priority=st.integers(-1, 1),
        patience=st.none() | st.floats(0, 10),
        variant=st.integers(0, 3),
    )
    def add(
        self, members: list[EncodedGroup], client: str, priority: int, patience: float | None, variant: int
    ) -> None:
        deadline = None if patience is None else self.now + patience
        variant %= len(self.read_plans)
        request = EngineRequest(f"r{len(self.requests)}", tuple(members), priority, deadline, client, variant)
        self.requests[request.request_id] = request
        self.scheduler.add(request)

    @precondition(lambda self: len(self.plans) < 2)
    @rule()
    def schedule(self) -> None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.plans.append(plan)

    @precondition(lambda self: self.plans)
    @rule()
    def complete(self) -> None:
        plan = self.plans.pop(0)
        self.scheduler.begin(plan)
        self.scheduler.complete(plan, self.model.run(plan))

    @precondition(lambda self: self.plans)
    @rule(half_run=st.booleans(), split=st.booleans(), fatal=st.booleans())
    def fail(self, half_run: bool, split: bool, fatal: bool) -> None:
        """The oldest forward fails, perhaps after it had written something; what is behind it is not run."""
        plan = self.plans[0]
        self.plans.clear()
        if half_run:
            self.model.run(plan)
        self.scheduler.rollback()
        if split and self.scheduler.split(plan):
            return
        if fatal:
            for chunk in plan.chunks:
                sequences = chunk.group.sequences if chunk.sequence is None else [chunk.sequence]
                self.failed_by_us.update((plan.variant, chunk.group.prompt + s.tokens) for s in sequences)
            self.scheduler.fail(plan, ItemFailure(ItemCode.INTERNAL, "planned"))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.scheduler.cancel(data.draw(st.sampled_from(sorted(self.requests))))

    @rule(seconds=st.floats(0, 5))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def forget_the_cache(self) -> None:
        """Publishing is an optimisation: without what was published, what is under way still comes out right."""
        if self.cache is not None and not self.plans:
            self.cache.clear()

    @invariant()
    def everything_is_accounted_for(self) -> None:
        self.scheduler.check()
        for outcome in self.scheduler.take_outcomes():
            assert outcome.request_id not in self.outcomes, "a request ended twice"
            self.outcomes[outcome.request_id] = outcome
            if outcome.result is not None:
                self.check_scores(outcome)

    def check_scores(self, outcome: Outcome) -> None:
        request = self.requests[outcome.request_id]
        read_plan = self.read_plans[request.variant]
        for encoded, scored in zip(request.groups, outcome.result.groups, strict=True):
            named = encoded.steps or [()] * len(encoded.responses)
            for response, where, item in zip(encoded.responses, named, scored.items, strict=True):
                tokens = encoded.prompt + response
                steps = true_steps(read_plan, tokens, where, request.variant)
                if item.score is None:
                    assert (request.variant, tokens) in self.failed_by_us or not steps
                elif where or read_plan.at is ReadAt.EVERY:
                    assert list(item.steps) == steps and item.score == min(steps)
                else:
                    assert [item.score] == steps and not item.steps

    def teardown(self) -> None:
        """Everything left is run to its end."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(10_000):
            self.everything_is_accounted_for()
            if len(self.plans) < 2:
                self.schedule()
            if not self.plans:
                break
            self.complete()
        self.everything_is_accounted_for()
        assert self.scheduler.idle
        assert set(self.outcomes) == set(self.requests), "a request never ended"
        if self.cache is not None:
            self.cache.clear()
            assert self.cache.pool.num_free == self.cache.pool.num_blocks, "a block leaked"


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, suppress_health_check=list(HealthCheck)
)
TestSchedulerProperties = SchedulerMachine.TestCase
