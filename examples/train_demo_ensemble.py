"""Fine-tune the demo model into an ensemble of three and measure it on prompts that no part of it has seen.

    python examples/train_demo_ensemble.py --output examples/demo_ensemble

It writes two files of preferences, made of the training and the validation prompts of the demo model, gives them to
`rewardserve train`, and measures the members and the mean of their scores on test prompts. The members share the
demo model's layers but for the last one, on which each has a low-rank adapter, and have a head of their own each; what
is written is adapters and heads, which need the demo model to be used.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import demo_data
import torch
from demo_data import Pair, Split
from evaluate_demo_model import Rewards, figures_of, figures_table, held_out_pairs, load, reward_key, rewards_of
from peft import PeftModel
from rewardserve.cli import train
from transformers import PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
# Everything about the training. What it is called with beside these is the files and the seed.
RECIPE = (
    *("--lora-rank", "8", "--open-layers", "1", "--adapter", "--new-head", "--head-dropout", "0.1"),
    *("--epochs", "1", "--batch-size", "16", "--micro-batch-size", "8", "--learning-rate", "1e-3", "--warmup", "0.1"),
    *("--weight-decay", "0.01", "--center-rewards", "0.001", "--max-length", "1024", "--dtype", "bfloat16"),
)


def preferences(split: Split, number: int, seed: int) -> list[Pair]:
    """Pairs of all kinds: half judge preferences, a third good answers against broken ones, and human preferences."""
    rng = random.Random(seed)
    by_prompt = (demo_data.preference_pairs([prompt]) for prompt in split.candidates)
    judged = [pairs for pairs in by_prompt if pairs]
    broken = demo_data.broken_pairs(split.candidates, seed)
    human = demo_data.harmless_pairs(split.harmless)
    rng.shuffle(broken)
    rng.shuffle(human)
    preferred = [rng.choice(rng.choice(judged)) for _ in range(number // 2)]
    pairs = [*preferred, *broken[: number * 2 // 5], *human[: number // 10]]
    rng.shuffle(pairs)
    return pairs


def row_of(pair: Pair) -> dict[str, Any]:
    """As `rewardserve train` reads it."""
    domain = pair.kind if pair.kind in ("preference", "harmless") else "broken"
    return {"messages": pair.messages, "chosen": pair.chosen, "rejected": pair.rejected, "domain": domain}


def write_rows(pairs: list[Pair], file: Path) -> Path:
    file.write_text("".join(json.dumps(row_of(pair), ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    return file


def load_member(base: Path, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The demo model with a member's adapter and head, in float32."""
    model, tokenizer = load(base)
    return PeftModel.from_pretrained(model, folder).merge_and_unload().eval(), tokenizer


def measure(base: Path, members: list[Path], split: Split) -> None:
    """Print the accuracy per kind of pair, of the demo model, of each member and of the mean of the members' rewards;
    and how good the mean is where the members agree and where they do not."""
    pairs = held_out_pairs(split)
    rewards = [rewards_of(*load_member(base, member), pairs) for member in members]
    mean = {text: sum(found[text] for found in rewards) / len(members) for text in rewards[0]}
    names = ["demo_model", *(member.name for member in members), "mean"]
    for name, found in zip(names, [rewards_of(*load(base), pairs), *rewards, mean], strict=True):
        print(f"\n{name}\n{figures_table(figures_of(pairs, found))}", flush=True)
    agreed = [pair for pair in pairs if len({prefers(pair, found) for found in rewards}) == 1]
    others = [pair for pair in pairs if len({prefers(pair, found) for found in rewards}) > 1]
    for said, some in (("agree", agreed), ("differ", others)):
        kinds = figures_of(some, mean).items()
        shown = ", ".join(f"{kind} {figure.model:.1%} of {figure.pairs:,}" for kind, figure in sorted(kinds))
        print(f"\nwhere members {said}, the mean is right on: {shown}")


def prefers(pair: Pair, rewards: Rewards) -> bool:
    """Whether the better answer has the higher reward."""
    return rewards[reward_key(pair.messages, pair.chosen)] > rewards[reward_key(pair.messages, pair.rejected)]


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=demo_data.DEFAULT_DATA_DIR, help="folder of the data files")
    parser.add_argument("--base", type=Path, default=HERE / "demo_model", help="the demo model")
    parser.add_argument("--output", type=Path, default=HERE / "demo_ensemble", help="folder to write the members to")
    parser.add_argument("--pairs", type=int, default=1_500, help="pairs to train on")
    parser.add_argument("--seeds", type=int, default=3, help="members")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--test-prompts", type=int, default=40, help="prompts with many answers to measure on")
    parser.add_argument("--only-measure", action="store_true", help="train nothing, measure what --output holds")
    args = parser.parse_args()
    splits = demo_data.load_splits(args.data_dir)
    if not args.only_measure:
        started = time.monotonic()
        train_members(args, splits)
        print(f"trained {args.seeds} members in {time.monotonic() - started:.0f} s")
    torch.set_num_threads(args.threads)
    members = sorted(args.output.glob("seed-*")) or [args.output]
    test = Split(splits["test"].candidates[: args.test_prompts], splits["test"].harmless)
    measure(args.base, members, test)


def train_members(args: argparse.Namespace, splits: dict[str, Split]) -> None:
    """As on a command line: the files, and `rewardserve train` with the recipe."""
    with tempfile.TemporaryDirectory() as scratch:
        data = write_rows(preferences(splits["train"], args.pairs, seed=1), Path(scratch) / "train.jsonl")
        validation = write_rows(preferences(splits["validation"], 400, seed=1), Path(scratch) / "validation.jsonl")
        base = os.path.relpath(args.base)  # it stands in what is written
        arguments = [str(data), "--eval-data", str(validation), "--base", base, "--output", str(args.output)]
        arguments += ["--seeds", str(args.seeds), "--threads", str(args.threads), *RECIPE]
        if code := train.run(arguments):
            raise SystemExit(code)


if __name__ == "__main__":
    main()
