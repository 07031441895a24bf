"""Everything about the CUDA path in one command of under ten minutes, on a machine where nothing can be installed.

    python benchmarks/gpu/run.py [--seconds 560] [--only gate kernels ...] [--output DIR] [--dry-run]

It needs torch, triton, transformers and numpy; the server and the kernels are taken from the source tree. Every part is
a process of its own (parts.py): one that fails or takes too long costs its own figures and no others. The gate comes
first: kernels against their oracles, families by their canaries, one score bit for bit cold, warm and batched. If it is
red, so is the table, and the exit code is 1. `--dry-run` goes through all of it on a CPU with tiny models: its figures
mean nothing.

Writes <gpu>.json, with all there is, and <gpu>.png where matplotlib is installed.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NOT_DONE = "the gate did not come to its end"
SOURCES = ("server", "kernels", "benchmarks", "tests/support")


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    seconds: float  # at most


# In the order of what is most worth knowing. In all they may take longer than there is time: few take their most.
PARTS = (
    Part("machine", 60),
    Part("gate", 200),
    Part("qwen3-0.6b", 150),
    Part("kernels", 140),
    Part("llama-3.1-8b", 150),
    Part("qwen3-4b", 120),
    Part("qwen3-0.6b variant", 70),
    Part("llama-3.1-8b fp8", 120),
)


def main() -> int:
    options = _options()
    end = time.monotonic() + options.seconds
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for part in PARTS:
            if options.only and part.name not in options.only:
                continue
            seconds = min(part.seconds, end - time.monotonic() - 5)
            if seconds < 15:
                results[part.name] = {"failed": "no time was left for it"}
                continue
            print(f"--- {part.name}, {seconds:.0f} s at most", flush=True)
            started = time.monotonic()
            results[part.name] = _run(part.name, seconds, Path(scratch), options.dry_run)
            results[part.name]["took_s"] = round(time.monotonic() - started, 1)
            if "failed" in results[part.name]:
                print(results[part.name]["failed"], flush=True)
            _write(results, options)  # what is there is there, whatever comes
    red = _red(results)
    print(table(results))
    stem = _write(results, options)
    _draw(results, stem)
    print(f"written to {stem}.json")
    return 1 if red else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=560, help="in all (560)")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], default=[], help="parts to run")
    parser.add_argument("--output", type=Path, default=HERE.parent / "results", help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny models: does it all run?")
    return parser.parse_args()


def _run(name: str, seconds: float, scratch: Path, dry_run: bool) -> dict[str, Any]:
    """What the part wrote down, also if it did not come to its end; then with `failed`, and why."""
    written = scratch / "result.json"
    written.unlink(missing_ok=True)
    path = os.pathsep.join([*(str(ROOT / source) for source in SOURCES), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(HERE / "parts.py"), name, str(scratch), "cpu" if dry_run else "cuda"]
    failed = ""
    with (scratch / "errors").open("w+") as errors:
        try:
            code = subprocess.run(command, env=environment, stderr=errors, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            failed = f"it was not done after {seconds:.0f} s"
        else:
            errors.seek(0)
            failed = f"exit code {code}: {errors.read()[-1500:]}" if code else ""
    result = json.loads(written.read_text()) if written.exists() else {}  # whole: it is replaced, never written over
    return {**result, "failed": failed} if failed else result


def _red(results: dict[str, Any]) -> list[str]:
    """What the gate found wrong, or did not come to."""
    gate = results.get("gate", {})
    red = [check for check, outcome in gate.get("checks", {}).items() if not outcome["ok"]]
    return [*red, *([NOT_DONE] if "failed" in gate else [])]


def table(results: dict[str, Any]) -> str:
    """For people."""
    lines = ["", "=" * 100]
    machine = results.get("machine", {})
    lines.append(f"{machine.get('name', 'unknown GPU')}  torch {machine.get('torch')}  triton {machine.get('triton')}")
    for key in ("copy_gb_per_s", "gemm_tflops", "gemm_fp8_tflops"):
        if key in machine:
            lines.append(f"  {key:18} {machine[key]:.0f}")
    gate = results.get("gate", {})
    checks, red = gate.get("checks", {}), _red(results)
    green, warning = sum(check["ok"] for check in checks.values()), ", RED: figures are no claims" if red else ""
    lines.append(f"gate: {green} of {len(checks)} green{warning}")
    lines += [f"  RED {name}: {checks[name]['detail'] if name in checks else gate['failed']}" for name in red]
    for name, entry in results.get("kernels", {}).get("attention", {}).items():
        best = max(entry["tflops"].items(), key=lambda pair: pair[1], default=("none", 0.0))
        lines.append(
            f"  attention {name:34} {entry['default_tflops']:6.0f} TFLOP/s, best {best[1]:.0f} with {best[0]}"
            f"; torch's flash {entry.get('flash_tflops', float('nan')):.0f}"
        )
    for name, entry in results.get("kernels", {}).get("pool_head", {}).items():
        lines.append(f"  pool_head {name:34} {entry['gb_per_s']:6.0f} GB/s, {entry['share_of_copy']:.0%} of a copy")
    for name, entry in results.get("kernels", {}).get("storing", {}).items():
        lines.append(f"  store_rows {name:33} {entry['gb_per_s']:6.0f} GB/s, {entry['us']:.0f} us for 8,192 rows")
    for part, result in results.items():
        for workload, entry in result.get("workloads", {}).items():
            rates = f"{entry['pairs_per_s']:8.0f} pairs/s {entry['tokens_per_s'] / 1e3:7.0f}k tokens/s"
            lines.append(f"  {part:20} {workload:14} {rates} {entry['share_of_limit']:6.1%} of the limit")
        for key, value in result.get("more", {}).items():
            lines.append(f"  {part:20} {key}: {value}")
        if "failed" in result:
            lines.append(f"  {part:20} FAILED: {result['failed'].strip().splitlines()[-1][:120]}")
    return "\n".join([*lines, "=" * 100])


def _write(results: dict[str, Any], options: argparse.Namespace) -> Path:
    """The file's path without its ending."""
    name = results.get("machine", {}).get("name", "unknown-gpu")
    stem = options.output / (
        re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ("-dry-run" if options.dry_run else "")
    )
    whole = {"date": datetime.date.today().isoformat(), "git": _commit(), "parts": results}
    options.output.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
    return stem


def _commit() -> str:
    """Empty where there is no git, or no repository: a copy of the tree will do."""
    try:
        git = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except OSError:
        return ""
    return git.stdout.strip()


def _draw(results: dict[str, Any], stem: Path) -> None:
    """Share of the limit, workload by workload."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed here")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bars = [
        (f"{part}\n{workload}", entry["share_of_limit"])
        for part, result in results.items()
        for workload, entry in result.get("workloads", {}).items()
    ]
    if not bars:
        return
    figure, axes = plt.subplots(figsize=(2 + 1.1 * len(bars), 4), layout="constrained")
    axes.bar([name for name, _ in bars], [100 * share for _, share in bars], color="#1f6feb")
    axes.axhline(100, color="#b3261e", linewidth=1)
    axes.set_ylabel("% of the least matrix products' rate")
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(results.get("machine", {}).get("name", ""))
    figure.savefig(stem.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    sys.exit(main())
