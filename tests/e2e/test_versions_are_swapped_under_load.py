"""A new version takes a name over under load: no request fails, none is scored by two, and there is a way back."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoints import make_model, padded_scores, save_checkpoint
from rewardserve.client import CanaryPair, Group, PermissionDenied, RewardClient, ServerError, TokenIds
from rewardserve.evaluation import calibration_file
from rewardserve.evaluation.calibration_file import BESIDE, Origin, Temperature

PROMPT, RESPONSES = list(range(5, 205)), [list(range(10, 10 + n)) for n in (3, 40, 9, 70)]
ROWS = [[*PROMPT, *response] for response in RESPONSES]


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> dict[str, Path]:
    """The second ranks as the first does, `reversed` the other way round, `other` is another model of their shapes, and
    `broken` gives no number."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("first", "second", "reversed", "broken", "other")}
    model = save_checkpoint(folders["first"])
    with torch.no_grad():
        other = make_model("qwen3")
        for parameter in other.parameters():
            parameter.mul_(1.2 + 0.1 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(4)))
    other.save_pretrained(folders["other"])
    for name, change in (("second", 1.01), ("reversed", -1.0), ("broken", float("nan"))):
        with torch.no_grad():
            model.score.weight.mul_(change / (1.01 if name == "reversed" else 1.0))
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def wanted(versions) -> dict[str, torch.Tensor]:
    return {name: padded_scores(folder, ROWS, torch.float32) for name, folder in versions.items()}


@pytest.fixture(scope="module")
def server(start, versions):
    models = [f"--model={name}={versions['first']}" for name in ("rm", "fresh")]
    return start(*models, "--allow-model-control", "--prefix-cache-mb", "16").ready()


@pytest.fixture
def client(server, versions) -> Iterator[RewardClient]:
    """With 'rm' at its first version."""
    with RewardClient(server.target, timeout=120) as client:
        client.update_weights("rm", str(versions["first"]))
        yield client


def group() -> Group:
    return Group(TokenIds(PROMPT), [TokenIds(response) for response in RESPONSES])


def scored(client: RewardClient) -> tuple[str, torch.Tensor]:
    result = client.score([group()], model="rm")
    return result.model_version, torch.tensor(result.groups[0].scores)


def agrees(scores: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((scores - wanted).abs().max() <= 1e-5 * wanted.abs().max())


class Load:
    """Callers that go on asking until told to stop, and what each got."""

    def __init__(self, client: RewardClient, num_callers: int = 2) -> None:
        self.answers: list[tuple[str, torch.Tensor]] = []
        self.errors: list[Exception] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(client,)) for _ in range(num_callers)]

    def _ask(self, client: RewardClient) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(scored(client))
                time.sleep(0.02)  # the machine has others to serve: what is loading, for one
            except Exception as error:
                self.errors.append(error)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_no_call_fails_and_none_is_mixed_while_versions_change_under_load(client, versions, wanted) -> None:
    by_version = {client.get_model("rm").version: "first"}
    with Load(client) as load:
        for name in ("second", "first"):
            (result,) = client.swap_model("rm", str(versions[name]))
            by_version[result.model.version] = name
            assert result.model.source == str(versions[name]) and result.previous_version != result.model.version
    assert not load.errors, load.errors[0]
    assert {by_version[version] for version, _ in load.answers} == {"first", "second"}
    for version, scores in load.answers:
        assert agrees(scores, wanted[by_version[version]])


@pytest.mark.parametrize("keep", [True, False])
def test_a_rollback_brings_the_version_before_back(client, versions, wanted, keep: bool) -> None:
    first = client.get_model("rm").version
    client.swap_model("rm", str(versions["reversed"]), keep_previous=keep)
    assert agrees(scored(client)[1], wanted["reversed"])
    with Load(client) as load:
        assert client.rollback_model("rm").version == first
    assert not load.errors
    version, scores = scored(client)
    assert version == first and agrees(scores, wanted["first"])


