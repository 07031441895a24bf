"""A model on several devices (here: on the CPU twice) has one name, one score for each pair, and outlives an engine."""

import shutil

import grpc
import pytest
from rewardserve.v1 import models_pb2
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def server(start, bf16_checkpoint):
    options = ("--device", "cpu,cpu", "--threads", "1", "--allow-model-control")
    return start("--model", f"tiny={bf16_checkpoint}", *options).ready()


@pytest.fixture(scope="module")
def load(kit):
    return [
        kit.ids_request(kit.random_ids(i, 128), [kit.random_ids(1000 + 4 * i + j, 32) for j in range(4)])
        for i in range(40)
    ]


def test_a_pair_has_the_same_score_on_every_device_and_all_devices_work(start, bf16_checkpoint, server, kit, load):
    alone = start("--model", f"tiny={bf16_checkpoint}").ready()
    wanted = [kit.scores_of(alone.scoring.Score(request, timeout=60)) for request in load]
    calls = [server.scoring.Score.future(request, timeout=60) for request in load]
    assert [kit.scores_of(call.result()) for call in calls] == wanted
    assert server.model().device == "cpu,cpu"
    before = [engine.cpu_times().user for engine in server.engines()]
    assert len(before) == 2
    for call in [server.scoring.Score.future(request, timeout=60) for request in load for _ in range(4)]:
        call.result()
    kit.until(lambda: all(e.cpu_times().user > b for e, b in zip(server.engines(), before, strict=True)))


def test_one_engine_is_killed_and_no_call_fails(server, kit, load):
    wanted = [kit.scores_of(server.scoring.Score(request, timeout=60)) for request in load]
    restarts = server.metric("engine_restarts_total")
    calls = [server.scoring.Score.future(request, timeout=60) for request in load]
    server.engines()[0].kill()
    assert [kit.scores_of(call.result()) for call in calls] == wanted
    kit.until(lambda: server.metric("engine_restarts_total") == restarts + 1)
    assert server.is_serving()
    kit.until(lambda: len(server.engines()) == 2)
    assert kit.scores_of(server.scoring.Score(load[0], timeout=60)) == wanted[0]


def test_a_device_that_is_not_there_is_named(start, bf16_checkpoint):
    broken = start("--model", f"tiny={bf16_checkpoint}", "--device", "cpu,cuda:7")
    assert broken.wait() != 0
    assert any("cuda:7" in line for line in broken.log)


def test_scores_are_refused_by_nobody_while_an_engine_restarts(server, kit, load):
    wanted = [kit.scores_of(server.scoring.Score(request, timeout=60)) for request in load[:10]]
    kit.until(lambda: len(server.engines()) == 2)
    server.engines()[1].kill()
    assert [kit.scores_of(server.scoring.Score(request, timeout=60)) for request in load[:10]] == wanted


def test_weights_are_taken_over_on_every_device_or_none(server, kit, load, bf16_checkpoint, tmp_path):
    def on_both():
        """Of each request, by either engine: they are sent at once, so that both have work."""
        calls = [server.scoring.Score.future(request, timeout=60) for request in load]
        return [call.result() for call in calls]

    kit.until(lambda: len(server.engines()) == 2 and server.is_serving())
    before = on_both()
    shutil.copytree(bf16_checkpoint, tmp_path / "doubled")
    tensors = load_file(tmp_path / "doubled" / "model.safetensors")
    save_file({**tensors, "score.weight": 2 * tensors["score.weight"]}, tmp_path / "doubled" / "model.safetensors")
    replies = []

    def taken_over():
        """An engine that was killed before may not be up yet."""
        wanted = models_pb2.UpdateWeightsRequest(name="tiny", source=str(tmp_path / "doubled"))
        try:
            replies.append(server.models.UpdateWeights(wanted, timeout=60))
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE and "is restarting" in error.details()
        return replies

    kit.until(taken_over)
    (updated,) = replies
    assert updated.device == "cpu,cpu" and updated.version != before[0].model.version
    after = on_both()
    assert {reply.model.version for reply in after} == {updated.version}
    wanted = [[2 * score for score in kit.scores_of(reply)] for reply in before]
    assert [kit.scores_of(reply) for reply in after] == wanted
