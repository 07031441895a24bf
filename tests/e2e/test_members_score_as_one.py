"""An ensemble over the wire: every member's score, their spread, and the aggregate that was configured."""

import math
import re
import statistics
import subprocess
import sys
import urllib.request
from pathlib import Path

import grpc
import pytest
import torch
from checkpoints import padded_scores, save_checkpoint
from rewardserve.app import threads_of
from rewardserve.client import Group, RewardClient, StepOptions, Steps, TokenIds
from rewardserve.client.errors import ModelNotFound
from rewardserve.config import load_config
from rewardserve.engine.cgroups import num_cores
from rewardserve.evaluation import calibration_file
from rewardserve.evaluation.calibration_file import Isotonic, Origin, Temperature

PROMPT, RESPONSES = list(range(5, 150)), [list(range(10, 10 + n)) for n in (3, 40, 9)]
ROWS = [[*PROMPT, *response] for response in RESPONSES]
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> dict[str, Path]:
    """Of two families and lengths: what the first two can score, the third may not."""
    folders = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    save_checkpoint(folders["a"], "qwen3")
    save_checkpoint(folders["b"], "llama")
    save_checkpoint(folders["c"], "mistral", max_position_embeddings=300)
    return folders


@pytest.fixture(scope="module")
def wanted(members) -> dict[str, list[float]]:
    return {name: padded_scores(folder, ROWS, torch.float32).tolist() for name, folder in members.items()}


@pytest.fixture(scope="module")
def server(start, members):
    models = [f"--model={name}={folder}" for name, folder in members.items()]
    ensembles = [f"--ensemble={name}={how}(a+b+c)" for name, how in HOWS.items()]
    return start(*models, *ensembles, "--prefix-cache-mb", "16", "--allow-model-control").ready()


HOWS = {"all": "mean", "least": "min", "middle": "median", "cautious": "mean-0.5std"}
FOLDS = {
    "all": statistics.fmean,
    "least": min,
    "middle": statistics.median,
    "cautious": lambda scores: statistics.fmean(scores) - 0.5 * statistics.pstdev(scores),
}


@pytest.fixture(scope="module")
def client(server):
    with RewardClient(server.target) as client:
        yield client


def group(responses=RESPONSES) -> Group:
    return Group(TokenIds(PROMPT), [TokenIds(response) for response in responses])


@pytest.mark.parametrize("name", HOWS)
def test_each_way_of_folding_gives_members_mean_min_std_and_its_score(client, wanted, name: str) -> None:
    result = client.score([group()], model=name)
    assert result.model_name == name
    for i, item in enumerate(result.groups[0].items):
        scores = [wanted[member][i] for member in NAMES]
        assert list(item.members) == list(NAMES)
        assert list(item.members.values()) == pytest.approx(scores, rel=1e-5)
        assert item.score == pytest.approx(FOLDS[name](scores), rel=1e-5, abs=1e-6)
        assert item.std == pytest.approx(statistics.pstdev(scores), rel=1e-4)


def test_rank_and_compare_go_by_the_ensembles_score(client, wanted) -> None:
    means = [statistics.fmean(wanted[member][i] for member in NAMES) for i in range(len(RESPONSES))]
    ranking = client.rank(TokenIds(PROMPT), [TokenIds(response) for response in RESPONSES], model="all")
    assert [entry.index for entry in ranking.ranked] == sorted(range(len(means)), key=lambda i: -means[i])
    pair = client.compare(TokenIds(PROMPT), TokenIds(RESPONSES[0]), TokenIds(RESPONSES[1]), model="all")
    assert pair.probability_a == pytest.approx(1 / (1 + math.exp(means[1] - means[0])), rel=1e-4)


def test_what_one_member_cannot_score_fails_by_its_name_and_alone(client) -> None:
    items = client.score([group([[1, 2], list(range(5, 200))])], model="all").groups[0].items
    assert items[0].ok
    assert items[1].status.code is grpc.StatusCode.OUT_OF_RANGE and "member 'c'" in items[1].status.message


