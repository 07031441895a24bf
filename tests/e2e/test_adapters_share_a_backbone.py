"""Adapters of one base in one server: one engine for all; each is served, swapped and unloaded by itself."""

import shutil
import signal
import urllib.request

import grpc
import pytest
import torch
from adapters import ALPHA, RANK, adapter_of, merged_by_hand, save_adapter
from checkpoints import padded_scores, save_checkpoint
from rewardserve.app import threads_of
from rewardserve.client import Group, RewardClient, TokenIds
from rewardserve.client.errors import RewardClientError
from rewardserve.config import load_config
from rewardserve.engine.cgroups import num_cores
from rewardserve.engine.shared import sharing
from rewardserve.v1 import models_pb2, scoring_pb2
from safetensors.torch import load_file

PROMPT, RESPONSES = list(range(5, 150)), [list(range(10, 10 + n)) for n in (3, 40, 9)]
ROWS = [[*PROMPT, *response] for response in RESPONSES]
NAMES = ("a", "b", "c")
GROUP = Group(TokenIds(PROMPT), [TokenIds(response) for response in RESPONSES])
STATE = models_pb2.ModelState


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """`a` and `b` differ by their LoRA, `c` has none; `new` is what `a` is swapped for."""
    home = tmp_path_factory.mktemp("adapters")
    save_checkpoint(home / "base")
    weights = load_file(home / "base" / "model.safetensors")
    for name in (*NAMES, "new"):
        tensors = adapter_of(weights, seed=name, **({"targets": ()} if name == "c" else {}))
        save_adapter(home / name, home / "base", tensors)
        merged_by_hand(home / "base", tensors, ALPHA / RANK, home / f"{name} merged")
    return home


@pytest.fixture(scope="module")
def wanted(home):
    return {name: padded_scores(home / f"{name} merged", ROWS, torch.float32).tolist() for name in (*NAMES, "new")}


@pytest.fixture
def serve(start, home):
    def serve(*arguments):
        models = [f"--model={name}={home / name}" for name in NAMES]
        return start(*models, "--ensemble=all=mean(a+b+c)", "--allow-model-control", *arguments).ready()

    return serve


def scores(client: RewardClient, name: str) -> list[float]:
    return [item.score for item in client.score([GROUP], model=name).groups[0].items]


def check(client, wanted, **versions) -> None:
    for name in NAMES:
        assert scores(client, name) == pytest.approx(wanted[versions.get(name, name)], rel=1e-5, abs=1e-5)


def test_one_engine_serves_them_and_each_has_its_own_life(serve, home, wanted, kit) -> None:
    server = serve()
    with RewardClient(server.target) as client:
        check(client, wanted)
        shared = server.engine()
        members = client.score([GROUP], model="all").groups[0].items[0].members
        assert list(members.values()) == pytest.approx([wanted[name][0] for name in NAMES], rel=1e-5, abs=1e-5)

        client.swap_model("a", str(home / "new"), keep_previous=True)
        assert len(server.engines()) == 2
        check(client, wanted, a="new")
        client.rollback_model("a")
        check(client, wanted)
        assert server.engines()[0].pid == shared.pid

        with pytest.raises(RewardClientError, match="shares its backbone with others; use Swap"):
            client.update_weights("b", str(home / "new"))

        server.models.Unload(models_pb2.UnloadModelRequest(name="b"), timeout=kit.ANTI_HANG_S)
        assert scores(client, "a") == pytest.approx(wanted["a"], rel=1e-5, abs=1e-5)
        server.models.Load(models_pb2.LoadModelRequest(name="b", source=str(home / "b")), timeout=kit.ANTI_HANG_S)
        check(client, wanted)
        assert shared.pid in [engine.pid for engine in server.engines()]


def test_it_comes_back_after_a_death_without_those_that_have_left(serve, home, wanted, kit, tmp_path) -> None:
    server = serve()
    with RewardClient(server.target) as client:
        server.models.Unload(models_pb2.UnloadModelRequest(name="a"), timeout=kit.ANTI_HANG_S)
        gone = home / "a"
        gone.rename(tmp_path / "a")
        try:
            server.engine().send_signal(signal.SIGKILL)
            kit.until(lambda: server.metric("engine_restarts_total") > 0)
            kit.until(lambda: server.model("b").state == server.model("c").state == STATE.MODEL_STATE_SERVING)
            assert scores(client, "b") == pytest.approx(wanted["b"], rel=1e-5, abs=1e-5)
            assert scores(client, "c") == pytest.approx(wanted["c"], rel=1e-5, abs=1e-5)
        finally:
            (tmp_path / "a").rename(gone)
        server.models.Load(models_pb2.LoadModelRequest(name="a", source=str(gone)), timeout=kit.ANTI_HANG_S)
        check(client, wanted)  # in its place another is loaded now
        server.models.Unload(models_pb2.UnloadModelRequest(name="a"), timeout=kit.ANTI_HANG_S)
        for name in ("b", "c"):
            server.models.Unload(models_pb2.UnloadModelRequest(name=name), timeout=kit.ANTI_HANG_S)
        kit.until(lambda: not server.engines())


