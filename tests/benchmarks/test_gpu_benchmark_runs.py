"""What will be run on a GPU, once there is one, runs: on a CPU, with tiny models; and what a part does that fails."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rewardserve.loadtest import workloads

ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks" / "gpu"
pytest.importorskip("triton", reason="triton is not installed")
in_time = pytest.mark.timeout(600)  # the first of them waits for the whole run


PARTS_RUN = ("compile", "gate", "kernels", "llama-3.1-8b", "hugging face", "fp8", "invariance", "tunings")


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One run of nearly all parts, on a bare machine: what it printed, what it found, where it wrote to."""
    folder = tmp_path_factory.mktemp("dry")
    command = [sys.executable, GPU / "run.py", "--dry-run", "--output", folder, "--only", *PARTS_RUN]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests/support/bare")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*.json")
    return SimpleNamespace(said=done.stdout, parts=json.loads(file.read_text())["parts"], folder=folder)


@in_time
def test_parts_are_run_in_their_order_and_a_picture_is_drawn(dry: SimpleNamespace) -> None:
    gates = ["gate kernels", "gate families", "gate engine"]
    assert list(dry.parts) == ["machine", "compile", *gates, *PARTS_RUN[2:]]
    assert list(dry.folder.glob("*.png")) and "of the limit" in dry.said
    for part in dry.parts.values():
        assert {"date", "git", "flags"} == set(part["ran"]) and part["took_s"] > 0


@in_time
def test_a_model_is_measured_hugging_face_beside_it_and_8_bits_compared_with_it(dry: SimpleNamespace) -> None:
    model = dry.parts["llama-3.1-8b"]
    assert set(model["workloads"]) == set(workloads.names())
    for entry in model["workloads"].values():
        assert entry["pairs"] > 0 and entry["pairs_per_s"] > 0
        assert entry["share_of_limit"] > 0 and entry["share_of_products"] > 0
    assert model["runs"]["path"] == "packed"
    ((_, plain),) = dry.parts["hugging face"]["hugging_face"].items()
    assert len(plain) == 4 and all(entry["share_of_limit"] > 0 for entry in plain.values()), plain
    more = dry.parts["fp8"]["more"]
    assert 0 < more["against bf16"]["mean_abs_err"] < 0.2
    trained = more["demo model against fp32"]
    assert 0 < trained["bf16"]["mean_abs_err"] < trained["fp8"]["mean_abs_err"] < 0.2


@in_time
def test_the_gate_is_green(dry: SimpleNamespace) -> None:
    """On a CPU with tiny models, in bf16 as on a GPU: what is red here would be red there."""
    gate = {name: part["checks"] for name, part in dry.parts.items() if name.startswith("gate ")}
    assert all(check["ok"] for checks in gate.values() for check in checks.values()), gate
    assert {"a step waits for nothing", "a pair's bits, cold, warm, batched, reordered"} <= set(gate["gate engine"])


@in_time
def test_kernels_are_compiled_ahead_and_measured(dry: SimpleNamespace) -> None:
    compiled = dry.parts["compile"]["compiled_s"]
    assert len(compiled) == 2 and all(isinstance(seconds, float) for seconds in compiled.values()), compiled
    assert dry.parts["kernels"]["attention"] and dry.parts["kernels"]["sums"]


@in_time
def test_two_engines_side_by_side_are_compared_round_by_round(dry: SimpleNamespace) -> None:
    assert list(map(len, dry.parts["invariance"]["ratios"].values())) == [2, 2]


# -- parts that fail: run.py itself, and processes that do what these lines say --------------------------------------

PARTS = """
import json, subprocess, sys, time
from pathlib import Path

name, folder, device, size = sys.argv[1:]
if name == "invariance":
    raise ImportError("not on this machine")
if not sys.stdin.readline():
    sys.exit()  # nothing is asked of it


def note(**found):
    (Path(folder) / f"{name}.json").write_text(json.dumps(found))


match name:
    case "machine":
        note(name="a machine")
    case "kernels":
        note(attention={}, known_before=1)
        print("a warning, on the way", file=sys.stderr)
        raise ValueError("this part is broken")
    case "hugging face":
        note(known_before=2)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", __file__])
        time.sleep(600)
    case "fp8":
        print("attention by the library's products: it differs", file=sys.stderr)
        note(more={"all": "is well"})
    case _ if name.startswith("gate "):
        note(checks={f"{name} holds": {"ok": True, "detail": "as it should"}})
"""
MAIN = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv.pop(1))
import run