def test_a_version_of_the_ensemble_changes_with_any_members(client, server, members, tmp_path) -> None:
    before = client.score([group()], model="all").model_version
    assert before == client.score([group()], model="all").model_version
    assert before != client.score([group()], model="least").model_version
    model = save_checkpoint(tmp_path, "llama")
    with torch.no_grad():
        model.score.weight.mul_(2)
    model.save_pretrained(tmp_path)
    client.swap_model("b", str(tmp_path), keep_previous=True)
    assert client.score([group()], model="all").model_version != before
    client.rollback_model("b")
    assert client.score([group()], model="all").model_version == before


def test_it_is_listed_counted_and_healthy_like_a_model(client, server) -> None:
    client.score([group()], model="all")
    info = client.get_model("all")
    assert (info.state, info.members, info.aggregate) == ("serving", NAMES, "mean")
    assert info.version == client.score([group()], model="all").model_version
    assert info.max_length == min(client.get_model(name).max_length for name in NAMES)
    assert {model.name for model in client.list_models()} == {*NAMES, *HOWS}
    shown = subprocess.run(
        [sys.executable, "-m", "rewardserve", "models", "--endpoint", server.target], capture_output=True, text=True
    )
    assert "mean(a+b+c)" in shown.stdout and "unspecified" not in shown.stdout, shown.stdout + shown.stderr
    assert server.is_serving("rewardserve.v1.Scoring/all")
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as reply:
        scraped = reply.read().decode()
    assert re.search(r'rewardserve_requests_total\{model="all",status="OK"\} [1-9]', scraped)
    assert re.search(r'rewardserve_pairs_total\{model="all"\} [1-9]', scraped)


def test_steps_are_folded_over_the_members(client) -> None:
    asked = Group(TokenIds(PROMPT), [Steps(token_ids=TokenIds(RESPONSES[1]), ends=[10, 40])])
    results = {name: client.score([asked], model=name, steps=StepOptions("mean")) for name in (*NAMES, "middle")}
    items = {name: result.groups[0].items[0] for name, result in results.items()}
    for step in range(2):
        assert items["middle"].steps[step] == statistics.median(items[name].steps[step] for name in NAMES)
    assert items["middle"].score == pytest.approx(statistics.median(items[name].score for name in NAMES))


FITTED = {"scaled": Temperature(2.0), "curved": Isotonic((0.0, 1.0), (0.5, 0.75))}


def test_an_ensemble_is_calibrated_as_it_was_fitted(start, client, members, tmp_path) -> None:
    plain = client.score([group()], model="all")
    first, second, _ = plain.groups[0].scores
    given = [f"--model={name}={folder}" for name, folder in members.items()]
    for name, calibration in FITTED.items():
        file = tmp_path / f"{name}.json"
        calibration_file.write(file, calibration, Origin("all", plain.model_version, "pairs.jsonl", 10, 5))
        given += [f"--ensemble={name}=mean(a+b+c)", f"--calibration={name}={file}"]
    with RewardClient(start(*given, "--prefix-cache-mb", "16").ready().target) as calibrated:
        for name, calibration in FITTED.items():
            result = calibrated.score([group()], model=name)
            divisor = calibration.temperature if isinstance(calibration, Temperature) else 1
            for item, before in zip(result.groups[0].items, plain.groups[0].items, strict=True):
                assert (item.score, item.raw_or_none) == pytest.approx((before.score / divisor, before.score))
                assert item.std == pytest.approx(before.std / divisor) and item.members == before.members
            pair = calibrated.compare(TokenIds(PROMPT), TokenIds(RESPONSES[0]), TokenIds(RESPONSES[1]), model=name)
            assert pair.probability_a == pytest.approx(calibration.probability(first - second), abs=1e-6)


def test_a_server_with_an_ensemble_wants_a_name(client) -> None:
    with pytest.raises(ModelNotFound, match="name a model"):
        client.score([group()])


def test_members_share_the_cores_of_the_machine(members) -> None:
    models = [flag for name, folder in members.items() for flag in ("--model", f"{name}={folder}")]
    config = load_config([*models, "--ensemble", "two=mean(a+b)"])
    shared = max(1, num_cores() // 2)
    assert [threads_of(config, name) for name in NAMES] == [shared, shared, 0]
    config = load_config([*models, "--ensemble", "two=mean(a+b)", "--threads", "3"])
    assert [threads_of(config, name) for name in NAMES] == [3, 3, 3]
