"""The control plane: load, list, get, unload, and who may."""

import asyncio
import gc

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rewardserve.app import App
from rewardserve.config import ServeConfig
from rewardserve.engine.fake import FakeEngine, fake_info
from rewardserve.errors import LoadFailed
from rewardserve.transport import grpc_server
from rewardserve.v1 import models_pb2, models_pb2_grpc, scoring_pb2_grpc

Code = grpc.StatusCode
Load, Unload, Get = models_pb2.LoadModelRequest, models_pb2.UnloadModelRequest, models_pb2.GetModelRequest
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
REASON = "/broken/x: the scalar head 'score.weight' is not among the weights"


@pytest.fixture
async def controlled(serve, kit):
    broken = {"/broken/x": LoadFailed(REASON)}
    async with serve(kit.text_spec(), allow_model_control=True, broken=broken) as served:
        yield served


async def names(served):
    return sorted(model.name for model in (await served.models.List(models_pb2.ListModelsRequest())).models)


async def test_load_and_unload_are_denied_unless_allowed(served, kit):
    for call in (served.models.Load(Load(name="n", source="/x")), served.models.Unload(Unload(name="m"))):
        error = await kit.refused(call)
        assert error.code is Code.PERMISSION_DENIED and "--allow-model-control" in error.message
    assert await names(served) == ["m"]
    await served.good()


async def test_a_model_is_loaded_listed_got_and_unloaded(controlled, kit):
    loaded = await controlled.models.Load(Load(name="second", source="/somewhere"))
    assert (loaded.name, loaded.source, loaded.state) == ("second", "/somewhere", models_pb2.MODEL_STATE_SERVING)
    assert await names(controlled) == ["m", "second"]
    assert await controlled.models.Get(Get(name="second")) == loaded
    await controlled.scoring.Score(kit.ids_request([1], [[2]], model="second"))
    await controlled.models.Unload(Unload(name="second"))
    assert await names(controlled) == ["m"]
    assert controlled.engines["second"].num_stopped == 1
    for call in (
        controlled.models.Get(Get(name="second")),
        controlled.models.Unload(Unload(name="second")),
        controlled.scoring.Score(kit.ids_request([1], [[2]], model="second")),
    ):
        assert (await kit.refused(call)).code is Code.NOT_FOUND
    await controlled.good()


async def test_get_tells_what_was_loaded(controlled):
    model = await controlled.models.Get(Get(name="m"))
    assert (model.version, model.architecture, model.path) == (
        "v1",
        "FakeForSequenceClassification",
        models_pb2.EXECUTION_PATH_PACKED,
    )
    assert (model.max_length, model.vocab_size, model.num_parameters) == (64, 258, 7)
    assert (model.has_tokenizer, model.has_chat_template, model.prompt_tokenized_once) == (True, True, True)
    assert await controlled.models.Get(Get()) == model  # the only one needs no name


async def test_a_taken_name_already_exists(controlled, kit):
    error = await kit.refused(controlled.models.Load(Load(name="m", source="/somewhere")))
    assert error.code is Code.ALREADY_EXISTS and "'m'" in error.message
    await controlled.good()


async def test_a_checkpoint_that_cannot_be_served_says_why_and_leaves_nothing(controlled, kit):
    error = await kit.refused(controlled.models.Load(Load(name="x", source="/broken/x")))
    assert (error.code, error.message) == (Code.FAILED_PRECONDITION, REASON)
    assert await names(controlled) == ["m"]
    assert (await controlled.models.Load(Load(name="x", source="/whole"))).name == "x"  # the name is free
    await controlled.good()


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("name", Load(source="/x")),
        ("name", Load(name="a/b", source="/x")),
        ("source", Load(name="n")),
        ("dtype", Load(name="n", source="/x", dtype="int4")),
    ],
)
async def test_a_malformed_load_names_its_field(controlled, kit, field, request_):
    error = await kit.refused(controlled.models.Load(request_))
    assert (error.code, error.fields) == (Code.INVALID_ARGUMENT, [field])


async def test_unloading_finishes_what_is_in_flight_and_admits_nothing_new(controlled, kit):
    controlled.engine.hold()
    score = asyncio.ensure_future(as_task(controlled.scoring.Score(kit.ids_request([1], [[2]], model="m"))))
    await kit.eventually(lambda: controlled.engine.num_in_flight == 1)
    unload = asyncio.ensure_future(as_task(controlled.models.Unload(Unload(name="m"))))
    model = controlled.app.registry.get("m")
    await kit.eventually(lambda: model.state.value == "draining")
    error = await kit.refused(controlled.scoring.Score(kit.ids_request([1], [[2]], model="m")))
    assert error.code is Code.UNAVAILABLE and "unloaded" in error.message
    assert not unload.done()
    controlled.engine.release()
    assert (await score).groups[0].items[0].HasField("score")
    await unload
    assert await names(controlled) == []