run.PROGRAM, run.LEAST_S, run.TO_WRITE_S = Path(sys.argv.pop(1)), 1, 0
sys.exit(run.main())
"""


def left_over(parts: Path) -> bool:
    """Whether what "hugging face" started, with the folder of `parts` to be told by, still runs."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = file.read_bytes()
        except OSError:  # it has just ended
            continue
        if b"time.sleep(600)" in command and str(parts).encode() in command:
            return True
    return False


def run_others(folder: Path, *flags: str, code: int) -> tuple[str, dict]:
    """run.py with PARTS for its parts, not as a dry run -> what it printed, and the file."""
    (folder / "parts.py").write_text(PARTS)
    command = [sys.executable, "-c", MAIN, GPU, folder / "parts.py", "--output", folder, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "a-machine.json").read_text())


def test_a_part_that_crashes_costs_its_own_figures_and_the_exit_code(tmp_path: Path) -> None:
    said, whole = run_others(tmp_path, "--only", "gate", "kernels", "fp8", code=1)
    broken = whole["parts"]["kernels"]
    assert broken["failed"] == "exit code 1: ValueError: this part is broken"
    assert broken["known_before"] == 1
    assert "a warning, on the way" in broken["stderr"] and "Traceback" in broken["stderr"]
    assert whole["parts"]["fp8"]["more"] == {"all": "is well"}
    assert "kernels        FAILED: exit code 1: ValueError: this part is broken" in said
    assert "gate: 3 of 3 green\n" in said


def test_a_part_that_cannot_even_begin_says_why(tmp_path: Path) -> None:
    """It has ended by the time it is told to go."""
    _, whole = run_others(tmp_path, "--only", "gate", "fp8", "invariance", code=1)
    assert whole["parts"]["invariance"]["failed"] == "exit code 1: ImportError: not on this machine"


def test_a_part_that_takes_too_long_is_stopped_with_all_it_started_and_what_it_knew_is_kept(tmp_path: Path) -> None:
    begun = time.monotonic()
    _, whole = run_others(tmp_path, "--only", "gate", "hugging face", "fp8", "--seconds", "8", code=1)
    assert time.monotonic() - begun < 60
    slow = whole["parts"]["hugging face"]
    assert slow["failed"].startswith("it was not done after") and slow["known_before"] == 2
    assert whole["parts"]["fp8"]["failed"] == "no time was left for it"
    assert not left_over(tmp_path)


def test_who_ends_the_run_ends_its_parts(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(PARTS)
    command = [sys.executable, "-c", MAIN, GPU, tmp_path / "parts.py", "--output", tmp_path, "--only", "hugging face"]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 60
        while not left_over(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left_over(tmp_path)
        process.terminate()
    assert process.returncode == 1 and not left_over(tmp_path)


def test_what_went_well_ends_well_and_what_was_said_on_the_way_is_kept(tmp_path: Path) -> None:
    _, whole = run_others(tmp_path, "--only", "gate", "fp8", code=0)
    assert whole["parts"]["fp8"]["stderr"].strip() == "attention by the library's products: it differs"


def test_figures_without_a_gate_are_red(tmp_path: Path) -> None:
    said, _ = run_others(tmp_path, "--only", "fp8", code=1)
    assert "RED gate kernels: it was not run" in said


def test_other_parts_of_a_file_stay_as_they_were_measured(tmp_path: Path) -> None:
    _, first = run_others(tmp_path, "--only", "gate", "fp8", code=0)
    _, then = run_others(tmp_path, "--only", "gate", "kernels", code=1)
    assert then["parts"]["fp8"] == first["parts"]["fp8"]
    assert then["parts"]["machine"]["ran"]["flags"] != first["parts"]["machine"]["ran"]["flags"]
    assert list(then["parts"]).index("kernels") < list(then["parts"]).index("fp8")


def test_a_picture_can_be_drawn_later(tmp_path: Path) -> None:
    entry = {"share_of_limit": 0.5}
    parts = {
        "machine": {"name": "a machine"},
        "qwen3-0.6b": {"workloads": {"best_of_16": entry}},
        "hugging face": {"hugging_face": {"qwen3-0.6b": {"best_of_16, sorted": {"share_of_limit": 0.1}}}},
    }
    (tmp_path / "it.json").write_text(json.dumps({"parts": parts}))
    command = [sys.executable, GPU / "run.py", "--draw", tmp_path / "it.json"]
    subprocess.run(command, check=True, timeout=120)
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


def test_a_part_that_there_is_not_is_refused_by_name() -> None:
    command = [sys.executable, GPU / "run.py", "--only", "kernel"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "kernel: no such part; there are machine, compile" in done.stderr
