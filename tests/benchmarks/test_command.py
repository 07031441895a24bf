"""The command with pretended providers: what it prints, writes and returns when all is well and when it is not."""

import json
from pathlib import Path

import measure
import providers
import pytest
import run
from providers import Provider


def pretend(error: float, ours: bool = False) -> Provider:
    return Provider("pretend_peer", (str(error),), ours=ours)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model is made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def command(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs it on a synthetic workload with the providers given; returns its status and the folder it wrote to."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(run, "_use_cores", lambda count: None)
    monkeypatch.setattr(measure, "REFERENCE", pretend(0.0))
    monkeypatch.setattr(measure, "MACHINE", pretend(0.0))

    def call(fleet: dict[str, Provider], *flags: str) -> tuple[int, Path]:
        for name in [*providers.PROVIDERS]:
            monkeypatch.delitem(providers.PROVIDERS, name)
        for name, provider in fleet.items():
            monkeypatch.setitem(providers.PROVIDERS, name, provider)
        words = ["run.py", "--model", "qwen3-tiny", "--data", str(tmp_path), "--cache", str(cache)]
        words += ["--rounds", "2", "--groups", "2", "--output", str(tmp_path / "out"), "--quiet"]
        monkeypatch.setattr("sys.argv", [*words, *(flags or ("--workloads", "short_items"))])
        return run.main(), tmp_path / "out"

    return call


def test_a_provider_that_is_wrong_is_shown_without_figures(command, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = {"rewardserve_engine": pretend(0.01, ours=True), "hf_padded": pretend(0.01), "liar": pretend(1.0)}
    status, folder = command(fleet)
    assert status == 0
    assert "WRONG" in capsys.readouterr().out
    [file] = folder.glob("*.json")
    for workload in json.loads(file.read_text())["workloads"].values():
        liar = workload["providers"]["liar"]
        assert liar["wrong"] is True and liar["mean_abs_err"] == pytest.approx(1.0)
        assert set(liar) == {"wrong", "max_abs_err", "mean_abs_err"}
        assert len(workload["providers"]["hf_padded"]["seconds"]) == 2


def test_when_ours_is_wrong_no_speed_is_printed_or_written(command, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = {"rewardserve_engine": pretend(0.01, ours=True), "rewardserve_grpc": pretend(0.7, ours=True)}
    status, folder = command({**fleet, "hf_padded": pretend(0.01)})
    printed = capsys.readouterr().out
    assert status == 1
    assert "RED GATE" in printed and "rewardserve_grpc is off by 0.7" in printed
    assert "pairs/s" not in printed
    assert not folder.exists()


def test_when_ours_gives_no_scores_the_gate_is_red_too(command, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = command({"rewardserve_engine": Provider("no_such_module", ours=True), "hf_padded": pretend(0.01)})
    assert status == 1
    assert "rewardserve_engine gave no scores" in " ".join(capsys.readouterr().out.split())


def test_a_peer_that_cannot_is_shown_with_its_reason(command, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = {"rewardserve_engine": pretend(0.0, ours=True), "broken": Provider("no_such_module")}
    status, folder = command(fleet)
    assert status == 0
    [file] = folder.glob("*.json")
    broken = json.loads(file.read_text())["workloads"]["short_items"]["providers"]["broken"]
    assert broken["failed"].startswith("its process ended with 1")


@pytest.mark.parametrize("first", [True, False])
def test_who_interrupts_it_keeps_the_workloads_that_were_measured(
    command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    run_rounds = measure._Fleet.run_rounds

    def interrupted(fleet, result) -> None:
        if first or result.work.workload.name == "ppo":
            raise KeyboardInterrupt
        run_rounds(fleet, result)

    monkeypatch.setattr(measure._Fleet, "run_rounds", interrupted)
    status, folder = command(
        {"rewardserve_engine": pretend(0.0, ours=True)}, "--workloads", "short_items", "ppo", "--groups", "1"
    )
    assert status == 130
    if first:
        assert "before a workload was measured" in capsys.readouterr().out and not folder.exists()
    else:
        (file,) = folder.glob("*-interrupted.json")
        assert list(json.loads(file.read_text())["workloads"]) == ["short_items"]


def test_a_missing_environment_names_make_peers(
    command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(providers, "VENVS", tmp_path)
    status, _ = command({"vllm": Provider("peers.vllm", venv="vllm")})
    assert status == 2
    assert "make peers" in capsys.readouterr().out


def test_real_text_that_is_missing_is_said(command, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = command({"rewardserve_engine": pretend(0.0, ours=True)}, "--workloads", "best_of_16")
    assert status == 2
    assert "candidates.jsonl.gz" in capsys.readouterr().out