async def test_unloading_twice_at_once_is_not_our_internal_error(controlled, kit):
    controlled.engine.hold()
    score = asyncio.ensure_future(as_task(controlled.scoring.Score(kit.ids_request([1], [[2]], model="m"))))
    await kit.eventually(lambda: controlled.engine.num_in_flight == 1)
    both = [asyncio.ensure_future(as_task(controlled.models.Unload(Unload(name="m")))) for _ in range(2)]
    await asyncio.sleep(0.1)
    controlled.engine.release()
    await score
    ends = await asyncio.gather(*both, return_exceptions=True)
    codes = {end.code() for end in ends if isinstance(end, grpc.RpcError)}
    assert codes <= {Code.NOT_FOUND, Code.UNAVAILABLE, Code.FAILED_PRECONDITION}
    assert await names(controlled) == []


async def test_unloading_what_is_still_loading_leaves_no_engine_behind(controlled, kit):
    load = asyncio.ensure_future(as_task(controlled.models.Load(Load(name="late", source="/slow/late"))))
    await kit.eventually(lambda: "late" in controlled.engines)
    late = controlled.engines["late"]
    unload = asyncio.ensure_future(as_task(controlled.models.Unload(Unload(name="late"))))
    await asyncio.sleep(0.1)
    late.start_gate.set()
    ends = await asyncio.gather(load, unload, return_exceptions=True)
    codes = {end.code() for end in ends if isinstance(end, grpc.RpcError)}
    assert codes <= {Code.FAILED_PRECONDITION, Code.UNAVAILABLE}
    listed = await names(controlled)
    assert late._running == ("late" in listed), "an engine runs that no one can reach"


async def test_a_caller_who_leaves_does_not_leave_half_a_model(controlled, kit):
    load = controlled.models.Load(Load(name="late", source="/slow/late"))
    await kit.eventually(lambda: "late" in controlled.engines)
    load.cancel()
    controlled.engines["late"].start_gate.set()
    await kit.eventually(lambda: controlled.app.registry.get("late").state.value == "serving")
    reply = await controlled.scoring.Score(kit.ids_request([1], [[2]], model="late"))
    assert reply.groups[0].items[0].HasField("score")


async def test_what_fails_when_its_caller_has_left_is_a_line_in_the_log(caplog):
    go = asyncio.Event()

    async def load() -> None:
        await go.wait()
        raise LoadFailed(REASON)

    caller = asyncio.create_task(grpc_server._to_its_end(load()))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    go.set()
    async with asyncio.timeout(5):
        while not caplog.records:
            await asyncio.sleep(0)
    gc.collect()
    assert [record.message for record in caplog.records] == [f"what a caller asked for, who has left, failed: {REASON}"]


async def test_a_model_that_is_loading_is_unavailable_while_others_are_served(controlled, kit):
    load = asyncio.ensure_future(as_task(controlled.models.Load(Load(name="late", source="/slow/late"))))
    await kit.eventually(lambda: "late" in controlled.engines)
    error = await kit.refused(controlled.scoring.Score(kit.ids_request([1], [[2]], model="late")))
    assert error.code is Code.UNAVAILABLE and "loading" in error.message
    await controlled.good()
    controlled.engines["late"].start_gate.set()
    await load


class SlowEngine(FakeEngine):
    def __init__(self, may_start: asyncio.Event) -> None:
        super().__init__(fake_info())
        self._may_start = may_start

    async def start(self, listener):
        await self._may_start.wait()
        return await super().start(listener)


async def test_a_model_whose_turn_to_be_loaded_has_not_come_is_away_and_not_unknown(kit):
    """A client goes on asking a server that was replaced, unless it is told that there is no such model."""
    may_start = asyncio.Event()
    config = ServeConfig(model=["a=/a", "b=/b"], ensemble=["both=mean(a+b)"], port=0, metrics_port=-1)
    app = App(config, lambda *of: SlowEngine(may_start))
    starting = asyncio.create_task(app.start())
    await kit.eventually(lambda: app.port)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        score, models = scoring_pb2_grpc.ScoringStub(channel).Score, models_pb2_grpc.ModelsStub(channel)
        for name in ("a", "b", "both"):
            error = await kit.refused(score(kit.ids_request([1], [[2]], model=name), wait_for_ready=True))
            assert (error.code, error.retry_after_s) == (Code.UNAVAILABLE, 1.0), name
        listed = (await models.List(models_pb2.ListModelsRequest())).models
        assert {model.name: model.state for model in listed} == dict.fromkeys(
            ("a", "b", "both"), models_pb2.MODEL_STATE_LOADING
        )
        may_start.set()
        await starting
        for name in ("a", "b", "both"):
            assert (await score(kit.ids_request([1], [[2]], model=name))).model.name == name
    await app.stop()


