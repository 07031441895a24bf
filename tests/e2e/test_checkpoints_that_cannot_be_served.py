"""Two models at once, and checkpoints broken in the ways checkpoints are: each is refused with what is wrong."""

import json
import shutil

import grpc
import pytest
import torch
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.options import NativeOptions
from rewardserve.errors import LoadFailed
from rewardserve.v1 import models_pb2, scoring_pb2
from safetensors.torch import load_file, save_file

Code = grpc.StatusCode
Load = models_pb2.LoadModelRequest


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def edit_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def without_head(folder):
    edit_weights(folder, lambda weights: weights.pop("score.weight"))


def two_labels(folder):
    edit_weights(folder, lambda weights: weights.update({"score.weight": torch.zeros(2, 64)}))
    edit_config(folder, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})


def head_of_other_width(folder):
    edit_weights(folder, lambda weights: weights.update({"score.weight": torch.zeros(1, 65)}))


def wrong_shape(folder):
    edit_weights(folder, lambda w: w.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(127, 64)}))


def missing_weight(folder):
    edit_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def missing_shard(folder):
    weights = load_file(folder / "model.safetensors")
    names = dict.fromkeys(weights, "model-00001-of-00002.safetensors") | {
        "score.weight": "model-00002-of-00002.safetensors"
    }
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def cut_off_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def no_config(folder):
    (folder / "config.json").unlink()


def config_is_no_json(folder):
    (folder / "config.json").write_text("{")


def config_of_unknown_kind(folder):
    edit_config(folder, model_type="nonsense")


def config_without_size(folder):
    edit_config(folder, num_attention_heads=0)


def index_is_no_json(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{")


def index_without_map(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


def nothing_at_all(folder):
    shutil.rmtree(folder)


BROKEN = [
    (without_head, "score.weight"),
    (two_labels, "(2, 64)"),
    (head_of_other_width, "(1, 65)"),
    (wrong_shape, "up_proj"),
    (missing_weight, "model.layers.1.mlp.up_proj.weight|layers.1.mlp.up_proj.weight"),
    (missing_shard, "model-00002-of-00002.safetensors"),
    (cut_off_file, "model.safetensors"),
    (no_config, "config.json"),
    (config_is_no_json, "config.json"),
    (config_of_unknown_kind, "nonsense"),
    (config_without_size, ""),
    (index_is_no_json, "index.json"),
    (index_without_map, "index.json"),
    (nothing_at_all, "no such folder"),
]


@pytest.mark.parametrize(("spoil", "named"), BROKEN, ids=[spoil.__name__ for spoil, _ in BROKEN])
def test_what_is_wrong_is_named(checkpoint, tmp_path, spoil, named):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    spoil(folder)
    with pytest.raises(LoadFailed) as caught:
        load_runner(NativeOptions(str(folder), prefix_cache_bytes=16 << 20))
    message = str(caught.value)
    assert str(folder) in message and any(part in message for part in named.split("|"))
    assert "\n" not in message and len(message) < 1000


def test_a_device_that_is_not_there_is_named(checkpoint):
    with pytest.raises(LoadFailed, match="cuda:7"):
        load_runner(NativeOptions(str(checkpoint), device="cuda:7"))


@pytest.fixture(scope="module")
def server(start, checkpoint, bf16_checkpoint):
    models = ("--model", f"one={checkpoint}", "--model", f"two={bf16_checkpoint}")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GOMP_SPINCOUNT", raising=False)  # which these tests have for themselves
        return start(*models, "--allow-model-control").ready()


def refused(call) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def test_two_models_are_served_apart(server, kit):
    def score(model):
        return server.scoring.Score(kit.ids_request([1, 2], [[3], [4]], model=model), timeout=kit.ANTI_HANG_S)

    one, two = score("one"), score("two")
    assert (one.model.name, two.model.name) == ("one", "two")
    assert one.model.version != two.model.version
    assert kit.scores_of(one) != kit.scores_of(two)
    assert kit.scores_of(score("one")) == pytest.approx(kit.scores_of(one), rel=1e-4)
    error = refused(lambda: score(""))
    assert error.code() is Code.NOT_FOUND and "one, two" in error.details()
    text = scoring_pb2.Group(prompt=scoring_pb2.Prompt(text="x"), responses=[scoring_pb2.Response(text="y")])
    error = refused(lambda: server.scoring.Score(scoring_pb2.ScoreRequest(model="two", groups=[text]), timeout=60))
    assert error.code() is Code.INVALID_ARGUMENT and "tokenizer" in error.details()


def test_engines_on_the_same_cores_do_not_spin_where_another_waits_for_one(server):
    assert [engine.environ().get("GOMP_SPINCOUNT") for engine in server.engines()] == ["1000", "1000"]


def test_one_models_engine_may_die_while_the_other_serves(server, kit):
    dead = next(engine for engine in server.engines() if engine.name() == "engine[two]")
    dead.kill()
    kit.until(lambda: not server.is_serving("rewardserve.v1.Scoring/two"))
    assert server.is_serving("rewardserve.v1.Scoring/one")
    reply = server.scoring.Score(kit.ids_request([1], [[2]], model="one"), timeout=kit.ANTI_HANG_S)
    assert kit.scores_of(reply) != [None]
    kit.until(lambda: server.is_serving("rewardserve.v1.Scoring/two"))


def test_a_broken_checkpoint_is_refused_over_the_wire_and_leaves_no_engine(server, checkpoint, tmp_path, kit):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    without_head(folder)
    before = {engine.pid for engine in server.engines()}
    error = refused(lambda: server.models.Load(Load(name="three", source=str(folder)), timeout=kit.ANTI_HANG_S))
    assert error.code() is Code.FAILED_PRECONDITION
    assert "score.weight" in error.details() and "random" in error.details()
    assert {engine.pid for engine in server.engines()} == before
    assert [model.name for model in server.models.List(models_pb2.ListModelsRequest()).models] == ["one", "two"]
    kit.until(server.is_serving)


def test_a_model_is_loaded_scored_and_unloaded_over_the_wire(server, checkpoint, kit):
    source = str(checkpoint)
    model = server.models.Load(Load(name="three", source=source, dtype="bfloat16"), timeout=kit.ANTI_HANG_S)
    assert (model.dtype, model.state) == ("bfloat16", models_pb2.MODEL_STATE_SERVING)
    reply = server.scoring.Score(kit.ids_request([1], [[2]], model="three"), timeout=kit.ANTI_HANG_S)
    assert kit.scores_of(reply) != [None]
    before = {engine.pid for engine in server.engines()}
    server.models.Unload(models_pb2.UnloadModelRequest(name="three"), timeout=kit.ANTI_HANG_S)
    assert len(before - {engine.pid for engine in server.engines()}) == 1
    assert server.is_serving()


def test_a_model_that_is_unloaded_while_it_loads_ends_its_load_and_leaves_no_engine(server, checkpoint, kit):
    before = set(server.engines())
    load = server.models.Load.future(Load(name="three", source=str(checkpoint)), timeout=kit.ANTI_HANG_S)
    kit.until(lambda: set(server.engines()) - before)
    (engine,) = set(server.engines()) - before
    engine.suspend()  # it would be loading for ever
    server.models.Unload(models_pb2.UnloadModelRequest(name="three"), timeout=kit.ANTI_HANG_S)
    error = refused(load.result)
    assert error.code() is Code.FAILED_PRECONDITION and "unloaded" in error.details()
    kit.until(lambda: set(server.engines()) == before)
