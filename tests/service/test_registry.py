"""Models by name: what is served, what is not, and what is left behind."""

import asyncio
import dataclasses

import pytest
from rewardserve.engine.base import BatchReport
from rewardserve.errors import (
    Draining,
    InvalidRequest,
    LoadFailed,
    ModelExists,
    ModelNotFound,
    SwapRefused,
    Unavailable,
)
from rewardserve.evaluation import calibration_file
from rewardserve.evaluation.calibration_file import BESIDE, Origin, Temperature
from rewardserve.service.finish import Finishing
from rewardserve.service.live_model import ModelState
from rewardserve.service.swap import SwapPlan, rollback, swap
from rewardserve.types import Aggregate, How, ItemCode, ItemFailure, Probe, TextSpec
from tokenizers import Tokenizer, models

LOADING, SERVING, RESTARTING = ModelState.LOADING, ModelState.SERVING, ModelState.RESTARTING
DRAINING, FAILED = ModelState.DRAINING, ModelState.FAILED


async def test_an_unknown_name_is_answered_with_the_names_there_are(house) -> None:
    with pytest.raises(ModelNotFound, match="none"):
        house.registry.get("x")
    await house.serve("a")
    await house.serve("b")
    with pytest.raises(ModelNotFound, match=r"'x'.*a, b"):
        house.registry.get("x")


async def test_no_name_means_the_only_model(house) -> None:
    with pytest.raises(ModelNotFound):
        house.registry.get("")
    only = await house.serve("a")
    assert house.registry.get("") is only
    await house.serve("b")
    with pytest.raises(ModelNotFound, match="a, b"):
        house.registry.get("")
    assert house.registry.get("a") is only


async def test_a_loaded_model_was_warmed_and_serves(house, tools) -> None:
    model = await house.serve()
    assert model.state is SERVING and model.info == tools.INFO and house.registry.models == [model]
    assert house.states == [("m", LOADING), ("m", SERVING)]
    assert house.sample("model_up") == 1
    assert (await house.service.score(tools.request())).version == "v1"