def test_each_is_loaded_by_itself_where_that_is_asked_for(start, home, wanted) -> None:
    models = [f"--model={name}={home / name}" for name in ("a", "b")]
    server = start(*models, "--no-share-backbone", "--threads", "1").ready()
    with RewardClient(server.target) as client:
        for name in ("a", "b"):
            assert scores(client, name) == pytest.approx(wanted[name], rel=1e-5, abs=1e-5)
    assert len(server.engines()) == 2


def test_each_is_loaded_by_itself_where_one_cannot_share(start, home, wanted, tmp_path) -> None:
    tensors = adapter_of(load_file(home / "base" / "model.safetensors"), seed="whole")
    save_adapter(tmp_path, home / "base", tensors | {"base_model.model.model.norm.weight": torch.ones(64)})
    server = start(f"--model=a={home / 'a'}", f"--model=whole={tmp_path}", "--threads", "1").ready()
    with RewardClient(server.target) as client:
        assert scores(client, "a") == pytest.approx(wanted["a"], rel=1e-5, abs=1e-5)
        assert len(scores(client, "whole")) == len(RESPONSES)
    server.wait_for_log("loaded each by itself, for they cannot share a backbone: .*model.norm.weight")
    assert len(server.engines()) == 2


def metric(server, name: str, model: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=20) as reply:
        lines = reply.read().decode().splitlines()
    begin = f'rewardserve_{name}{{model="{model}"}} '
    return sum(float(line.removeprefix(begin)) for line in lines if line.startswith(begin))


def test_metrics_of_batches_are_each_models_own(serve, kit) -> None:
    server = serve()
    request = scoring_pb2.ScoreRequest(model="b", groups=[kit.ids_group(PROMPT, RESPONSES)])
    server.scoring.Score(request, timeout=kit.ANTI_HANG_S)
    kit.until(lambda: metric(server, "batch_pairs_sum", "b") == 1 + len(RESPONSES))  # and the warm-up
    assert [metric(server, "batch_pairs_sum", name) for name in ("a", "c")] == [1, 1]


def test_who_shares_is_found_without_loading_anything(home, tmp_path) -> None:
    """A path beside the adapter and the whole path are one base; what is no adapter, or another's, has its own."""
    save_adapter(home / "beside", "../base", {"x": torch.zeros(1)})
    save_adapter(tmp_path / "of the hub", "someone/model", {"x": torch.zeros(1)})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    models = {
        "a": str(home / "a"),
        "base": str(home / "base"),
        "beside": str(home / "beside"),
        "hub": str(tmp_path / "of the hub"),
        "broken": str(tmp_path / "broken"),
        "named": "someone/adapter",
    }
    assert sharing(models) == [("a", "beside")]


def test_what_is_in_flight_to_a_model_that_is_unloaded_ends_with_it_and_with_no_other(serve, kit) -> None:
    server = serve("--grace-s", "0")
    server.engine().suspend()
    calls = {}
    for name in ("a", "b"):
        request = scoring_pb2.ScoreRequest(model=name, groups=[kit.ids_group(PROMPT, RESPONSES)])
        calls[name] = server.scoring.Score.future(request, timeout=kit.ANTI_HANG_S)
        kit.until(lambda name=name: metric(server, "in_flight_requests", name) > 0)
    server.models.Unload(models_pb2.UnloadModelRequest(name="a"), timeout=kit.ANTI_HANG_S)
    assert calls["a"].code() is grpc.StatusCode.UNAVAILABLE and "'a' was unloaded" in calls["a"].details()
    server.engine().resume()
    assert calls["b"].code() is grpc.StatusCode.OK


def test_a_folder_that_is_written_anew_is_read_anew_at_every_swap(start, home, wanted, tmp_path) -> None:
    """As a trainer does that keeps its newest weights in one place."""
    folder = tmp_path / "newest"
    shutil.copytree(home / "a", folder)
    server = start(f"--model=a={folder}", f"--model=b={home / 'b'}", "--allow-model-control").ready()
    with RewardClient(server.target) as client:
        for name in ("new", "c"):
            shutil.rmtree(folder)
            shutil.copytree(home / name, folder)
            client.swap_model("a", str(folder))
            assert scores(client, "a") == pytest.approx(wanted[name], rel=1e-5, abs=1e-5)
        assert scores(client, "b") == pytest.approx(wanted["b"], rel=1e-5, abs=1e-5)


def test_threads_are_for_engines_of_which_a_shared_one_is_one(home) -> None:
    models = [flag for name in NAMES for flag in ("--model", f"{name}={home / name}")]
    config = load_config([*models, "--ensemble", "all=mean(a+b+c)"])
    assert threads_of(config, "a", [NAMES]) == 0
    assert threads_of(config, "a", [("a", "b")]) == max(1, num_cores() // 2)
    assert threads_of(config, "a") == max(1, num_cores() // 3)
