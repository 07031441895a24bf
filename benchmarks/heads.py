"""What does a head that reads more than the last token cost? The same tokens, the prefix cache on, the engine alone.

    python benchmarks/heads.py [--threads 2] [--rounds 5]

One 100M backbone in bf16 with four heads: linear at the last token; a process reward model with a step every 24 tokens;
a linear head on the mean of all tokens; a gated mixture of 19 objectives whose gate is read in the prompt. Rounds are
interleaved; each is cold (prompts that are new to the cache) and warm (the same again). Writes
benchmarks/results/heads_cpu.json.
"""

import argparse
import asyncio
import datetime
import json
import random
import shutil
import statistics
import sys
import time
from pathlib import Path

import random_model
import report
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
CACHE = HERE / ".cache"
RESULT = HERE / "results" / "heads_cpu.json"
TAG, PATTERN = 11, [12, 13, 14, 15, 16]
GROUPS, RESPONSES, PROMPT, RESPONSE, STEP = 6, 8, 384, 192, 24
WITHIN = 0.9  # of the linear head's rate

IdGroups = list[tuple[list[int], list[list[int]]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="torch threads of each engine")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    options = parser.parse_args()
    rates = asyncio.run(_measure(_checkpoints(), options.threads, options.rounds))
    _print(rates)
    RESULT.write_text(json.dumps(_result(rates, options.threads), indent=1) + "\n")
    print(f"written to {RESULT.relative_to(HERE.parent)}")
    return int(any(ratio < WITHIN for ratio in _ratios(rates).values()))


def _checkpoints() -> dict[str, Path]:
    import torch
    from safetensors.torch import load_file, save_file

    plain = random_model.make("qwen3-100m", CACHE, None)
    weights = load_file(plain / "model.safetensors")
    score, hidden = weights["score.weight"], weights["score.weight"].shape[1]
    torch.manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape) / hidden**0.5

    gate = {f"gating.layers.{i}.weight": normal(1024, hidden if i == 0 else 1024) for i in range(3)}
    gate |= {f"gating.layers.{i}.bias": normal(1024) for i in range(3)}
    gate |= {"gating.layers.3.weight": normal(19, 1024), "gating.layers.3.bias": normal(19)}
    gate |= {"gating.logit_scale": torch.ones(1), "reward_transform_matrix": normal(19, 19)}
    mlp = {"score.0.weight": normal(hidden, hidden), "score.0.bias": normal(hidden)}
    mlp |= {"score.2.weight": normal(2, hidden), "score.2.bias": normal(2)}
    told = {
        "linear": ({"score.weight": score}, {}, '[head]\nkind = "linear"\nweights = "score"\n'),
        "process": (
            mlp,
            {},
            '[head]\nkind = "mlp"\nweights = "score"\noutputs = 2\n'
            f'[read]\nat = "every"\npattern = [{TAG}]\n[score]\nprobability_of = 1\n',
        ),
        "mean": ({"score.weight": score}, {}, '[head]\nkind = "linear"\nweights = "score"\n[read]\nat = "mean"\n'),
        "gated": (
            gate | {"regression_layer.weight": normal(19, hidden)},
            {"architectures": ["LlamaForRewardModelWithGating"], "gating_pattern": PATTERN},
            None,
        ),
    }
    folders = {}
    for name, (head, config, spec_file) in told.items():
        folder = folders[name] = CACHE / f"heads-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("*.safetensors", "done"))
        body = {key: tensor for key, tensor in weights.items() if key != "score.weight"}
        save_file(body | {key: tensor.bfloat16() for key, tensor in head.items()}, folder / "model.safetensors")
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        if spec_file is not None:
            (folder / "rewardserve.toml").write_text(spec_file)
    return folders


def _groups(seed: int) -> IdGroups:
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(20, 250) for _ in range(count)]

    def stepped() -> list[int]:
        return [token for _ in range(RESPONSE // STEP) for token in (*ids(STEP - 1), TAG)]

    return [
        ([*ids(PROMPT - len(PATTERN) - 10), *PATTERN, *ids(10)], [stepped() for _ in range(RESPONSES)])
        for _ in range(GROUPS)
    ]


async def _measure(folders: dict[str, Path], threads: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Pairs per second: [head][cold or warm][round]."""
    import numpy as np
    from rewardserve.engine.base import EngineListener, EngineRequest
    from rewardserve.engine.native.engine import NativeEngine
    from rewardserve.engine.native.options import NativeOptions
    from rewardserve.types import EncodedGroup

    def pack(ids: list[int]) -> bytes:
        return np.array(ids, "<i4").tobytes()

    engines = {}
    for name, folder in folders.items():
        print(f"{name} loads ...", file=sys.stderr, flush=True)
        engines[name] = NativeEngine(NativeOptions(str(folder), num_threads=threads, prefix_cache_bytes=256 << 20))
        info = await engines[name].start(EngineListener())
        assert info.path == "packed", info.path_reason
    rates: dict[str, dict[str, list[float]]] = {name: {"cold": [], "warm": []} for name in engines}
    for number in range(rounds + 1):
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
        groups = tuple(EncodedGroup(pack(p), tuple(map(pack, responses))) for p, responses in _groups(number))
        order = list(engines)[number % len(engines) :] + list(engines)[: number % len(engines)]
        for state in ("cold", "warm"):
            for name in order:
                started = time.perf_counter()
                result = await engines[name].score(EngineRequest(f"{number}-{state}", groups))
                elapsed = time.perf_counter() - started
                items = [item for group in result.groups for item in group.items]
                assert all(item.score is not None for item in items), items[0].failure
                assert all(g.num_cached_tokens == (PROMPT if state == "warm" else 0) for g in result.groups)
                if number:  # the first one warms up
                    rates[name][state].append(len(items) / elapsed)
    for engine in engines.values():
        await engine.stop()
    return rates


def _ratios(rates: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Median over the rounds of each head's rate over the linear one's, cold and warm."""
    return {
        f"{name}, {state}": statistics.median(a / b for a, b in zip(of[state], rates["linear"][state], strict=True))
        for name, of in rates.items()
        for state in of
        if name != "linear"
    }


def _print(rates: dict[str, dict[str, list[float]]]) -> None:
    table = Table("head", "", "pairs/s", "slowest - fastest", "of linear")
    ratios = _ratios(rates)
    for name, of in rates.items():
        for state, values in of.items():
            spread = f"{min(values):.2f} - {max(values):.2f}"
            ratio = ratios.get(f"{name}, {state}")
            table.add_row(
                name, state, f"{statistics.median(values):.2f}", spread, "" if ratio is None else f"{ratio:.2f}"
            )
    Console().print(table)


def _result(rates: dict[str, dict[str, list[float]]], threads: int) -> dict[str, object]:
    return {
        "machine": {"cpu": report.device_name("cpu"), "threads": threads},
        "git": report._git(),
        "date": datetime.date.today().isoformat(),
        "work": f"{GROUPS} prompts of {PROMPT} tokens with {RESPONSES} responses of {RESPONSE}, a step every {STEP}",
        "pairs_per_s": rates,
        "of_linear": _ratios(rates),
    }


if __name__ == "__main__":
    raise SystemExit(main())
