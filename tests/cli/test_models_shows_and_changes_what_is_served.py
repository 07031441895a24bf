import io
import json

import pytest
from rewardserve.cli.models import _show_list
from rewardserve.client import ModelInfo
from rich.console import Console


def test_the_list_is_one_plain_line_for_each_model(cli, server):
    ran = cli("models", server.endpoint)
    assert ran.code == 0 and "\x1b" not in ran.out
    header, _, line, remark = ran.out.splitlines()
    assert header.split()[:5] == ["name", "state", "version", "architecture", "path"]
    assert line.split() == ["toy", "serving", "v1", "Qwen3", "padded", "float32", "cpu", "128", "0"]
    assert remark.strip() == "toy: padded, and so slower: the fake packs nothing"


def test_json_has_every_field(cli, server):
    (model,) = json.loads(cli("models", "list", "--json", server.endpoint).out)
    assert model["name"] == "toy" and model["state"] == "serving" and model["max_length"] == 128
    assert json.loads(cli("models", "get", "toy", "--json", server.endpoint).out) == model


def test_get_shows_the_details(cli, server):
    ran = cli("models", "get", "toy", server.endpoint)
    shown = dict(line.split(maxsplit=1) for line in ran.out.splitlines() if len(line.split()) > 1)
    assert shown["architecture"].strip() == "Qwen3ForSequenceClassification"


def test_a_model_nobody_serves_is_a_failure_that_names_those_served(cli, server):
    ran = cli("models", "get", "other", server.endpoint)
    assert ran.code == 1 and "served are: toy" in ran.err and "--name" not in ran.err


def test_loading_and_unloading_need_the_servers_leave(cli, server):
    for action in (["load", "new", "somewhere"], ["unload", "toy"]):
        ran = cli("models", *action, server.endpoint)
        assert ran.code == 1 and "--allow-model-control" in ran.err and ran.err.count("\n") == 1


def test_what_is_loaded_is_listed_and_what_is_unloaded_is_not(cli, controlled_server):
    endpoint = controlled_server.endpoint
    loaded = cli("models", "load", "new", "somewhere", "--json", endpoint)
    assert loaded.code == 0 and json.loads(loaded.out)["source"] == "somewhere"
    assert [m["name"] for m in json.loads(cli("models", "--json", endpoint).out)] == ["toy", "new"]
    assert cli("models", "load", "new", "somewhere", endpoint).code == 1
    assert cli("models", "unload", "toy", endpoint).out == "unloaded toy\n"
    assert json.loads(cli("models", "unload", "new", "--json", endpoint).out) == {"unloaded": "new"}
    empty = cli("models", endpoint)
    assert empty.code == 0 and empty.out == "" and "no model is served" in empty.err


def test_a_probe_is_told_why_a_model_has_failed_and_not_to_wait_longer(cli, ensemble_server):
    ensemble_server.goes_down("a", "it was killed")
    ran = cli("health", "--timeout=0.3", "--name=a", ensemble_server.endpoint)
    assert ran.code == 1 and "not serving" in ran.err and "give it longer" in ran.err
    ensemble_server.goes_down("a", "it died too often", for_good=True)
    for named in ([], ["--name=a"]):
        ran = cli("health", "--timeout=0.3", *named, ensemble_server.endpoint)
        assert ran.code == 1 and ran.err == "rewardserve health: 'a' has failed: it died too often\n"
    ran = cli("health", "--timeout=0.3", "--name=e", ensemble_server.endpoint)
    assert ran.code == 1 and ran.err == "rewardserve health: 'e' has failed: member 'a': it died too often\n"
    assert cli("health", "--timeout=0.3", "--name=b", ensemble_server.endpoint).code == 0


def test_a_caller_who_does_not_wait_is_told_that_the_change_goes_on(cli, controlled_server):
    ran = cli("models", "load", "new", "somewhere", "--timeout=1e-6", controlled_server.endpoint)
    assert ran.code == 1 and "DEADLINE_EXCEEDED" in ran.err and "goes on" in ran.err


def test_a_server_that_answers_is_not_looked_for(cli, ensemble_server):
    endpoint = ensemble_server.endpoint
    assert cli("models", "unload", "b", endpoint).code == 0
    ran = cli("rank", "--name=e", "--prompt=x", "--response=y", "--timeout=60", endpoint)  # it gives up by itself
    assert ran.code == 1 and "member 'b'" in ran.err
    assert "`rewardserve models` says" in ran.err and "is a server there?" not in ran.err


def test_of_several_servers_each_line_says_which(cli, server, controlled_server):
    ran = cli("models", server.endpoint, controlled_server.endpoint)
    endpoints = {each.endpoint.removeprefix("--endpoint=") for each in (server, controlled_server)}
    lines = [line for line in ran.out.splitlines() if line.startswith("toy")]
    assert {line.split()[-1] for line in lines} == endpoints


@pytest.mark.parametrize(("width", "left_out"), [(130, ""), (80, "device, dtype, architecture"), (20, "restarts")])
def test_a_narrow_terminal_leaves_out_columns_and_never_a_name_or_a_state(width, left_out):
    model = ModelInfo("seed-0", "c1ad5c9c5c1a-bf16-adapted", "serving", "a:1", path="packed")
    ensemble = ModelInfo("rm", "", "restarting", "a:1", members=("seed-0", "seed-1", "seed-2"))
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    _show_list(console, [model, ensemble])
    header, _, first, second, *rest = console.file.getvalue().splitlines()
    assert header.split()[:2] == ["name", "state"]
    assert first.split()[:2] == ["seed-0", "serving"] and second.split()[:2] == ["rm", "restarting"]
    assert all(len(line) <= width for line in (header, first, second))
    assert bool(rest) == bool(left_out) and left_out in " ".join(rest)
