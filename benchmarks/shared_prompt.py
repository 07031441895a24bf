"""How much faster than plain Hugging Face is scoring N responses to one prompt? One run, one machine, the same threads.

    python benchmarks/shared_prompt.py [--prompts 6] [--rounds 5] [--threads 2]

The model has random weights in the shape of a 100M-parameter Qwen3 (hidden 768, 12 layers, intermediate 2304, 12/4
heads of 64), in bf16. The workload is real: prompts with 16 answers of very uneven length, from the shared data where
it is present, else from examples/demo.jsonl. Scores are checked against Hugging Face in fp32 before any time is taken.
Rounds are interleaved and medians taken; quote ratios, not rates. Writes benchmarks/results/shared_prompt_cpu.json.
"""

import argparse
import asyncio
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from rewardserve.engine.base import EngineListener, EngineRequest
from rewardserve.engine.native.engine import NativeEngine
from rewardserve.engine.native.options import NativeOptions
from rewardserve.types import EncodedGroup
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen3Config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
from texts import groups  # noqa: E402  real prompts and responses, as the tests use them

Pairs = list[tuple[list[int], list[list[int]]]]  # prompt ids, ids of each response


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "demo_model")
    pairs: Pairs = [
        (tokenizer.encode(prompt), [tokenizer.encode(response) for response in responses if response])
        for prompt, responses in groups(options.prompts, 16, max_characters=4000)
    ]
    with tempfile.TemporaryDirectory() as folder:
        _make_model(Path(folder), len(tokenizer))
        asyncio.run(_measure(Path(folder), pairs, options))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=6, help="prompts, each with 16 responses")
    parser.add_argument("--rounds", type=int, default=5, help="times every provider is measured")
    parser.add_argument("--threads", type=int, default=2, help="torch threads, the same for all")
    return parser.parse_args()


def _make_model(folder: Path, vocab_size: int) -> None:
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=768,
        num_hidden_layers=12,
        intermediate_size=2304,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=8192,
        num_labels=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).to(torch.bfloat16).save_pretrained(folder)


async def _measure(folder: Path, pairs: Pairs, options: argparse.Namespace) -> None:
    rows = [prompt + response for prompt, responses in pairs for response in responses]
    exact = _padded(_hugging_face(folder, torch.float32), 1)(rows)
    plain = _hugging_face(folder, torch.bfloat16)
    engine = NativeEngine(NativeOptions(str(folder), num_threads=options.threads, prefix_cache_bytes=1 << 30))
    await engine.start(EngineListener())
    number = 0

    async def ours(_: Sequence[list[int]]) -> torch.Tensor:
        """Every prompt begins with a token of its own round, so that nothing is found in the cache."""
        nonlocal number
        number += 1
        cold = [([number % 1000, *prompt[1:]], responses) for prompt, responses in pairs]
        result = await engine.score(EngineRequest(str(number), tuple(_encode(p, r) for p, r in cold)))
        return torch.tensor([item.score for group in result.groups for item in group.items])

    providers: dict[str, Callable[[Sequence[list[int]]], torch.Tensor]] = {
        "hf_padded_8": _padded(plain, 8),
        "hf_sorted_8": lambda rows: _padded(plain, 8)(sorted(rows, key=len)),
    }
    result = await engine.score(EngineRequest("check", tuple(_encode(p, r) for p, r in pairs)))
    got = torch.tensor([item.score for group in result.groups for item in group.items])
    errors = {"rewardserve_engine": (got - exact).abs(), "hf_padded_8": (providers["hf_padded_8"](rows) - exact).abs()}
    if errors["rewardserve_engine"].mean() > 1.5 * errors["hf_padded_8"].mean():
        raise SystemExit(f"scores are off by {errors['rewardserve_engine'].mean():.2e}: no speed on a red gate")
    seconds: dict[str, list[float]] = {name: [] for name in ("rewardserve_engine", *providers)}
    for _ in tqdm(range(options.rounds), desc="rounds"):
        for name in seconds:
            started = time.perf_counter()
            await ours(rows) if name == "rewardserve_engine" else providers[name](rows)
            seconds[name].append(time.perf_counter() - started)
    await engine.stop()
    _report(pairs, rows, seconds, errors, options)


def _hugging_face(folder: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()


def _padded(model: transformers.PreTrainedModel, size: int) -> Callable[[Sequence[list[int]]], torch.Tensor]:
    """Batches of `size` rows as they come, right-padded, scored at the last true token."""

    @torch.inference_mode()
    def score(rows: Sequence[list[int]]) -> torch.Tensor:
        scores = []
        for begin in range(0, len(rows), size):
            batch = [torch.tensor(row) for row in rows[begin : begin + size]]
            lengths = torch.tensor([len(row) for row in batch])
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
            mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
            hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            scores.append(model.score(hidden[torch.arange(len(batch)), lengths - 1])[:, 0].float())
        return torch.cat(scores)

    return score


def _encode(prompt: list[int], responses: list[list[int]]) -> EncodedGroup:
    pack = lambda ids: np.array(ids, "<i4").tobytes()  # noqa: E731
    return EncodedGroup(pack(prompt), tuple(map(pack, responses)))


def _report(
    pairs: Pairs,
    rows: list[list[int]],
    seconds: dict[str, list[float]],
    errors: dict[str, torch.Tensor],
    options: argparse.Namespace,
) -> None:
    ours = statistics.median(seconds["rewardserve_engine"])
    print(f"\n{len(rows)} pairs, {sum(map(len, rows))} tokens, {options.threads} threads, {_cpu_name()}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:20} {len(rows) / median:7.2f} pairs/s   rewardserve is {median / ours:4.2f} x as fast")
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "git": git.stdout.strip(),
        "machine": {"cpu": _cpu_name(), "threads": options.threads},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "pairs": len(rows),
        "tokens": sum(map(len, rows)),
        "tokens_shared": sum(len(prompt) + sum(map(len, responses)) for prompt, responses in pairs),
        "providers": {
            name: {
                "pairs_per_s": round(len(rows) / statistics.median(times), 3),
                "seconds": [round(t, 3) for t in times],
                **({"mean_abs_err": errors[name].mean().item()} if name in errors else {}),
            }
            for name, times in seconds.items()
        },
    }
    path = ROOT / "benchmarks" / "results" / "shared_prompt_cpu.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT)}")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