def test_without_a_swap_there_is_nothing_to_go_back_to(client) -> None:
    with pytest.raises(ServerError, match="nothing to go back to"):
        client.rollback_model("fresh")


def test_canaries_that_the_new_version_ranks_wrong_keep_the_old_one(client, versions, wanted) -> None:
    first = client.get_model("rm").version
    order = wanted["first"].argsort(descending=True).tolist()
    best, worst = (TokenIds(RESPONSES[i]) for i in (order[0], order[-1]))
    right, wrong = CanaryPair(TokenIds(PROMPT), best, worst), CanaryPair(TokenIds(PROMPT), worst, best)
    with pytest.raises(ServerError, match="ranks 0 of 1 canary pairs right"):
        client.swap_model("rm", str(versions["reversed"]), canaries=[right])
    too_long = CanaryPair(TokenIds([5] * 100_000), best, worst)
    with pytest.raises(ServerError, match=r"canaries\[1\] has no score"):
        client.swap_model("rm", str(versions["second"]), canaries=[right, too_long])
    version, scores = scored(client)
    assert version == first and agrees(scores, wanted["first"])
    (result,) = client.swap_model("rm", str(versions["second"]), canaries=[right, wrong], min_canary_accuracy=0.5)
    assert (result.num_canaries, result.num_canaries_right) == (2, 1)


def test_weights_that_became_nan_are_not_taken_over(client, versions, wanted) -> None:
    first = client.get_model("rm").version
    for take_over in (client.swap_model, client.update_weights):
        with pytest.raises(ServerError, match=r"no score for an input .* may have become NaN in training"):
            take_over("rm", str(versions["broken"]))
        version, scores = scored(client)
        assert version == first and agrees(scores, wanted["first"])


def test_shadowed_requests_tell_how_alike_the_versions_rank(client, versions, wanted) -> None:
    first = client.get_model("rm").version
    with Load(client) as load:
        options = {"shadow_share": 1.0, "shadow_requests": 5, "min_rank_correlation": 0.9}
        with pytest.raises(ServerError, match=r"rank correlation with the old version: it is -1\.000"):
            client.swap_model("rm", str(versions["reversed"]), **options)
        assert client.get_model("rm").version == first
        (result,) = client.swap_model("rm", str(versions["second"]), **options)
    assert not load.errors
    assert result.rank_correlation == pytest.approx(1.0) and result.num_shadow_requests >= 5


def test_a_checkpoint_that_does_not_load_leaves_all_as_it_was(client, versions, wanted, tmp_path) -> None:
    with pytest.raises(ServerError, match="no such folder"):
        client.swap_model("rm", str(tmp_path / "nowhere"))
    assert agrees(scored(client)[1], wanted["first"])


