"""Write the prompts the demo model has not seen as one file for `rewardserve eval`.

    python examples/eval_data.py heldout.jsonl
    rewardserve eval heldout.jsonl --model examples/demo_model

Two domains: "helpful" holds AlpacaEval's prompts with many answers each, rated by how often a judge preferred them, and
"harmless" holds the pairs of hh-rlhf's conversations. Only the test part of the split is written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo_data


def rows(split: demo_data.Split) -> Iterator[dict[str, Any]]:
    """Rows of rated responses, then rows of pairs."""
    for prompt in split.candidates:
        texts, ratings = [a.text for a in prompt.answers], [a.preference for a in prompt.answers]
        yield {"prompt": prompt.prompt, "responses": texts, "ratings": ratings, "domain": "helpful"}
    for pair in split.harmless:
        yield {"messages": pair.messages, "chosen": pair.chosen, "rejected": pair.rejected, "domain": "harmless"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the demo model's held-out prompts for `rewardserve eval`.")
    parser.add_argument("output", type=Path, help="JSONL file to write")
    parser.add_argument(
        "--data-dir", type=Path, default=demo_data.DEFAULT_DATA_DIR, help="folder of the data (default: %(default)s)"
    )
    args = parser.parse_args()
    split = demo_data.load_splits(args.data_dir)["test"]
    with args.output.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split))
    print(f"wrote {len(split.candidates)} prompts and {len(split.harmless)} pairs to {args.output}")


if __name__ == "__main__":
    main()
