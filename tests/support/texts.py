"""Real prompts and responses: the shared data where it is present, else the project's own small demo file."""

import gzip
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
CANDIDATES = ROOT.parent / "shared" / "data" / "candidates.jsonl.gz"
DEMO = ROOT / "examples" / "demo.jsonl"

Group = tuple[str, list[str]]


def groups(num_groups: int, num_responses: int, max_characters: int = 800) -> list[Group]:
    """Prompts with their responses, cut to `max_characters`, which keeps tests fast and lengths ragged."""
    rows = list(_candidates(num_groups) if CANDIDATES.exists() else _demo())
    return [
        (prompt[:max_characters], [response[:max_characters] for response in responses[:num_responses]])
        for prompt, responses in rows[:num_groups]
    ]


def all_texts(groups: list[Group]) -> list[str]:
    return [text for prompt, responses in groups for text in (prompt, *responses)]


def _candidates(count: int) -> list[Group]:
    found = []
    with gzip.open(CANDIDATES, "rt") as lines:
        for line in lines:
            row = json.loads(line)
            found.append((row["prompt"], [candidate["response"] for candidate in row["candidates"]]))
            if len(found) == count:
                break
    return found


def _demo() -> list[Group]:
    rows = [json.loads(line) for line in DEMO.read_text().splitlines()]
    return [(row["messages"][-1]["content"], row["responses"]) for row in rows]