def test_swapping_is_off_unless_it_was_switched_on(start, versions) -> None:
    server = start("--model", f"rm={versions['first']}", "--prefix-cache-mb", "16").ready()
    with RewardClient(server.target) as client, pytest.raises(PermissionDenied):
        client.swap_model("rm", str(versions["second"]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_taken_over_in_place_and_no_call_fails_or_is_mixed(start, versions, wanted, dtype: str) -> None:
    """In bf16 the layers keep their weights in the CPU's own layout."""
    server = start(
        *("--model", f"rm={versions['first']}", "--dtype", dtype, "--compile", "off"),
        *("--allow-model-control", "--prefix-cache-mb", "16"),
    ).ready()
    engine = server.engine().pid
    rounded = {name: padded_scores(folder, ROWS, getattr(torch, dtype)) for name, folder in versions.items()}
    tolerance = 1e-5 if dtype == "float32" else 0.05
    with RewardClient(server.target, timeout=120) as client:
        by_version = {client.get_model("rm").version: "first"}
        with Load(client) as load:
            for name in ("reversed", "other", "first"):
                by_version[client.update_weights("rm", str(versions[name])).version] = name
                scored(client)
        assert not load.errors, load.errors[0]
        assert {by_version[version] for version, _ in load.answers} == {"first", "other", "reversed"}
        for version, scores in load.answers:
            right = rounded[by_version[version]]
            assert (scores - right).abs().max() <= tolerance * right.abs().max()
    assert server.engine().pid == engine, "it was loaded anew"


def test_what_has_other_shapes_is_refused_and_nothing_has_changed(client, wanted, tmp_path) -> None:
    before = client.get_model("rm").version
    for number, change in enumerate(({"intermediate_size": 96}, {"num_hidden_layers": 2}, {"family": "llama"})):
        folder = tmp_path / str(number)
        save_checkpoint(folder, **change)
        with pytest.raises(ServerError, match="use Swap"):
            client.update_weights("rm", str(folder))
    version, scores = scored(client)
    assert version == before and agrees(scores, wanted["first"])


@pytest.mark.parametrize("change", [{"rope_theta": 123.0}, {"mean": 3.0, "std": 2.0}, {"rms_norm_eps": 0.01}])
def test_weights_of_a_model_that_is_scored_otherwise_are_not_taken_over(client, versions, tmp_path, change) -> None:
    before, folder = client.get_model("rm").version, tmp_path / "other"
    shutil.copytree(versions["other"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ServerError, match=f"{next(iter(change))} is not what is loaded; use Swap"):
        client.update_weights("rm", str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "rewardserve.toml").write_text('[head]\nkind = "linear"\nweights = "score"\n[read]\nat = "mean"\n')
    with pytest.raises(ServerError, match="use Swap"):
        client.update_weights("rm", str(folder))
    assert client.get_model("rm").version == before


def test_one_swap_at_a_time_and_none_of_what_is_unloaded(server, client, versions) -> None:
    with ThreadPoolExecutor(2) as callers:
        swaps = [callers.submit(client.swap_model, "rm", str(versions["other"])) for _ in range(2)]
        errors = [error for swap in swaps if (error := swap.exception()) is not None]
    assert len(errors) == 1 and "is being swapped already" in str(errors[0])


def test_an_engine_that_is_restarted_loads_the_weights_it_had(start, versions, wanted, tmp_path) -> None:
    latest = tmp_path / "latest"
    latest.symlink_to(versions["other"])
    server = start("--model", f"rm={versions['first']}", "--allow-model-control", "--prefix-cache-mb", "16").ready()
    with RewardClient(server.target, timeout=120) as client:
        version = client.update_weights("rm", str(latest)).version
        latest.unlink()
        latest.symlink_to(versions["second"])
        server.engine().kill()
        after, scores = scored(client)
    assert after == version and agrees(scores, wanted["other"])


def test_a_new_version_brings_the_calibration_that_lies_beside_it(client, versions, tmp_path) -> None:
    plain = client.score([group()], model="rm")
    shutil.copytree(versions["second"], tmp_path / "new")
    new = str(tmp_path / "new")
    version = client.update_weights("rm", new).version
    origin = Origin("rm", version, "pairs.jsonl", 10, 5)
    calibration_file.write(tmp_path / "new" / BESIDE, Temperature(4.0), origin)
    raw = client.score([group()], model="rm").groups[0].scores
    client.update_weights("rm", str(versions["first"]))
    for change in (client.swap_model, client.update_weights):
        change("rm", new)
        result = client.score([group()], model="rm")
        assert result.groups[0].scores == pytest.approx([score / 4 for score in raw])
        assert {item.kind for item in result.groups[0].items} == {"normalized"}
        assert result.model_version == client.get_model("rm").version != version
        client.update_weights("rm", str(versions["first"]))
        assert client.score([group()], model="rm").groups[0].scores == plain.groups[0].scores
    (tmp_path / "new" / BESIDE).write_text("{}")
    for change in (client.swap_model, client.update_weights):
        with pytest.raises(ServerError, match=BESIDE):
            change("rm", new)
        assert client.score([group()], model="rm").model_version == plain.model_version
