"""The traffic that is measured: real prompts and answers, and the synthetic shapes of RL, all seeded.

Everything that claims a speed draws its work from here, so that two claims are about the same thing.
"""

import gzip
import json
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rewardserve.client import ChatMessage, Group, Rendered, TokenIds

SYSTEM_PROMPT = """\
You are the support assistant of Harbour Lane, a company that rents out tools, trailers and small boats from nine \
yards along the coast. You write to customers who are standing in a yard, sitting at home planning a job, or stuck \
on the road with something that does not start. Read the whole message before you answer, and answer the question \
that was asked before you offer anything else.

Facts you may rely on. Yards open at seven in the morning and close at six in the evening, on Sundays from nine to \
four. A rental day is twenty-four hours from the minute on the receipt; the first half hour of lateness is free, \
after that every begun hour costs a tenth of the day's price, and never more than one further day. Deposits are \
returned to the card they came from within five working days after the item has been looked over. Fuel is charged \
at the price of the nearest station plus ten percent for the trouble. Trailers up to seven hundred and fifty \
kilograms may be drawn with an ordinary licence; for heavier ones ask for the number of the licence category and do \
not guess. Boats go out only when the harbour office shows no more than wind force four, and life jackets are part \
of the rental, not an extra.

How to decide. If something is dangerous, say so first and say what to do right now: switch off, step back, call \
the emergency number when a person is hurt. If a customer reports damage, thank them for saying so, ask for two \
photographs and the number on the yellow plate, and do not speak about who will pay: the yard looks at the item and \
writes within two days. If a customer wants money back, look at the rules above, work the sum out in the open, line \
by line, and offer what the rules give, neither less nor more. If the rules do not say, write that you do not know \
and who does: the yard's own telephone is on the receipt. Never invent a price, an opening hour, a law or a name. \
Never promise a delivery time; the drivers plan their routes at six in the morning and nobody knows earlier.

How to write. Use the customer's language, short sentences and plain words. Use numbered steps when there is an \
order, bullet points when there is none, and neither when two sentences are enough. Do not repeat the question, do \
not praise it, and do not apologise more than once. When you have answered, stop: no closing line about further \
questions. If the customer is angry, stay kind and concrete, because a clear next step helps more than sympathy.
"""


@dataclass(frozen=True, slots=True)
class Workload:
    """Groups to score, and in one sentence what they stand for."""

    name: str
    description: str
    groups: tuple[Group, ...]

    @property
    def num_pairs(self) -> int:
        return sum(len(group.responses) for group in self.groups)


@dataclass(frozen=True, slots=True)
class Traffic:
    """How much of a workload, and from where."""

    num_groups: int
    seed: int = 0
    data: Path | None = None  # folder of candidates.jsonl.gz and harmless_pairs.jsonl.gz; for real text
    vocab_size: int = 0  # for synthetic token ids
    scale: int = 1  # divides lengths and group sizes of the GRPO shape, for machines that cannot wait for it


class NoData(Exception):
    """A workload of real text was asked for without its text. The message says what to do."""


def make(name: str, traffic: Traffic) -> Workload:
    """Raises KeyError for an unknown name, NoData, and ValueError for token ids without a vocabulary."""
    description, groups = _WORKLOADS[name]
    return Workload(name, description, tuple(groups(traffic)))


def names() -> list[str]:
    return list(_WORKLOADS)


def needs_data(name: str) -> bool:
    """True for real text, False for synthetic token ids."""
    return _WORKLOADS[name][1] in (_best_of_16, _shared_system, _pairs)


def cold(group: Group, salt: int) -> Group:
    """The same work under a prompt that begins differently for every `salt`: no cache has seen it."""
    match group.prompt:
        case TokenIds(data):
            prompt: Any = TokenIds(_other_beginning(data, salt))
        case str(text):
            prompt = f"[{salt}] {text}"
        case Rendered(text):
            prompt = Rendered(f"[{salt}] {text}")
        case [first, *rest]:
            message = first if isinstance(first, ChatMessage) else ChatMessage(first["role"], first["content"])
            prompt = [replace(message, content=f"[{salt}] {message.content}"), *rest]
        case other:
            raise TypeError(f"cannot give {type(other).__name__} another beginning")
    return replace(group, prompt=prompt)