@pytest.mark.parametrize("name", ["a", "b"])
async def test_a_model_unloaded_while_the_server_starts_does_not_end_the_server(kit, name: str):
    """The first is loading, and the other's turn has not come."""
    may_start, engines = asyncio.Event(), {}

    def make_engine(name: str, *of: str) -> FakeEngine:
        engines[name] = SlowEngine(may_start)
        return engines[name]

    options = {"allow_model_control": True, "port": 0, "metrics_port": -1}
    app = App(ServeConfig(model=["a=/a", "b=/b"], **options), make_engine)
    starting = asyncio.create_task(app.start())
    await kit.eventually(lambda: app.port)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        models = models_pb2_grpc.ModelsStub(channel)
        await models.Unload(Unload(name=name), wait_for_ready=True)
        may_start.set()
        await starting
        (left,) = (await models.List(models_pb2.ListModelsRequest())).models
        assert left.name != name and left.state == models_pb2.MODEL_STATE_SERVING
        assert not engines[name]._running
    await app.stop()


async def test_health_follows_each_model(controlled, kit):
    health = health_pb2_grpc.HealthStub(controlled.channel)

    async def check(service):
        return (await health.Check(health_pb2.HealthCheckRequest(service=service))).status

    assert await check("") == await check("rewardserve.v1.Scoring/m") == SERVING
    assert (
        await kit.refused(health.Check(health_pb2.HealthCheckRequest(service="rewardserve.v1.Scoring/late")))
    ).code is Code.NOT_FOUND
    watch = health.Watch(health_pb2.HealthCheckRequest(service="rewardserve.v1.Scoring/late"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    load = asyncio.ensure_future(as_task(controlled.models.Load(Load(name="late", source="/slow/late"))))
    assert (await asyncio.wait_for(watch.read(), 20)).status == NOT_SERVING
    controlled.engines["late"].start_gate.set()
    await load
    assert (await asyncio.wait_for(watch.read(), 20)).status == SERVING
    await controlled.models.Unload(Unload(name="late"))
    assert (await asyncio.wait_for(watch.read(), 20)).status == NOT_SERVING
    await kit_until(lambda: check(""), SERVING)
    watch.cancel()


async def test_health_watch_hears_of_draining(served):
    health = health_pb2_grpc.HealthStub(served.channel)
    watches = [
        health.Watch(health_pb2.HealthCheckRequest(service=service)) for service in ("", "rewardserve.v1.Scoring/m")
    ]
    assert [(await watch.read()).status for watch in watches] == [SERVING, SERVING]
    draining = asyncio.create_task(served.app.drain())
    assert [(await asyncio.wait_for(watch.read(), 20)).status for watch in watches] == [NOT_SERVING, NOT_SERVING]
    await draining


async def test_health_watch_goes_on_for_others_when_one_leaves(served):
    health = health_pb2_grpc.HealthStub(served.channel)
    leaving, staying = (health.Watch(health_pb2.HealthCheckRequest()) for _ in range(2))
    assert [(await watch.read()).status for watch in (leaving, staying)] == [SERVING, SERVING]
    leaving.cancel()
    await asyncio.sleep(0.1)  # until the server has heard of it
    draining = asyncio.create_task(served.app.drain())
    assert (await asyncio.wait_for(staying.read(), 20)).status == NOT_SERVING
    await draining


async def test_loading_one_more_model_does_not_take_the_server_out_of_service(controlled, kit):
    """A load balancer asks for "": the models that are served must stay reachable for the minutes a load takes."""
    health = health_pb2_grpc.HealthStub(controlled.channel)
    load = asyncio.ensure_future(as_task(controlled.models.Load(Load(name="late", source="/slow/late"))))
    await kit.eventually(lambda: "late" in controlled.engines)
    await asyncio.sleep(0.05)
    status = (await health.Check(health_pb2.HealthCheckRequest())).status
    controlled.engines["late"].start_gate.set()
    await load
    assert status == SERVING


async def kit_until(ask, wanted):
    async with asyncio.timeout(20):
        while await ask() != wanted:
            await asyncio.sleep(0.01)


async def as_task(call):
    return await call
