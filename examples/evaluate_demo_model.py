"""Measure a reward model on the held-out prompts, with plain padded transformers.

    python examples/evaluate_demo_model.py --model examples/demo_model

Prints, for every kind of pair, how often the model ranks the better answer first, and how often length alone
(the longer answer is the better one) would have done so.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import demo_data
import torch
from demo_data import Message, Pair
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT_SEED = 7
Rewards = dict[tuple[str, ...], float]  # by the conversation's texts and the answer
CLOSING_TOKENS = 2  # <|im_end|> and the line break after it


@dataclass(frozen=True)
class Figure:
    """Share of `pairs` pairs ranked correctly by the model, and by length alone. Ties count one half."""

    pairs: int
    model: float
    length: float


def reward_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], answer: str) -> list[int]:
    """Token ids of the conversation with the answer as its last turn; the reward is read at the last of them.

    An answer too long for the model loses its end, but not the closing tokens.
    """
    conversation = [*messages, {"role": "assistant", "content": answer}]
    ids = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"]
    limit = tokenizer.model_max_length
    return ids if len(ids) <= limit else ids[: limit - CLOSING_TOKENS] + ids[-CLOSING_TOKENS:]


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[tuple[list[Message], str]],
    tokens_per_batch: int = 16384,
) -> list[float]:
    """Reward every (conversation, answer), in padded batches of similar length."""
    ids = [reward_ids(tokenizer, messages, answer) for messages, answer in items]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    rewards = [0.0] * len(ids)
    progress = tqdm(total=len(ids), desc="scoring", unit="answer")
    while order:
        size = max(1, tokens_per_batch // len(ids[order[-1]]))
        batch, order = order[-size:], order[:-size]
        padded = {"input_ids": [ids[index] for index in batch]}
        inputs = tokenizer.pad(padded, padding_side="right", return_tensors="pt")
        for index, reward in zip(batch, model(**inputs).logits[:, 0].tolist(), strict=True):
            rewards[index] = reward
        progress.update(len(batch))
    progress.close()
    return rewards


def held_out_pairs(split: demo_data.Split) -> list[Pair]:
    """Every pair the figures are measured on."""
    return [
        *demo_data.preference_pairs(split.candidates),
        *demo_data.broken_pairs(split.candidates, HELD_OUT_SEED),
        *demo_data.harmless_pairs(split.harmless),
    ]


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, split: demo_data.Split) -> dict[str, Figure]:
    """Accuracy per kind of pair, plus "broken": all kinds of broken answers together."""
    pairs = held_out_pairs(split)
    return figures_of(pairs, rewards_of(model, tokenizer, pairs))


def rewards_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> Rewards:
    """Reward every answer of the pairs, each once."""
    keys = {
        reward_key(pair.messages, text): (pair.messages, text)
        for pair in pairs
        for text in (pair.chosen, pair.rejected)
    }
    return dict(zip(keys, score(model, tokenizer, list(keys.values())), strict=True))


def figures_of(pairs: Sequence[Pair], rewards: Rewards) -> dict[str, Figure]:
    """Accuracy per kind of pair, plus "broken": all kinds of broken answers together."""
    hits: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for pair in pairs:
        better, worse = (
            rewards[reward_key(pair.messages, pair.chosen)],
            rewards[reward_key(pair.messages, pair.rejected)],
        )
        hit = (_win(better, worse), _win(len(pair.chosen), len(pair.rejected)))
        hits[pair.kind].append(hit)
        if pair.kind in demo_data.BROKEN_KINDS:
            hits["broken"].append(hit)
    return {
        kind: Figure(len(rows), sum(m for m, _ in rows) / len(rows), sum(n for _, n in rows) / len(rows))
        for kind, rows in hits.items()
    }


def figures_table(figures: dict[str, Figure]) -> str:
    """The figures as a Markdown table."""
    names = {
        "preference": "judge preference differs by more than 0.2",
        "broken": "good answer against broken answer, all kinds",
        **{kind: f"- {kind.replace('_', '-')}" for kind in demo_data.BROKEN_KINDS},
        "lazy": "good answer against lazy one-liner",
        "harmless": "human preference, harmless conversations",
    }
    rows = ["| pairs | number | model | longer is better |", "| --- | ---: | ---: | ---: |"]
    for kind, name in names.items():
        figure = figures[kind]
        rows.append(f"| {name} | {figure.pairs:,} | {figure.model:.1%} | {figure.length:.1%} |")
    return "\n".join(rows)


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a reward model folder for scoring in float32."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def reward_key(messages: list[Message], text: str) -> tuple[str, ...]:
    """What the reward of an answer in a conversation is found by."""
    return (*(message["content"] for message in messages), text)


def _win(better: float, worse: float) -> float:
    return 0.5 if better == worse else float(better > worse)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure a reward model on the demo model's held-out prompts.")
    parser.add_argument(
        "--model", type=Path, default=Path(__file__).parent / "demo_model", help="model folder (default: %(default)s)"
    )
    parser.add_argument(
        "--data-dir", type=Path, default=demo_data.DEFAULT_DATA_DIR, help="folder of the data (default: %(default)s)"
    )
    parser.add_argument(
        "--split", choices=["validation", "test"], default="test", help="part to measure on (default: %(default)s)"
    )
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    print(figures_table(evaluate(model, tokenizer, demo_data.load_splits(args.data_dir)[args.split])))


if __name__ == "__main__":
    main()
