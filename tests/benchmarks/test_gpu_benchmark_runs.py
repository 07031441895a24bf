"""What will be run on a GPU, once there is one, runs: on a CPU, with tiny models, and one part failing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rewardserve.loadtest import workloads

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton", reason="triton is not installed")


def run(output: Path, *flags: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    command = [sys.executable, ROOT / "benchmarks" / "gpu" / "run.py", "--dry-run", "--output", output, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    (file,) = output.glob("*.json")
    return done, json.loads(file.read_text())


def test_a_model_is_measured_and_a_variant_compared_with_it(tmp_path: Path) -> None:
    done, whole = run(tmp_path, "--only", "machine", "qwen3-0.6b", "llama-3.1-8b fp8")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = whole["parts"]
    assert set(parts["qwen3-0.6b"]["workloads"]) == set(workloads.names())
    for entry in parts["qwen3-0.6b"]["workloads"].values():
        assert entry["pairs"] > 0 and entry["pairs_per_s"] > 0 and entry["share_of_limit"] > 0
    (plain,) = (found for what, found in parts["qwen3-0.6b"]["more"].items() if what.startswith("hugging face"))
    assert len(plain) == 4 and all("of the limit" in outcome for outcome in plain.values()), plain
    assert 0 < parts["llama-3.1-8b fp8"]["more"]["against bf16"]["mean_abs_err"] < 0.2
    assert list(tmp_path.glob("*.png")) and "of the limit" in done.stdout


def test_the_gate_is_green(tmp_path: Path) -> None:
    """On a CPU with tiny models, in bf16 as on a GPU: what is red here would be red there."""
    done, whole = run(tmp_path, "--only", "gate")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = whole["parts"]["gate"]["checks"]
    assert {check["ok"] for check in checks.values()} == {True}
    assert {"a step waits for nothing", "a pair's bits, cold, warm, batched, reordered"} <= set(checks)


def test_a_part_that_has_no_time_costs_itself_alone_and_all_that_is_known_is_written(tmp_path: Path) -> None:
    done, whole = run(tmp_path, "--only", "machine", "gate", "--seconds", "22")
    assert "failed" not in whole["parts"]["machine"]
    assert whole["parts"]["gate"]["failed"] == "no time was left for it"
    assert done.returncode == 1 and "RED the gate did not come to its end" in done.stdout
    assert "FAILED" in done.stdout and done.stdout.rstrip().endswith(".json")