@pytest.mark.parametrize(
    "name",
    ["", " ", "a b", "a/b", "a\n", "a=b", 'a"b', "..", "-"],
)
async def test_a_name_that_is_none_is_refused(house, name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await house.serve(name)
    assert refused.value.field == "name" and not house.registry.models


async def test_loading_a_name_twice_is_refused_and_the_first_lives_on(house, tools) -> None:
    model = await house.serve()
    with pytest.raises(ModelExists, match="'m'"):
        await house.serve()
    assert house.registry.models == [model]
    assert (await house.service.score(tools.request())).model == "m"


async def test_a_name_that_is_being_loaded_is_taken(house, tools) -> None:
    engine = house.engines.setdefault("m", tools.Engine())
    engine.may_start.clear()
    first = asyncio.create_task(house.serve())
    await asyncio.sleep(0.01)
    with pytest.raises(ModelExists):
        await house.serve()
    with pytest.raises(Unavailable, match="loading"):
        await house.service.score(tools.request())
    engine.may_start.set()
    assert (await first).state is SERVING


@pytest.mark.parametrize(
    "error", [LoadFailed("no head"), Unavailable("died while loading"), RuntimeError("bug"), asyncio.CancelledError()]
)
async def test_a_failing_start_leaves_nothing_behind(house, tools, error: BaseException) -> None:
    engine = house.engines.setdefault("m", tools.Engine())
    engine.fails_to_start = error
    with pytest.raises(LoadFailed if isinstance(error, Unavailable) else type(error)):
        await house.serve()
    assert not house.registry.models and engine.num_stops == 1
    assert house.states == [("m", LOADING), ("m", FAILED)]
    assert house.sample("model_up") is None, "an alert for models that are down would never end"
    with pytest.raises(ModelNotFound):
        await house.service.score(tools.request(model="m"))
    engine.fails_to_start, engine.num_stops = None, 0
    assert (await house.serve()).state is SERVING, "the name is free again"


async def test_an_engine_that_dies_in_its_warm_up_was_not_loaded(house, tools) -> None:
    engine = house.engines.setdefault("m", tools.Engine())

    async def die(request):
        raise Unavailable("died")

    engine.score = die
    with pytest.raises(LoadFailed, match="died"):
        await house.serve()
    assert not house.registry.models and engine.num_stops == 1 and house.sample("model_up") is None


@pytest.mark.parametrize("code", ItemCode)
async def test_a_model_whose_forwards_fail_was_not_loaded(house, tools, code: ItemCode) -> None:
    engine = house.engines.setdefault("m", tools.Engine())
    engine.warm_up_failure = ItemFailure(code, "the forward failed: no kernel for sm_42")
    with pytest.raises(LoadFailed, match="no kernel for sm_42"):
        await house.serve()
    assert not house.registry.models and engine.num_stops == 1 and house.sample("model_up") is None


@pytest.mark.parametrize("score", ["nan", "inf", "-inf"])
async def test_a_model_whose_score_is_no_number_is_served(house, tools, score: str) -> None:
    engine = house.engines.setdefault("m", tools.Engine())
    engine.warm_up_failure = ItemFailure(
        ItemCode.INTERNAL, f"the model's score is {score}, not a number", is_of_the_score=True
    )
    assert (await house.serve()).state is SERVING


async def test_nothing_is_served_before_the_warm_up_is_done(house, tools) -> None:
    engine = house.engines.setdefault("m", tools.Engine())
    state_in_warm_up = []
    score = engine.score

    async def note(request):
        state_in_warm_up.append(house.registry.get("m").state)
        return await score(request)

    engine.score = note
    await house.serve()
    assert state_in_warm_up == [LOADING]


async def test_unloading_finishes_what_is_in_flight_and_admits_nothing_new(house, tools) -> None:
    await house.serve()
    engine = house.engines["m"]
    engine.may_score.clear()
    call = asyncio.create_task(house.service.score(tools.request()))
    await asyncio.sleep(0.01)
    unload = asyncio.create_task(house.registry.unload("m", grace_s=30))
    await asyncio.sleep(0.01)
    with pytest.raises(Draining, match="'m'"):
        await house.service.score(tools.request())
    assert not unload.done() and engine.num_stops == 0
    engine.may_score.set()
    assert (await call).groups[0].items[0].score == 4
    await unload
    assert engine.num_stops == 1 and not house.registry.models
    assert house.states[-2:] == [("m", DRAINING), ("m", DRAINING)]
    assert house.sample("model_up") is None
    with pytest.raises(ModelNotFound):
        await house.service.score(tools.request(model="m"))


async def test_unloading_waits_no_longer_than_the_grace_period(house, tools) -> None:
    await house.serve()
    house.engines["m"].may_score.clear()
    call = asyncio.create_task(house.service.score(tools.request()))
    await asyncio.sleep(0.01)
    await asyncio.wait_for(house.registry.unload("m", grace_s=0.05), 2)
    assert house.engines["m"].num_stops == 1
    call.cancel()


async def test_an_unknown_model_is_not_unloaded(house) -> None:
    await house.serve()
    for name in ("x", ""):
        with pytest.raises(ModelNotFound):
            await house.registry.unload(name, 0)
    assert len(house.registry.models) == 1


async def test_a_name_is_free_again_after_unloading(house, tools) -> None:
    await house.serve()
    await house.registry.unload("m", 0)
    house.engines.clear()
    await house.serve()
    assert (await house.service.score(tools.request())).version == "v1"
    assert house.sample("model_up") == 1


async def test_two_unloads_at_once_both_end_in_peace_or_in_not_found(house, tools) -> None:
    await house.serve()
    house.engines["m"].may_score.clear()
    call = asyncio.create_task(house.service.score(tools.request()))
    await asyncio.sleep(0.01)
    unloads = [asyncio.create_task(house.registry.unload("m", 30)) for _ in range(2)]
    await asyncio.sleep(0.01)
    house.engines["m"].may_score.set()
    await call
    for outcome in await asyncio.gather(*unloads, return_exceptions=True):
        assert outcome is None or isinstance(outcome, ModelNotFound), repr(outcome)


async def test_a_model_unloaded_while_it_loads_ends_the_load_with_an_error_of_ours(house, tools) -> None:
    engine = house.engines.setdefault("m", tools.Engine())
    engine.may_start.clear()
    load = asyncio.create_task(house.serve())
    await asyncio.sleep(0.01)
    await house.registry.unload("m", 0)
    engine.may_start.set()
    with pytest.raises(LoadFailed):
        await load
    assert not house.registry.models


async def test_a_draining_model_is_not_up(house, tools) -> None:
    await house.serve()
    house.engines["m"].may_score.clear()
    call = asyncio.create_task(house.service.score(tools.request()))
    await asyncio.sleep(0.01)
    unload = asyncio.create_task(house.registry.unload("m", 30))
    await asyncio.sleep(0.01)
    up = house.sample("model_up")
    house.engines["m"].may_score.set()
    await asyncio.gather(call, unload)
    assert up == 0


# -- what the engine tells its owner -------------------------------------------------------------------------------


async def test_an_engine_that_restarts_is_unavailable_until_it_is_up(house, tools) -> None:
    model = await house.serve()
    listener = house.engines["m"].listener
    listener.on_down("killed by SIGKILL")
    assert model.state is RESTARTING and house.sample("model_up") == 0
    with pytest.raises(Unavailable, match=r"restarting.*SIGKILL"):
        await house.service.score(tools.request())
    listener.on_up(tools.INFO)
    assert model.state is SERVING and house.sample("model_up") == 1
    assert model.num_restarts == 1 and house.sample("engine_restarts_total") == 1
    assert "SIGKILL" in model.message, "what went wrong last stays readable"
    await house.service.score(tools.request())
    assert [state for _, state in house.states] == [LOADING, SERVING, RESTARTING, SERVING]


async def test_an_engine_that_comes_back_as_another_version_is_told_of(house, tools, caplog) -> None:
    """Somebody wrote to its folder, and nobody asked for a swap."""
    model = await house.serve()
    for version in ("v1", "v2"):
        assert not caplog.records
        house.engines["m"].listener.on_down("killed by SIGKILL")
        house.engines["m"].listener.on_up(dataclasses.replace(tools.INFO, version=version))
    assert "another version: its checkpoint, /models/m, was changed; v2 serves where v1 did" in caplog.text
    assert (model.state, model.version) == (SERVING, "v2")


@pytest.mark.parametrize("change", ["load", "update", "swap"])
async def test_a_link_is_followed_once_so_that_a_restart_or_rollback_finds_the_same_weights(
    house, tools, tmp_path, monkeypatch, change: str
) -> None:
    made = []
    monkeypatch.setattr(
        house.registry, "_make_engine", lambda name, source, dtype: made.append(source) or house.engines[name]
    )
    step, latest = tmp_path / "step_20", tmp_path / "latest"
    step.mkdir()
    latest.symlink_to(step)
    house.engines["m"] = tools.Engine()
    house.engines["m"].weights = {str(step): "v1"}
    model = await house.registry.load("m", str(latest) if change == "load" else "/models/m")
    if change == "update":
        await house.registry.update_weights("m", str(latest))
    elif change == "swap":
        model = await house.registry.load_beside(model, str(latest), "auto")
    assert model.source == str(step)
    assert change == "update" or made[-1] == str(step)


async def test_an_engine_that_gives_up_is_failed_for_good(house, tools) -> None:
    model = await house.serve()
    house.engines["m"].listener.on_down("died")
    house.engines["m"].listener.on_failed("died five times")
    assert model.state is FAILED and house.sample("model_up") == 0
    with pytest.raises(Unavailable, match="died five times"):
        await house.service.score(tools.request())
    await house.registry.unload("m", 0)
    assert not house.registry.models


async def test_weights_that_cannot_score_are_given_back(house, tools) -> None:
    model = await house.serve()
    engine = house.engines["m"]
    engine.weights = {"/models/m": "v1", "/new": "v2"}
    engine.warm_up_failure = ItemFailure(ItemCode.INTERNAL, "no memory")
    with pytest.raises(LoadFailed, match="no memory"):
        await house.registry.update_weights("m", "/new")
    assert (model.version, model.source, model.state) == ("v1", "/models/m", SERVING)
    engine.weights["/models/m"] = "v3"  # written over meanwhile
    with pytest.raises(LoadFailed, match="no memory"):
        await house.registry.update_weights("m", "/new")
    assert model.state is FAILED and "is not what it was" in model.message
    engine.listener.on_down("died")
    engine.listener.on_up(engine._info)  # with the weights that nobody is to be scored by
    with pytest.raises(Unavailable, match="is not what it was"):
        await house.service.score(tools.request())
    assert house.sample("model_up") == 0


async def test_weights_that_have_become_nan_are_given_back(house, tools) -> None:
    model = await house.serve()
    engine = house.engines["m"]
    engine.weights = {"/models/m": "v1", "/new": "v2"}
    engine.warm_up_failure = ItemFailure(ItemCode.INTERNAL, "its score is nan", is_of_the_score=True)
    for _ in range(2):
        with pytest.raises(LoadFailed, match=r"its score is nan.* may have become NaN in training"):
            await house.registry.update_weights("m", "/new")
        assert (model.version, model.source, model.state) == ("v1", "/models/m", SERVING)
    model.no_number = "its score is nan"  # as of a model for which those ids mean nothing
    assert (await house.registry.update_weights("m", "/new")).version == "v2"


async def test_what_lies_beside_a_checkpoint_counts_when_it_is_loaded_and_not_when_its_engine_restarts(
    house, tools, tmp_path
) -> None:
    origin = Origin("m", "v1", "pairs.jsonl", 10, 5)
    model = await house.serve()
    model.configured, model.source = Finishing(looks_beside=True), str(tmp_path)
    for text in ("{}", None):
        if text is None:
            calibration_file.write(tmp_path / BESIDE, Temperature(2.0), origin)
        else:
            (tmp_path / BESIDE).write_text(text)
        house.engines["m"].listener.on_down("died")
        house.engines["m"].listener.on_up(tools.INFO)
        assert (model.state, model.version) == (SERVING, "v1")
    house.engines["m"].weights = {str(tmp_path): "v1"}
    await house.registry.update_weights("m", str(tmp_path))
    assert model.version != "v1" and model.finishing.calibration == Temperature(2.0)
    (tmp_path / BESIDE).write_text("{}")
    house.engines["m"].weights = {}  # not asked
    with pytest.raises(LoadFailed, match=BESIDE):
        await house.registry.update_weights("m", str(tmp_path))
    assert model.finishing.calibration == Temperature(2.0)


async def test_nothing_is_looked_for_beside_what_is_no_path(house) -> None:
    """Whether weights are there is the engine's to say."""
    model = await house.serve()
    model.configured = Finishing(looks_beside=True)
    house.engines["m"].weights = {source: "v2" for source in ("x" * 300, "\0")}
    for source in house.engines["m"].weights:
        await house.registry.update_weights("m", source)
        assert model.version == "v2"


async def test_an_engine_that_falls_back_without_restarting_counts_no_restart(house, tools) -> None:
    model = await house.serve()
    padded = dataclasses.replace(tools.INFO, path="padded", path_reason="it said so")
    house.engines["m"].listener.on_up(padded)
    assert model.info == padded and model.num_restarts == 0
    labels = {"version": "v1", "architecture": "Toy", "dtype": "float32"}
    assert house.sample("model_info", path="padded", **labels) == 1
    assert house.sample("model_info", path="packed", **labels) is None, "one version is served at a time"


async def test_a_draining_model_stays_so_whatever_its_engine_says(house, tools) -> None:
    model = await house.serve()
    listener = house.engines["m"].listener
    house.engines["m"].may_score.clear()
    call = asyncio.create_task(house.service.score(tools.request()))
    await asyncio.sleep(0.01)
    unload = asyncio.create_task(house.registry.unload("m", 30))
    await asyncio.sleep(0.01)
    for say in (lambda: listener.on_down("x"), lambda: listener.on_up(tools.INFO), lambda: listener.on_failed("x")):
        say()
        assert model.state is DRAINING
    house.engines["m"].may_score.set()
    await asyncio.gather(call, unload)


async def test_a_new_limit_after_a_restart_is_obeyed(house, tools) -> None:
    await house.serve()
    listener = house.engines["m"].listener
    listener.on_down("x")
    listener.on_up(dataclasses.replace(tools.INFO, max_length=4, version="v2"))
    result = await house.service.score(tools.request())
    assert result.version == "v2"
    assert result.groups[0].items[0].failure is not None and "max_length 4" in result.groups[0].items[0].failure.message


def text_spec(*probes: Probe) -> TextSpec:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    return TextSpec(tokenizer.to_str(), None, {}, None, probes)


async def test_a_model_with_text_scores_text_before_and_after_a_restart(house, tools) -> None:
    info = dataclasses.replace(tools.INFO, text=text_spec(Probe((), False, "a", (0,))))
    house.engines["m"] = tools.Engine(info)
    model = await house.serve()
    tokenizer = model.encoder.tokenizer
    house.engines["m"].listener.on_down("x")
    house.engines["m"].listener.on_up(dataclasses.replace(info, version="v2"))
    assert model.encoder.tokenizer is tokenizer, "the same text is not set up again"
    house.engines["m"].listener.on_up(dataclasses.replace(info, text=text_spec()))
    assert model.encoder.tokenizer is not tokenizer
    assert (await house.service.score(tools.request("b"))).groups[0].items[0].score == 1


async def test_text_that_cannot_be_reproduced_is_not_served(house, tools) -> None:
    house.engines["m"] = tools.Engine(dataclasses.replace(tools.INFO, text=text_spec(Probe((), False, "a", (1,)))))
    with pytest.raises(LoadFailed, match="reproduced"):
        await house.serve()
    assert not house.registry.models and house.engines["m"].num_stops == 1


async def test_text_that_cannot_be_reproduced_after_a_restart_fails_the_model(house, tools) -> None:
    model = await house.serve()
    listener = house.engines["m"].listener
    listener.on_down("died")
    listener.on_up(dataclasses.replace(tools.INFO, text=text_spec(Probe((), False, "a", (1,)))))
    assert model.state is FAILED and "reproduced" in model.message


async def test_nobody_who_waited_is_scored_by_weights_that_could_not_be_given_back(house, tools) -> None:
    await house.serve()
    engine = house.engines["m"]
    engine.weights = {"/models/m": "v3", "/new": "v2"}
    engine.warm_up_failure = ItemFailure(ItemCode.INTERNAL, "no memory")
    engine.may_score.clear()
    under_way = asyncio.create_task(house.service.score(tools.request()))
    await asyncio.sleep(0.01)
    update = asyncio.create_task(house.registry.update_weights("m", "/new"))
    await asyncio.sleep(0.01)
    waiting = asyncio.create_task(house.service.score(tools.request()))
    await asyncio.sleep(0.01)
    engine.may_score.set()
    assert (await under_way).version == "v1"
    with pytest.raises(LoadFailed):
        await update
    with pytest.raises(Unavailable, match="is not what it was"):
        await waiting


async def test_draining_waits_for_those_who_wait_for_other_weights(house, tools) -> None:
    model = await house.serve()
    with model.closed():
        waiting = asyncio.create_task(house.service.score(tools.request()))
        await asyncio.sleep(0.01)
        house.registry.stop_admitting()
        drain = asyncio.create_task(house.registry.drain(30))
        await asyncio.sleep(0.05)
        assert not drain.done()
    await asyncio.gather(waiting, drain)


async def test_an_ensemble_is_not_changed_as_a_model_is(house) -> None:
    await house.serve("a")
    await house.serve("b")
    house.registry.add_ensemble("both", ("a", "b"), Aggregate(How.MEAN))
    with pytest.raises(SwapRefused, match="'both' is an ensemble of a, b; change its members"):
        await house.registry.update_weights("both", "/new")
    with pytest.raises(SwapRefused, match="'both' is an ensemble of a, b; change its members"):
        await house.registry.unload("both", grace_s=1)


async def test_an_ensemble_without_one_of_its_members_is_away_and_not_unknown(house, tools) -> None:
    """Who asks for it has not mistaken its name, and is to come again."""
    for name in ("a", "b"):
        await house.serve(name)
    house.registry.add_ensemble("both", ("a", "b"), Aggregate(How.MEAN))
    await house.registry.unload("b", grace_s=1)
    with pytest.raises(Unavailable, match="'both' cannot score without its member 'b', which is not served"):
        await house.service.score(tools.request(model="both"))
    assert not house.engines["a"].seen
    house.engines.clear()
    await house.serve("b")
    assert (await house.service.score(tools.request(model="both"))).members[1][0] == "b"


@pytest.mark.parametrize("ending", ["dies", "is unloaded", "is replaced"])
async def test_nothing_is_queued_in_a_scheduler_that_is_not_there_any_more(house, tools, ending: str) -> None:
    """The last report said otherwise, and none follows: what waited has failed, or another version has the name."""
    model = await house.serve()
    model.engine.listener.on_batch(BatchReport(1, 1, 0, 0, 0.1, queued_requests=7, queued_tokens=900))
    assert (house.sample("queued_requests"), house.sample("queued_tokens")) == (7, 900)
    if ending == "dies":
        model.engine.listener.on_down("it died")
    elif ending == "is unloaded":
        await house.registry.unload("m", grace_s=0)
    else:
        house.engines.clear()
        await swap(house.service, house.registry, SwapPlan("m", "/models/new"), grace_s=0)
    left = None if ending == "is unloaded" else 0
    assert (house.sample("queued_requests"), house.sample("queued_tokens")) == (left, left)


async def test_an_ensemble_is_up_while_all_of_its_members_are(house) -> None:
    def is_up() -> float | None:
        return house.metrics.registry.get_sample_value("rewardserve_model_up", {"model": "both"})

    house.registry.add_ensemble("both", ["a", "b"], Aggregate(How.MEAN))
    a = await house.serve("a")
    assert is_up() == 0
    await house.serve("b")
    assert is_up() == 1
    a.engine.listener.on_down("it died")
    assert is_up() == 0
    a.engine.listener.on_up(a.info)
    assert is_up() == 1
    await house.registry.unload("b", grace_s=1)
    assert is_up() == 0


async def test_a_server_that_drains_admits_nothing_and_waits(house, tools) -> None:
    await house.serve()
    house.engines["m"].may_score.clear()
    call = asyncio.create_task(house.service.score(tools.request()))
    await asyncio.sleep(0.01)
    house.registry.stop_admitting()
    with pytest.raises(Draining):
        await house.service.score(tools.request())
    drain = asyncio.create_task(house.registry.drain(30))
    await asyncio.sleep(0.05)
    assert not drain.done()
    house.engines["m"].may_score.set()
    await asyncio.gather(call, drain)
    await house.registry.stop()
    assert house.engines["m"].num_stops == 1


async def test_a_rollback_to_a_kept_version_that_has_died_for_good_loads_it_anew(house, tools, monkeypatch) -> None:
    monkeypatch.setattr(house.registry, "_make_engine", lambda name, source, dtype: tools.Engine())
    old = await house.serve()
    await swap(house.service, house.registry, SwapPlan("m", "/models/new", keep_previous=True), grace_s=1)
    old.engine.listener.on_failed("died too often")
    back = await rollback(house.registry, "m", grace_s=1)
    assert back is not old and back.source == old.source and back.state is ModelState.SERVING
    assert old.engine.num_stops == 1
