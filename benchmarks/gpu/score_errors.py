"""What another precision does to scores: errors, and the answers it would rank otherwise."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from part import Part
from rewardserve.engine.native.engine import NativeEngine
from served import Traffic, groups_of, running, score

ROOT = Path(__file__).parents[2]
PROBE, PROBE_SEED = Traffic(128, 8, 48), 99  # scored by every variant of a model
PROBE_TOKENS, PROBE_TOKENS_TINY = 33_000, 400  # 64 prompts, 512 pairs
RANDOM_WEIGHTS = (
    "random weights: errors grow from layer to layer as in a trained model, but scores of answers to one prompt lie "
    "close together for no reason, so that how often they flip says little; the demo model is trained"
)

Scores = list[list[float]]  # of the answers to each prompt


async def probe(part: Part, engine: NativeEngine) -> Scores:
    groups = groups_of(part, PROBE, PROBE_TOKENS_TINY if part.tiny else PROBE_TOKENS, PROBE_SEED)
    return await scores_by_group(engine, groups)


async def scores_by_group(engine: NativeEngine, groups: list[tuple[list[int], list[list[int]]]]) -> Scores:
    result = await score(engine, groups)
    return [[float(item.score) for item in group.items] for group in result.groups]  # type: ignore[arg-type]


def compare(wanted: Scores, got: Scores) -> dict[str, Any]:
    """Raises ValueError where they are not of the same pairs."""
    if list(map(len, wanted)) != list(map(len, got)):
        raise ValueError("scores of other pairs are no comparison")
    one, other = (np.array(list(itertools.chain.from_iterable(scores))) for scores in (wanted, got))
    pairs = [(a, b) for a, b in zip(wanted, got, strict=True) if len(a) > 1]
    flips = [(a[i] > a[j]) != (b[i] > b[j]) for a, b in pairs for i, j in itertools.combinations(range(len(a)), 2)]
    return {
        "pairs": len(one),
        "prompts": len(wanted),
        "mean_abs_err": round(float(np.abs(other - one).mean()), 5),
        "max_abs_err": round(float(np.abs(other - one).max()), 5),
        "std_of_scores": round(float(one.std()), 3),
        "std_within_a_prompt": round(float(np.mean([np.std(a) for a in wanted])), 3),
        "spearman": round(_rank_correlation(one, other), 5),
        "flipped_within_a_prompt": f"{np.mean(flips):.2%} of {len(flips)}",
        "other_best_answer": f"{np.mean([np.argmax(a) != np.argmax(b) for a, b in pairs]):.2%} of {len(pairs)} prompts",
    }


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    ranks = [values.argsort(kind="stable").argsort(kind="stable") for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


async def of_demo_model(part: Part) -> dict[str, Any]:
    """The demo model in fp8, and in bf16, beside itself in fp32, on real prompts with good and bad answers."""
    groups, scores = demo_groups(), {}
    for name, options in {
        "fp32": {"dtype": "float32"},
        "bf16": {},
        "fp8": {"quantize": "fp8"},
    }.items():
        folder = str(ROOT / "examples" / "demo_model")
        async with running(part, folder, compile="off", cuda_graphs=False, **options) as engine:
            scores[name] = await scores_by_group(engine, groups[: 4 if part.tiny else None])
    return {name: compare(scores["fp32"], scores[name]) for name in ("bf16", "fp8")}


def demo_groups() -> list[tuple[list[int], list[list[int]]]]:
    """examples/demo.jsonl in ChatML, as the model's template has it; jinja2 may not be there."""
    tokenizer = tokenizers.Tokenizer.from_file(str(ROOT / "examples" / "demo_model" / "tokenizer.json"))
    groups = []
    for line in (ROOT / "examples" / "demo.jsonl").read_text().splitlines():
        row = json.loads(line)
        turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in row["messages"])
        answers = [f"{response}<|im_end|>\n" for response in row["responses"]]
        prompt, *ids = (tokenizer.encode(text).ids for text in (f"{turns}<|im_start|>assistant\n", *answers))
        groups.append((prompt, ids))
    return groups
