"""The data behind the demo model: reading it, splitting it by prompt, and making plainly broken answers.

Shared by `train_demo_model.py` and `evaluate_demo_model.py`, so that both agree on which prompts are held out.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rewardserve.training.split import normalised, position

DEFAULT_DATA_DIR = Path(__file__).resolve().parents[2] / "shared" / "data"
CANDIDATES_FILE = "candidates.jsonl.gz"
HARMLESS_FILE = "harmless_pairs.jsonl.gz"

SPLIT_SEED = 2024
TEST_SHARE = 0.15
VALIDATION_SHARE = 0.07

Message = dict[str, str]

LAZY_ANSWERS = (
    "I don't know.",
    "Sure!",
    "Ok.",
    "Yes.",
    "No.",
    "It depends.",
    "Just search for it online.",
    "That is a good question.",
    "Maybe, I am not sure.",
    "Sorry, I can't help with that.",
    "Sure, here you go:",
    "Idk, figure it out yourself.",
    "...",
    "Thanks for asking! Let me know if you need anything else.",
)


@dataclass(frozen=True)
class Answer:
    """One model's answer and how often a strong judge preferred it over a fixed baseline (0 to 1)."""

    text: str
    preference: float


@dataclass(frozen=True)
class CandidatePrompt:
    """A single-turn prompt with many answers of very uneven quality, best first."""

    prompt: str
    answers: tuple[Answer, ...]

    @property
    def messages(self) -> list[Message]:
        """The prompt as a conversation."""
        return [{"role": "user", "content": self.prompt}]


@dataclass(frozen=True)
class HarmlessPair:
    """A conversation with the answer a person preferred and the one they did not."""

    messages: list[Message]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Split:
    """One part of the data. No prompt (first user message) is in two parts."""

    candidates: list[CandidatePrompt]
    harmless: list[HarmlessPair]


@dataclass(frozen=True)
class Pair:
    """A conversation with a better and a worse answer; `kind` says what makes the worse one worse."""

    kind: str
    messages: list[Message]
    chosen: str
    rejected: str


def load_splits(data_dir: Path) -> dict[str, Split]:
    """Read both sources and return the parts "train", "validation" and "test".

    Raises:
        SystemExit: when the data is not there, saying how to point to it.
    """
    for name in (CANDIDATES_FILE, HARMLESS_FILE):
        if not (data_dir / name).is_file():
            raise SystemExit(
                f"{name} not found in {data_dir}. The training data is not part of this repository; "
                f"pass the folder that holds {CANDIDATES_FILE} and {HARMLESS_FILE} with --data-dir."
            )
    splits = {name: Split([], []) for name in ("train", "validation", "test")}
    for row in _read_jsonl(data_dir / CANDIDATES_FILE):
        answers = (Answer(c["response"], c["judge_preference"]) for c in row["candidates"] if c["response"].strip())
        ranked = tuple(sorted(answers, key=lambda answer: -answer.preference))
        splits[split_of(row["prompt"])].candidates.append(CandidatePrompt(row["prompt"], ranked))
    for row in _read_jsonl(data_dir / HARMLESS_FILE):
        first_user_message = next(m["content"] for m in row["messages"] if m["role"] == "user")
        pair = HarmlessPair(row["messages"], row["chosen"], row["rejected"])
        splits[split_of(first_user_message)].harmless.append(pair)
    return splits


def split_of(prompt: str) -> str:
    """Name the part a prompt belongs to, by a seeded hash, so that the split does not depend on file order."""
    place = position(normalised(prompt), SPLIT_SEED)
    if place < TEST_SHARE:
        return "test"
    return "validation" if place < TEST_SHARE + VALIDATION_SHARE else "train"


def shuffle_words(text: str, rng: random.Random) -> str:
    """Put the words into random order, keeping line breaks in place half of the time."""
    if rng.random() < 0.5:
        words = text.split()
        rng.shuffle(words)
        return " ".join(words)
    parts = re.split(r"(\s+)", text.strip())
    words = parts[::2]
    rng.shuffle(words)
    parts[::2] = words
    return "".join(parts)


def truncate(text: str, rng: random.Random, low: float = 0.3, high: float = 0.6) -> str:
    """Cut the text in mid-sentence after a share of its words between `low` and `high`."""
    word_ends = [match.end() for match in re.finditer(r"\S+", text)]
    kept = max(1, int(len(word_ends) * rng.uniform(low, high)))
    return text[: word_ends[min(kept, len(word_ends)) - 1]].rstrip(" .!?:;,\n")


def repeat(text: str, rng: random.Random) -> str:
    """Say one sentence or phrase over and over, to between half and one and a half times the original length."""
    sentences = [s for s in re.split(r"(?<=[.!?])\s+|\n+", text.strip()) if len(s.split()) > 2] or [text.strip()]
    looped = rng.choice(sentences)
    if rng.random() < 0.3:
        words = looped.split()
        start = rng.randrange(len(words))
        looped = " ".join(words[start : start + rng.randint(3, 8)])
    opening = text[: text.find(looped)] if rng.random() < 0.3 and looped in text else ""
    times = max(4, round((len(text) * rng.uniform(0.5, 1.5) - len(opening)) / (len(looped) + 1)))
    return opening + rng.choice((" ", "\n")).join([looped] * min(times, 60))


CORRUPTIONS: dict[str, Callable[[str, random.Random], str]] = {
    "shuffled": shuffle_words,
    "truncated": truncate,
    "repeated": repeat,
}
BROKEN_KINDS = ("shuffled", "truncated", "off_topic", "repeated")


def preference_pairs(prompts: Iterable[CandidatePrompt], min_gap: float = 0.2) -> list[Pair]:
    """All within-prompt pairs of answers whose judge preferences differ by more than `min_gap`."""
    return [
        Pair("preference", prompt.messages, better.text, worse.text)
        for prompt in prompts
        for better in prompt.answers
        for worse in prompt.answers
        if better.preference - worse.preference > min_gap
    ]


def broken_pairs(prompts: list[CandidatePrompt], seed: int, top: int = 3) -> list[Pair]:
    """Each of a prompt's `top` best answers against one broken answer of every kind.

    Broken answers are made from the same prompt's best answers; off-topic ones are another prompt's best answers.
    A lazy one-liner is added as a kind of its own, outside `BROKEN_KINDS`, since length alone tells it.
    """
    rng = random.Random(seed)
    pairs = []
    for index, prompt in enumerate(prompts):
        best = [answer.text for answer in prompt.answers[:top]]
        for good in best:
            other = prompts[(index + rng.randrange(1, len(prompts))) % len(prompts)]
            broken = {kind: corrupt(rng.choice(best), rng) for kind, corrupt in CORRUPTIONS.items()}
            broken["off_topic"] = rng.choice(other.answers[:top]).text
            broken["lazy"] = rng.choice(LAZY_ANSWERS)
            pairs += [Pair(kind, prompt.messages, good, text) for kind, text in broken.items()]
    return pairs


def harmless_pairs(harmless: Iterable[HarmlessPair]) -> list[Pair]:
    """The human preference pairs over multi-turn conversations."""
    return [Pair("harmless", pair.messages, pair.chosen, pair.rejected) for pair in harmless]


def _read_jsonl(path: Path) -> Iterable[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)
