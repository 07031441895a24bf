"""A real run on a tiny model: our engine and padded Hugging Face, one round."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FIGURES = {"pairs_per_s", "p50_ms", "p99_ms", "peak_bytes", "max_abs_err", "mean_abs_err"}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("benchmark")
    words = ["--model", "qwen3-tiny", "--workloads", "short_items", "--providers", "rewardserve_engine", "hf_padded"]
    words += ["--rounds", "1", "--groups", "2", "--threads", "1", "--latency-groups", "2", "--quiet"]
    words += ["--data", str(folder), "--cache", str(folder / "cache"), "--output", str(folder / "out")]
    done = subprocess.run([sys.executable, BENCHMARKS / "run.py", *words], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pairs/s" in done.stdout
    [file] = (folder / "out").glob("*.json")
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return json.loads(file.read_text())


def test_the_circumstances_are_written(result: dict[str, Any]) -> None:
    assert {"machine", "versions", "git", "date", "workloads"} <= set(result)
    assert result["machine"]["threads"] == 1
    assert "torch" in result["versions"]["rewardserve_engine"]


def test_a_workload_says_how_much_it_is(result: dict[str, Any]) -> None:
    workload = result["workloads"]["short_items"]
    assert workload["pairs"] == 20
    assert workload["tokens"] == 20 * 300
    assert workload["tokens_shared"] == 2 * (120 + 10 * 180)
    assert workload["limit_pairs_per_s"] > 0


def test_a_provider_has_every_figure(result: dict[str, Any]) -> None:
    for provider in result["workloads"]["short_items"]["providers"].values():
        assert set(provider) >= FIGURES
        assert all(math.isfinite(provider[name]) for name in FIGURES)
        assert provider["pairs_per_s"] > 0 and provider["p99_ms"] >= provider["p50_ms"] > 0
        assert provider["peak_bytes"] > 50e6
        assert len(provider["seconds"]) == 1 and len(provider["latency_ms"]) == 2