def _other_beginning(data: bytes, salt: int) -> bytes:
    """Writes `salt` into the first eight ids, three bits each; none grows, so that they stay within the vocabulary."""
    ids = array("i", data)
    for index in range(min(8, len(ids))):
        ids[index] = max(0, (ids[index] & ~7) - 8) + (salt >> 3 * index & 7)
    return ids.tobytes()


def _best_of_16(traffic: Traffic) -> Iterator[Group]:
    for prompt, responses in _candidates(traffic):
        yield Group(prompt, responses)


def _shared_system(traffic: Traffic) -> Iterator[Group]:
    for prompt, responses in _candidates(traffic):
        yield Group([ChatMessage("system", SYSTEM_PROMPT), ChatMessage("user", prompt)], responses)


def _candidates(traffic: Traffic) -> Iterator[tuple[str, list[str]]]:
    rng = random.Random(traffic.seed)
    for row in _sample(traffic, "candidates.jsonl.gz", rng):
        responses = [c["response"] for c in row["candidates"] if c["response"].strip()]
        yield row["prompt"], rng.sample(responses, min(16, len(responses)))


def _pairs(traffic: Traffic) -> Iterator[Group]:
    for row in _sample(traffic, "harmless_pairs.jsonl.gz", random.Random(traffic.seed)):
        responses = [row[side] for side in ("chosen", "rejected") if row[side].strip()]
        yield Group([ChatMessage(m["role"], m["content"]) for m in row["messages"]], responses)


def _sample(traffic: Traffic, name: str, rng: random.Random) -> Sequence[dict[str, Any]]:
    """`num_groups` rows in a seeded order, from the beginning again when there are not as many."""
    if traffic.data is None or not (path := traffic.data / name).exists():
        raise NoData(f"{name} is not in {traffic.data or 'any folder given'}; this workload is real text, see --data")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rng.shuffle(rows)
    return [rows[i % len(rows)] for i in range(traffic.num_groups)]


def _grpo_64(traffic: Traffic) -> Iterator[Group]:
    length, count = max(1, 1024 // traffic.scale), max(1, 64 // traffic.scale)
    return _synthetic(traffic, length, [length] * count)


def _ppo(traffic: Traffic) -> Iterator[Group]:
    return _synthetic(traffic, 256, [512])


def _short_items(traffic: Traffic) -> Iterator[Group]:
    return _synthetic(traffic, 120, [180] * 10)


def _synthetic(traffic: Traffic, prompt: int, responses: list[int]) -> Iterator[Group]:
    if traffic.vocab_size < 64:
        raise ValueError(f"synthetic token ids need a vocabulary of 64 or more, not {traffic.vocab_size}")
    rng = random.Random(traffic.seed)

    def tokens(count: int) -> TokenIds:
        return TokenIds(array("i", rng.choices(range(16, traffic.vocab_size), k=count)))

    for _ in range(traffic.num_groups):
        yield Group(tokens(prompt), [tokens(count) for count in responses])


_WORKLOADS: dict[str, tuple[str, Callable[[Traffic], Iterator[Group]]]] = {
    "best_of_16": ("a real prompt with 16 real answers of very uneven length", _best_of_16),
    "shared_system": ("the same behind one system prompt of 600 tokens, common to all", _shared_system),
    "pairs": ("a real conversation of several turns with a chosen and a rejected answer", _pairs),
    "grpo_64": ("a GRPO group: a prompt of 1024 tokens with 64 responses of 1024", _grpo_64),
    "ppo": ("PPO: independent pairs of 256 + 512 tokens", _ppo),
    "short_items": ("a query of 120 tokens with 10 items of 180, the shape others publish figures for", _short_items),
}
