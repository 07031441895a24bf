"""Which rows are held out: by prompt, so that no prompt is trained on and measured with.

Conversations that begin with the same words of the user are one prompt here: datasets hold a conversation at several of
its turns, and knowing one is knowing much of the others.
"""

import hashlib
from collections.abc import Collection, Iterable

from rewardserve.training.rows import Row
from rewardserve.types import Conversation, PlainText

SEED = 2024  # the same for all members of an ensemble and for every run, so that their figures can be compared


def prompt_key(prompt: PlainText | Conversation) -> str:
    """The user's first words, whatever their case and spacing; all turns where no user speaks."""
    if isinstance(prompt, PlainText):
        return normalised(prompt.text)
    said = [message.content for message in prompt.messages if message.role == "user"]
    return normalised(said[0] if said else "\n".join(message.content for message in prompt.messages))


def normalised(text: str) -> str:
    return " ".join(text.lower().split())


def position(key: str, seed: int = SEED) -> float:
    """Where a prompt lies in [0, 1): by a hash, so that neither the file's order nor what else is in it matters."""
    digest = hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split(rows: Iterable[Row], share: float, domains: Collection[str] = ()) -> tuple[list[Row], list[Row]]:
    """(to train on, held out): about `share` of the prompts, and every prompt of one of the `domains`, are held out."""
    rows = list(rows)
    keys = [prompt_key(row.prompt) for row in rows]
    held_out = {key for key, row in zip(keys, rows, strict=True) if row.domain in domains or position(key) < share}
    return (
        [row for key, row in zip(keys, rows, strict=True) if key not in held_out],
        [row for key, row in zip(keys, rows, strict=True) if key in held_out],
    )


def without_prompts_of(rows: Iterable[Row], others: Iterable[Row]) -> list[Row]:
    """Those whose prompt none of the others has."""
    keys = {prompt_key(row.prompt) for row in others}
    return [row for row in rows if prompt_key(row.prompt) not in keys]
