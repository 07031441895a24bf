"""What bench-gpu does on a GPU and nowhere else, on one that is pretended (tests/support/pretend_gpu.py): Triton's
kernels by the gate and by the clock of events, and a model that runs as it is meant to, and in every other way. With
nothing installed beyond what a GPU's image has.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("server", "kernels", "benchmarks", "benchmarks/gpu", "tests/support", "tests/support/bare")
pytest.importorskip("triton", reason="triton is not installed")

# As small as can be: every kernel is interpreted.
BEGIN = """
import json, sys
from pathlib import Path
import pretend_gpu, sitecustomize

from rewardserve.engine.native import graphs
from rewardserve_kernels.attention import triton

sitecustomize.WITHOUT.add("psutil")
pretend_gpu.pretend()
graphs.MAX_READS, graphs.MAX_SEGMENTS, graphs.MAX_TABLE = 8, 8, 64
graphs.BUCKETS, graphs.WARM_UPS = (128,), 1

import model_figures, parts, random_model, score_errors, served
from part import Part


def found(name):
    part = Part(name, Path(sys.argv[1]), "cuda", tiny=True)
    parts.PARTS[name](part)
    return part.found


"""
KERNELS = """
print("found", json.dumps({name: found(name) for name in ("machine", "gate kernels", "kernels")}))
"""
MODEL = """
served.TRAFFIC["best_of_16"] = served.Traffic(64, 2, 32)
for name in set(served.TRAFFIC) - {"best_of_16"}:
    del served.TRAFFIC[name]
served.ROUND_TOKENS[served.TINY] = score_errors.PROBE_TOKENS_TINY = 8
model_figures.ROUNDS = model_figures.WAY_ROUNDS = model_figures.BUDGET_ROUNDS = model_figures.LATENCIES_TINY = 1
hidden, layers, *rest = random_model.SHAPES[served.TINY]
random_model.SHAPES[served.TINY] = (hidden, 2, *rest)
print("found", json.dumps({name: found(name) for name in ("machine", "qwen3-0.6b")}))
"""


def run(program: str, folder: Path) -> dict:
    path = os.pathsep.join(str(ROOT / source) for source in SOURCES)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", "-c", BEGIN + program, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("found "))
    return json.loads(line.removeprefix("found "))


def test_triton_s_kernels_go_through_the_gate_and_are_timed(tmp_path: Path) -> None:
    found = run(KERNELS, tmp_path)
    assert found["machine"]["name"] == "Pretended GPU"
    checks = found["gate kernels"]["checks"]
    assert len(checks) > 8 and all(check["ok"] for check in checks.values()), checks
    assert all(entry["tflops"] > 0 for entry in found["kernels"]["attention"].values())
    for kind in ("pool_head", "storing", "sums"):
        assert all(entry["us"] > 0 and entry["share_of_copy"] for entry in found["kernels"][kind].values()), kind


def test_a_model_is_measured_as_it_is_meant_to_run_and_in_every_other_way(tmp_path: Path) -> None:
    model = run(MODEL, tmp_path)["qwen3-0.6b"]
    ours = {kind: f"rewardserve_kernels.{kind}.triton" for kind in ("attention", "pooling")}
    assert model["runs"].items() >= {**ours, "path": "packed", "compiled": True, "pruned": True, "graphs": 1}.items()
    assert model["workloads"]["best_of_16"]["pairs_per_s"] > 0 and model["probe"]
    more = model["more"]
    assert len(more["best_of_16 with"]) == 4 and set(more["one group of 256 + 4 x 64"]) == {"graphs", "no graphs"}
    assert more["512 tokens to and from host memory"]["back_ms"] > 0
