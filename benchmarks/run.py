"""Measures rewardserve, its peers and the machine's own limit on the same work, in one run.

    python benchmarks/run.py [--quick] [--workloads best_of_16 ...] [--providers vllm ...] [--rounds 5] [--threads 2]

Every provider is a process of its own, on the same cores, with as many threads, in the same precision. All scores are
held to Hugging Face in fp32 before anything is timed (gate.py); how the rounds go is in measure.py, and what the
machine's limit is in work.py. Quote ratios of one run; rates depend on the machine and on who else uses it.
"""

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path

import ids
import random_model
import report
from gate import RedGate
from measure import Plan, measure
from peers.protocol import Job
from providers import PROVIDERS, NotMade
from rewardserve.loadtest import workloads
from rewardserve.loadtest.workloads import Traffic
from rich.console import Console
from tqdm import tqdm

HERE = Path(__file__).parent
CACHE = HERE / ".cache"
DATA = HERE.parents[1] / "shared" / "data"
MAX_LENGTH = 8192
INTERRUPTED = 130  # exit code
CACHE_BYTES = 2 << 30  # of keys and values, for whoever has such a cache

# Groups of each workload: full and quick, on a CPU; a GPU does GPU_TIMES as many. In all, about 45 and 6 minutes on two
# cores, most of them padded peers'.
SIZES = {
    "best_of_16": (4, 1),
    "shared_system": (3, 2),
    "pairs": (64, 4),
    "grpo_64": (2, 1),
    "ppo": (24, 3),
    "short_items": (5, 1),
}
QUICK_RESPONSES = 8  # of a group, at most
GPU_TIMES = 16
GRPO_SCALE = {"cpu": 4, "cuda": 1}


def main() -> int:
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 132)
    _use_cores(options.threads)
    try:
        plan = _plan(options)
        with tqdm(total=plan.num_steps, disable=None if options.quiet else False) as bar:
            begun = itertools.count()
            result = measure(plan, lambda what: _begin(bar, what, next(begun)))
            bar.update()
    except RedGate as error:
        console.print(f"[red]RED GATE[/] {error}")
        return 1
    except (NotMade, workloads.NoData) as error:
        console.print(str(error), markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted before a workload was measured")
        return INTERRUPTED
    report.print_tables(result, console)
    stem = report.file_stem(options.device) + "-quick" * options.quick + "-interrupted" * result.interrupted
    console.print(f"written to {report.write(plan, result, options.output, stem)}", markup=False)
    return INTERRUPTED if result.interrupted else 0


def _begin(bar: tqdm, what: str, number: int) -> None:
    """The step before it, if there was one, is done."""
    bar.update(1 if number else 0)
    bar.set_description(f"{what:40}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=workloads.names(), default=workloads.names())
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=None, help="all, if not given")
    parser.add_argument("--rounds", type=int, default=0, help="times every provider is measured (5; quick: 2)")
    parser.add_argument("--groups", type=int, default=0, help="groups of every workload (by workload)")
    parser.add_argument("--latency-groups", type=int, default=0, help="groups sent alone, at most (8; quick: 2)")
    parser.add_argument("--threads", type=int, default=2, help="cores, and threads of every provider")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(cpu)")
    parser.add_argument("--model", choices=list(random_model.SHAPES), default=None, help="its shape")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the real text")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the result and its picture")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for the model, logs and reference scores")
    parser.add_argument("--quick", action="store_true", help="a small sample of everything")
    parser.add_argument("--quiet", action="store_true", help="no progress where there is no terminal")
    return parser.parse_args()


def _use_cores(count: int) -> None:
    """This process and all it starts."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        raise SystemExit(f"--threads {count}: there are {len(cores)} cores")
    os.sched_setaffinity(0, cores[:count])


def _plan(options: argparse.Namespace) -> Plan:
    name = options.model or ("qwen3-100m" if options.device == "cpu" else "qwen3-0.6b")
    data = options.data if (options.data / "candidates.jsonl.gz").exists() else None
    model = random_model.make(name, options.cache / "models", data)
    job = Job(str(model), options.device, "bfloat16", options.threads, MAX_LENGTH, CACHE_BYTES)
    known = [name for name, provider in PROVIDERS.items() if options.device in provider.devices]
    scale = GRPO_SCALE[options.device]
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]

    def traffic(work: str) -> Traffic:
        return Traffic(_num_groups(options, work), data=options.data, vocab_size=vocab_size, scale=scale)

    works = (
        ids.make(work, traffic(work), model, QUICK_RESPONSES if options.quick else 0, MAX_LENGTH)
        for work in options.workloads
    )
    folder = options.cache / "runs" / time.strftime("%Y-%m-%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    return Plan(
        job,
        tuple(works),
        tuple(options.providers or known),
        options.rounds or (2 if options.quick else 5),
        options.latency_groups or (2 if options.quick else 8),
        folder,
        options.cache / "exact",
    )


def _num_groups(options: argparse.Namespace, workload: str) -> int:
    size = SIZES[workload][1 if options.quick else 0]
    return options.groups or (size if options.device == "cpu" else size * GPU_TIMES)


if __name__ == "__main__":
    sys.exit(main())
