"""Several engines serve as one: groups stay with the one that holds their prompt, and one that dies is done without."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from rewardserve.engine.base import (
    BatchReport,
    EngineGroup,
    EngineInfo,
    EngineItem,
    EngineListener,
    EngineRequest,
    EngineResult,
)
from rewardserve.engine.fake import fake_info
from rewardserve.engine.replicas import Replicas
from rewardserve.errors import EngineDied, LoadFailed, Unavailable
from rewardserve.types import EncodedGroup
from scoring import pack

INFO = fake_info(device="cuda:0", max_length=4096, prefix_cache_tokens=1000)


@dataclass
class Held:
    """An engine that answers when it is told to: with the number of its request's prompt tokens for a score."""

    info: EngineInfo = INFO
    fails_to_load: bool = False
    requests: list[EngineRequest] = field(default_factory=list)
    listener: EngineListener | None = None
    stopped: bool = False
    refuses: tuple[str, ...] = ()
    dies_of: tuple[str, ...] = ()
    slow: bool = False  # to take over weights
    slow_to_load: bool = False
    updates: list[str] = field(default_factory=list)
    in_flight: set[str] = field(default_factory=set)
    num_deaths: int = 0

    def __post_init__(self) -> None:
        self.go = asyncio.Event()

    async def start(self, listener: EngineListener) -> EngineInfo:
        if self.fails_to_load:
            raise LoadFailed("no memory for it")
        if self.slow_to_load:
            await self.go.wait()
        self.listener = listener
        return self.info

    async def score(self, request: EngineRequest) -> EngineResult:
        assert request.request_id not in self.in_flight
        self.requests.append(request)
        self.in_flight.add(request.request_id)
        num_deaths = self.num_deaths
        try:
            await self.go.wait()
        finally:
            self.in_flight.discard(request.request_id)
        if self.num_deaths > num_deaths:
            raise EngineDied("killed")
        groups = [EngineGroup((EngineItem(len(g.prompt) / 4),) * len(g.responses), 0) for g in request.groups]
        return EngineResult(tuple(groups), 0.0, 0.0)

    async def update_weights(self, source: str) -> EngineInfo:
        self.updates.append(source)
        if self.slow:
            await self.go.wait()
        if source.startswith(self.refuses):
            raise LoadFailed(f"{source}: other shapes")
        if source.startswith(self.dies_of):
            self.listener.on_down("killed")
            raise EngineDied("killed")
        self.info = replace(self.info, version=source)
        return self.info

    def die(self) -> None:
        """With all that is in flight."""
        self.num_deaths += 1
        self.listener.on_down("killed")
        self.go.set()
        self.go.clear()

    def come_back(self) -> None:
        self.listener.on_up(self.info)

    async def stop(self) -> None:
        self.stopped = True

    def restart_with(self, sources: Sequence[str]) -> None:
        self.sources = sources

    @property
    def prompts(self) -> list[int]:
        """Their lengths, in the order they came."""
        return [len(group.prompt) // 4 for request in self.requests for group in request.groups]


def group(prompt_tokens: int, response_tokens: int = 10, responses: int = 2) -> EncodedGroup:
    return EncodedGroup(pack(list(range(prompt_tokens))), (pack([1] * response_tokens),) * responses)


def request(name: str, *groups: EncodedGroup) -> EngineRequest:
    return EngineRequest(name, groups)


async def started(*engines: Held, listener: EngineListener | None = None, source: str = "v1") -> Replicas:
    replicas = Replicas(engines, source)
    await replicas.start(listener or EngineListener())
    return replicas


async def sent(replicas: Replicas, *requests: EngineRequest) -> list[asyncio.Task[EngineResult]]:
    """Calls under way."""
    calls = []
    for each in requests:
        calls.append(asyncio.create_task(replicas.score(each)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    return calls


async def test_one_that_dies_while_another_loads_is_used_when_it_has_come_back() -> None:
    a, b, down = Held(), Held(slow_to_load=True), []
    replicas = Replicas((a, b))
    start = asyncio.create_task(replicas.start(EngineListener(on_down=down.append)))
    await asyncio.sleep(0.01)
    a.die()
    a.come_back()
    a.die()
    b.go.set()
    await start
    await replicas.score(request("1", group(100)))
    assert (a.prompts, b.prompts, down) == ([], [100], [])
    a.come_back()
    await sent(replicas, request("2", group(200)))
    assert a.prompts == [200]


async def test_engines_that_find_different_checkpoints_are_no_model() -> None:
    a, b = Held(), Held(replace(INFO, version="v2"))
    with pytest.raises(LoadFailed, match="loaded v1 and v2; was it changed meanwhile"):
        await started(a, b)
    assert a.stopped and b.stopped


async def test_work_goes_to_the_engine_that_has_least() -> None:
    a, b = Held(), Held()
    replicas = await started(a, b)
    await sent(replicas, request("1", group(500)), request("2", group(100)), request("3", group(101)))
    assert (a.prompts, b.prompts) == ([500], [100, 101])


async def test_groups_stay_with_the_engine_that_has_their_prompt_until_it_has_more_to_do_than_that_is_worth() -> None:
    a, b = Held(), Held()
    a.go.set()
    b.go.set()
    replicas = await started(a, b)
    for name in "123":
        await replicas.score(request(name, group(400)))  # each ends before the next comes
    assert (a.prompts, b.prompts) == ([400] * 3, [])
    a.go.clear()
    await sent(replicas, *(request(f"more {i}", group(400, response_tokens=100)) for i in range(3)))
    # 600 tokens are under way at `a`: 400 of the prompt are less, so `b` computes the prompt once more.
    assert (a.prompts, b.prompts) == ([400] * 4, [400] * 2)


async def test_a_request_of_several_groups_is_shared_out_and_answered_in_its_order() -> None:
    a, b = Held(), Held()
    a.go.set()
    b.go.set()
    replicas = await started(a, b)
    result = await replicas.score(request("r", *(group(n, responses=n % 3 + 1) for n in (30, 10, 20, 40, 50))))
    assert a.prompts and b.prompts and sorted(a.prompts + b.prompts) == [10, 20, 30, 40, 50]
    assert [[item.score for item in g.items] for g in result.groups] == [
        [float(n)] * (n % 3 + 1) for n in (30, 10, 20, 40, 50)
    ]


async def test_an_engine_that_is_down_gets_nothing_and_the_others_go_on() -> None:
    told: list[str] = []
    listener = EngineListener(
        on_down=lambda reason: told.append(f"down: {reason}"),
        on_part_down=lambda reason: told.append(f"part: {reason}"),
        on_up=lambda info: told.append(f"up on {info.device}"),
        on_failed=lambda reason: told.append(f"failed: {reason}"),
    )
    a, b = Held(), Held(replace(INFO, device="cuda:1"))
    replicas = await started(a, b, listener=listener)
    a.listener.on_down("killed")
    await sent(replicas, *(request(str(i), group(100 + i)) for i in range(3)))
    assert (a.prompts, b.prompts) == ([], [100, 101, 102])
    b.listener.on_down("killed too")
    with pytest.raises(Unavailable, match="restarting; try again"):
        await replicas.score(request("nobody", group(5)))
    a.listener.on_up(INFO)
    b.listener.on_failed("given up")
    a.listener.on_failed("given up too")
    assert told == ["part: engine 0: killed", "down: killed too", "up on cuda:0", "failed: given up too"]


async def test_an_engine_that_comes_back_with_another_checkpoint_is_left_out() -> None:
    """Two versions under one name would be a lie in every reply."""
    a, b = Held(), Held(refuses=("v1",))
    replicas = await started(a, b)
    b.listener.on_down("killed")
    b.listener.on_up(replace(INFO, version="v2"))
    await asyncio.sleep(0)
    assert b.updates == ["v1"], "it is asked to be as the others"
    await sent(replicas, *(request(str(i), group(100 + i)) for i in range(4)))
    assert b.prompts == []


async def test_of_models_over_one_backbone_those_that_are_served_must_be_the_same_when_one_comes_back() -> None:
    """In the place of a model that was unloaded another is loaded: that is nobody's."""
    shared = replace(INFO, beside=(replace(INFO, version="w1"),))
    first, second = Held(shared), Held(shared)
    replicas = await started(first, second)
    replicas.restart_with(["a", "b"])
    replicas.restart_with(["b", "b"])
    for version, is_same in (("w1", True), ("w2", False)):
        assert first.listener is not None
        first.listener.on_down("it died")
        own = replace(INFO, version=version)
        first.listener.on_up(replace(own, beside=(own,)))
        assert replicas._replicas[0].up is is_same


async def test_what_all_have_is_told_as_of_one() -> None:
    reports: list[BatchReport] = []
    a, b = Held(), Held(replace(INFO, device="cuda:1", max_length=2048))
    replicas = Replicas([a, b])
    info = await replicas.start(EngineListener(on_batch=reports.append))
    assert (info.device, info.max_length, info.prefix_cache_tokens) == ("cuda:0,cuda:1", 2048, 2000)
    report = BatchReport(1000, 10, 100, 50, compute_s=0.5, queued_requests=3, queued_tokens=300)
    a.listener.on_batch(report)
    b.listener.on_batch(report)
    assert (reports[-1].queued_requests, reports[-1].queued_tokens, reports[-1].compute_s) == (6, 600, 0.25)


async def test_if_one_cannot_be_loaded_none_is() -> None:
    a, b = Held(), Held(fails_to_load=True)
    with pytest.raises(LoadFailed, match="no memory"):
        await Replicas([a, b]).start(EngineListener())
    assert a.stopped and b.stopped


async def test_who_leaves_takes_all_parts_of_the_request_along() -> None:
    a, b = Held(), Held()
    replicas = await started(a, b)
    (call,) = await sent(replicas, request("r", group(30), group(20)))
    assert a.requests and b.requests
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await sent(replicas, request("next", group(7)), request("and next", group(8)))
    assert len(a.requests) == len(b.requests) == 2, "nothing of the first is counted as under way"


async def test_who_leaves_before_an_engine_has_heard_of_it_leaves_nothing_behind() -> None:
    a, b = Held(), Held()
    replicas = await started(a, b)
    for _ in range(5):
        call = asyncio.create_task(replicas.score(request("r", group(1000))))
        asyncio.get_running_loop().call_soon(call.cancel)  # when it has been placed
        with pytest.raises(asyncio.CancelledError):
            await call
    assert not a.requests and not b.requests, "it did leave before"
    await sent(replicas, request("next", group(7)), request("and next", group(8)))
    assert (a.prompts, b.prompts) == ([7], [8]), "nothing is counted as under way"


async def test_what_an_engine_had_in_flight_when_it_died_is_done_by_those_that_live() -> None:
    a, b = Held(), Held()
    replicas = await started(a, b)
    (call,) = await sent(replicas, request("r", group(30), group(20)))
    assert (a.prompts, b.prompts) == ([30], [20])
    a.die()
    b.go.set()
    result = await call
    assert b.prompts == [20, 30]
    assert [[item.score for item in g.items] for g in result.groups] == [[30.0] * 2, [20.0] * 2]


async def test_what_has_moved_is_not_counted_at_the_engine_that_died() -> None:
    a, b = Held(), Held()
    replicas = await started(a, b)
    await sent(replicas, request("moves", group(1000)))
    a.die()
    await sent(replicas, request("to b", group(500)))
    a.come_back()
    await sent(replicas, request("back to a", group(100)), request("and again", group(101)))
    assert (a.prompts, b.prompts) == ([1000, 100, 101], [1000, 500])


async def test_parts_of_a_request_that_move_to_one_engine_are_told_apart() -> None:
    a, b, c = Held(), Held(), Held()
    replicas = await started(a, b, c)
    (call,) = await sent(replicas, request("r", group(30), group(20), group(10)))
    a.die()
    b.die()
    c.go.set()
    result = await call
    assert sorted(c.prompts) == [10, 20, 30] and len({each.request_id for each in c.requests}) == 3
    assert [g.items[0].score for g in result.groups] == [30.0, 20.0, 10.0]


async def test_what_was_in_flight_at_two_deaths_is_given_up() -> None:
    """It may be what kills."""
    a, b, c = Held(), Held(), Held()
    replicas = await started(a, b, c)
    (call,) = await sent(replicas, request("kills", group(30)))
    a.die()
    await asyncio.sleep(0.01)
    assert (b.prompts, c.prompts) == ([30], [])
    b.die()
    with pytest.raises(EngineDied, match="the second one with this request in flight"):
        await call
    assert c.prompts == []


async def test_where_no_engine_is_up_what_was_in_flight_waits_for_the_first_that_comes_back() -> None:
    a, b = Held(), Held()
    replicas = await started(a, b)
    calls = await sent(replicas, request("1", group(30)), request("2", group(20)))
    a.die()
    b.die()
    await asyncio.sleep(0.01)
    assert not any(call.done() for call in calls)
    b.go.set()
    b.come_back()
    results = await asyncio.gather(*calls)
    assert [result.groups[0].items[0].score for result in results] == [30.0, 20.0]


async def test_where_no_engine_comes_back_what_was_in_flight_is_given_up() -> None:
    a, b = Held(), Held()
    replicas = await started(a, b)
    (call,) = await sent(replicas, request("r", group(30)))
    a.die()
    b.die()
    a.listener.on_failed("given up")
    await asyncio.sleep(0.01)
    assert not call.done()
    b.listener.on_failed("given up too")
    with pytest.raises(EngineDied):
        await call


async def test_what_waits_for_an_engine_to_come_back_ends_when_the_model_is_unloaded() -> None:
    a, b = Held(), Held()
    replicas = await started(a, b)
    (call,) = await sent(replicas, request("r", group(30)))
    b.die()
    a.die()
    await replicas.stop()  # before the call has heard of the death
    with pytest.raises(Unavailable):
        await call


async def test_what_was_in_flight_is_not_done_by_another_version() -> None:
    a, b = Held(refuses=("v1",)), Held(refuses=("v1",))
    replicas = await started(a, b)
    (call,) = await sent(replicas, request("r", group(30)))
    for engine in (a, b):
        engine.die()
        engine.info = replace(engine.info, version="changed")
    await asyncio.sleep(0.01)
    a.come_back()
    with pytest.raises(EngineDied, match="its checkpoint has changed"):
        await call
    assert b.prompts == [] and a.prompts == [30]


async def test_weights_are_taken_over_by_all_engines() -> None:
    a, b = Held(), Held(replace(INFO, device="cuda:1"))
    replicas = await started(a, b)
    info = await replicas.update_weights("v2")
    assert (info.version, info.device) == ("v2", "cuda:0,cuda:1")
    b.listener.on_down("killed")
    with pytest.raises(Unavailable, match="restarting"):
        await replicas.update_weights("v3")
    assert a.updates == ["v2"]
    b.listener.on_up(b.info)  # with the weights it took over
    assert (await replicas.update_weights("v3")).device == "cuda:0,cuda:1"


async def test_where_one_engine_cannot_take_weights_over_all_have_what_they_had() -> None:
    a, b = Held(), Held(refuses=("v2",))
    replicas = await started(a, b)
    with pytest.raises(LoadFailed, match="v2: other shapes"):
        await replicas.update_weights("v2")
    assert (a.updates, a.info.version, b.info.version) == (["v2", "v1"], "v1", "v1")
    await sent(replicas, *(request(str(i), group(100 + i)) for i in range(2)))
    assert a.prompts and b.prompts


class Reads(Held):
    """What lies in the folder when it is its turn."""

    def __init__(self, *found: str) -> None:
        super().__init__()
        self.found = list(found)

    async def update_weights(self, source: str) -> EngineInfo:
        self.updates.append(source)
        found = self.found.pop(0)
        if not found:
            raise LoadFailed("half of a file")
        self.info = replace(self.info, version=found)
        return self.info


async def test_engines_that_read_a_folder_before_and_after_a_trainer_wrote_there_read_it_again() -> None:
    a, b = Reads("v2", "v3"), Reads("v3", "v3")
    replicas = await started(a, b, source="folder")
    assert (await replicas.update_weights("folder")).version == a.info.version == b.info.version == "v3"


@pytest.mark.parametrize(("then", "said"), [("v5", "took over v4 and v5; it is being"), ("", "half of a file")])
async def test_engines_that_never_read_the_same_go_back_and_serve_no_two_versions_as_one(then: str, said: str) -> None:
    a, b = Reads("v2", "v4", "v1"), Reads("v3", then, "v1")
    replicas = await started(a, b, source="v1")
    with pytest.raises(LoadFailed, match=said):
        await replicas.update_weights("folder")
    await sent(replicas, *(request(str(i), group(100 + i)) for i in range(2)))
    assert a.info.version == b.info.version == "v1" and a.prompts and b.prompts


async def test_where_none_can_go_back_the_model_has_failed_and_nobody_waits() -> None:
    told: list[str] = []
    a, b = Reads("v2", "v4", "v6"), Reads("v3", "v5", "v6")
    replicas = await started(a, b, source="v1", listener=EngineListener(on_failed=told.append))
    with pytest.raises(LoadFailed):
        await replicas.update_weights("folder")
    assert len(told) == 1 and "cannot go back to v1" in told[0]
    with pytest.raises(Unavailable):
        await asyncio.wait_for(replicas.score(request("1", group(100))), 5)


async def test_an_engine_that_cannot_go_back_is_left_out() -> None:
    a, b = Held(refuses=("v1",)), Held(refuses=("v2",))
    replicas = await started(a, b)
    with pytest.raises(LoadFailed, match="v2: other shapes"):
        await replicas.update_weights("v2")
    await sent(replicas, *(request(str(i), group(100 + i)) for i in range(3)))
    assert (a.prompts, len(b.prompts)) == ([], 3)


async def test_an_engine_that_died_on_its_way_back_takes_over_what_the_others_have() -> None:
    a, b = Held(dies_of=("v1",)), Held(refuses=("v2",))
    replicas = await started(a, b)
    with pytest.raises(LoadFailed, match="v2: other shapes"):
        await replicas.update_weights("v2")
    a.come_back()  # with v2, which it had taken over
    await asyncio.sleep(0)  # and dies once more
    with pytest.raises(Unavailable, match="restarting"):
        await replicas.update_weights("v3")
    await sent(replicas, request("1", group(100)))
    assert (a.prompts, b.prompts) == ([], [100])
    a.dies_of = ()
    a.come_back()
    await asyncio.sleep(0)
    assert (a.updates, a.info.version) == (["v2", "v1", "v1", "v1"], "v1")
    await sent(replicas, request("2", group(200)))
    assert a.prompts == [200]


async def test_after_both_died_the_first_to_come_back_does_not_bring_the_weights_that_were_refused() -> None:
    a, b = Held(dies_of=("v1",)), Held(dies_of=("v2",))
    replicas = await started(a, b)
    with pytest.raises(EngineDied):
        await replicas.update_weights("v2")
    a.dies_of = ()
    a.come_back()  # with v2
    await asyncio.sleep(0)
    b.come_back()  # with v1, which is what it was started with
    await sent(replicas, *(request(str(i), group(100 + i)) for i in range(2)))
    assert (a.info.version, b.info.version) == ("v1", "v1")
    assert a.prompts and b.prompts


async def test_where_all_died_and_a_checkpoint_has_changed_the_first_to_come_back_says_what_is_served() -> None:
    told: list[str] = []
    a, b = Held(refuses=("v1",)), Held(refuses=("v1",))
    listener = EngineListener(on_up=lambda info: told.append(info.version), on_failed=told.append)
    replicas = await started(a, b, listener=listener)
    for engine in (a, b):
        engine.listener.on_down("killed")
        engine.info = replace(engine.info, version="changed")
    for engine in (a, b):
        engine.come_back()
        await asyncio.sleep(0)
    await sent(replicas, *(request(str(i), group(100 + i)) for i in range(2)))
    assert a.prompts and b.prompts and told == ["changed", "changed"]


async def test_the_last_one_serves_what_it_has_and_says_so() -> None:
    told: list[str] = []
    a, b = Held(refuses=("v1",)), Held()
    listener = EngineListener(on_up=lambda info: told.append(info.version), on_failed=told.append)
    replicas = await started(a, b, listener=listener)
    a.listener.on_down("killed")
    b.listener.on_failed("given up")
    a.listener.on_up(replace(INFO, version="changed"))
    await asyncio.sleep(0)
    await sent(replicas, request("1", group(100)))
    assert a.prompts == [100] and told == ["changed"]


async def test_weights_are_taken_over_even_if_all_engines_die_right_after() -> None:
    class DiesAfterwards(Held):
        async def update_weights(self, source: str) -> EngineInfo:
            info = await super().update_weights(source)
            self.listener.on_down("killed")
            return info

    a = DiesAfterwards()
    replicas = await started(a)
    assert (await replicas.update_weights("v2")).version == "v2"
    with pytest.raises(Unavailable, match="restarting"):
        await replicas.score(request("1", group(100)))
    a.come_back()
    await sent(replicas, request("2", group(100)))
    assert a.prompts == [100]


async def test_weights_that_are_not_what_they_were_are_not_gone_back_to() -> None:
    """As where a checkpoint was written over in its folder."""
    a, b = Held(), Held(refuses=("v2",))
    replicas = await started(a, b, source="folder")
    with pytest.raises(LoadFailed, match="v2: other shapes"):
        await replicas.update_weights("v2")
    await sent(replicas, *(request(str(i), group(100 + i)) for i in range(3)))
    assert (a.info.version, a.prompts, len(b.prompts)) == ("folder", [], 3)


async def test_an_engine_that_was_left_out_takes_part_again_once_it_is_as_the_others() -> None:
    a, b = Held(refuses=("v1",)), Held(refuses=("v2",))
    replicas = await started(a, b)
    with pytest.raises(LoadFailed):
        await replicas.update_weights("v2")  # `a` has it, and cannot go back
    b.refuses = ()
    await replicas.update_weights("v2")
    a.listener.on_up(a.info)  # it was restarted with what it has
    await replicas.update_weights("v3")
    assert (a.info.version, b.info.version) == ("v3", "v3")


async def test_an_engine_that_dies_while_the_others_take_weights_over_is_judged_afterwards() -> None:
    a, b = Held(), Held(slow=True)
    replicas = await started(a, b)
    updating = asyncio.create_task(replicas.update_weights("v2"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert a.info.version == "v2"
    a.listener.on_down("killed")
    a.listener.on_up(a.info)  # with the new weights, which `b` does not have yet
    b.go.set()
    assert (await updating).device == "cuda:0,cuda:0"
    a.go.clear()
    await sent(replicas, request("1", group(100)))
    assert a.prompts == [100]
