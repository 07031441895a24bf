"""Rows of a JSONL file -> groups to score."""

import asyncio
import codecs
import contextlib
import difflib
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Annotated, Any, TypeVar

import pydantic
from pydantic import Field

from rewardserve.client import Group, Rendered, TokenIds
from rewardserve.client.types import Prompt
from rewardserve.options import ConfigError

PROMPTS = ("prompt", "messages", "prompt_token_ids", "rendered")
RESPONSES = ("responses", "response", "response_token_ids")
READ_AHEAD = 16  # rows

T = TypeVar("T")
NonEmpty = Annotated[T, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class BadRow(ConfigError):
    """A row of INPUT that is none; the message names line and field."""


@dataclass(frozen=True, slots=True)
class Row(Group):
    """A group that knows where it stands."""

    line: int = 0
    row_id: str | int | None = None
    labels: tuple[str, ...] = ()  # one for each response, or none
    num_bytes: int = 0


class Turn(pydantic.BaseModel):
    """Of a conversation."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")  # a key left out might change the score
    role: str
    content: str


class _RowIn(pydantic.BaseModel):
    """A row as it stands in the file. What else it holds is left alone; null is the same as not there."""

    model_config = pydantic.ConfigDict(strict=True, extra="allow")
    id: str | int | None = None
    prompt: NonEmpty[str] | None = None
    messages: NonEmpty[list[Turn]] | None = None
    prompt_token_ids: NonEmpty[list[TokenId]] | None = None
    rendered: NonEmpty[str] | None = None
    responses: NonEmpty[list[str]] | None = None
    response: str | None = None
    response_token_ids: NonEmpty[list[list[TokenId]]] | None = None
    labels: Any = None


def open_input(path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    """Raises ConfigError."""
    if path == "-":  # not sys.stdin: at exit the interpreter would wait for a thread that still reads from that
        return contextlib.nullcontext(open(0, "rb", closefd=False))
    try:
        return open(path, "rb")
    except OSError as error:
        raise ConfigError(f"INPUT {path}: {error.strerror}") from None


def read_rows(lines: Iterable[bytes]) -> Iterator[Row]:
    """Empty lines are passed over. Raises BadRow."""
    seen: set[str | int] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _read_row(number, line)
        if row.row_id in seen:
            raise BadRow(f"INPUT line {number}: id: {row.row_id!r} stands on an earlier line already")
        if row.row_id is not None:
            seen.add(row.row_id)
        yield row


def _read_row(number: int, line: bytes) -> Row:
    try:
        values = _RowIn.model_validate_json(json_of(line))
        prompt, responses = _prompt(values), _responses(values)
    except pydantic.ValidationError as error:
        raise BadRow(f"INPUT line {number}: {explain(error.errors()[0])}") from None
    except ValueError as error:
        raise BadRow(f"INPUT line {number}: {error}") from None
    labels = values.labels if isinstance(values.labels, list) and len(values.labels) == len(responses) else ()
    return Row(prompt, responses, "", number, values.id, tuple(map(str, labels)), len(line))


def _prompt(row: _RowIn) -> Prompt:
    match one_of(row, PROMPTS):
        case "prompt":
            return row.prompt
        case "rendered":
            return Rendered(row.rendered)
        case "messages":
            return [turn.model_dump() for turn in row.messages]
        case _:
            return TokenIds(row.prompt_token_ids)


def _responses(row: _RowIn) -> Sequence[str | TokenIds]:
    match one_of(row, RESPONSES):
        case "responses":
            return row.responses
        case "response":
            return [row.response]
        case _:
            return [TokenIds(ids) for ids in row.response_token_ids]


def one_of(row: pydantic.BaseModel, names: Sequence[str]) -> str:
    """The one of `names` that the row has. Raises ValueError, naming what is missing and what may be a misspelling."""
    given = [name for name in names if getattr(row, name) is not None]
    if len(given) == 1:
        return given[0]
    if given:
        raise ValueError(f"{' and '.join(given)}: give one of them")
    close = [key for key in row.model_extra or () if difflib.get_close_matches(key, names, n=1, cutoff=0.75)]
    raise ValueError(f"{names[0]}: is missing{f'; is {close[0]!r} a misspelling?' if close else ''}")


def json_of(line: bytes) -> bytes:
    """Without the mark that some editors begin a file with, and its end: what ends too early does so in this line."""
    return line.removeprefix(codecs.BOM_UTF8).rstrip()


def explain(detail: Any) -> str:
    """One of pydantic's errors, as the field and what is wrong with it."""
    if detail["loc"][:1] == ("id",):
        return "id: must be a string or an integer"
    name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in detail["loc"]).lstrip(".")
    message = detail["msg"].replace(" at line 1 column", " at column")
    return f"{name}: {message}" if name else message


async def in_thread(items: Iterable[T]) -> AsyncIterator[T]:
    """Iterates in a thread of its own, a few ahead. A daemon, for a read of a pipe may never return."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[T | Exception | None] = asyncio.Queue()
    room, ended = threading.Semaphore(READ_AHEAD), threading.Event()

    def hand_over(item: T | Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it
            loop.call_soon_threadsafe(queue.put_nowait, item)

    def read() -> None:
        try:
            for item in items:
                hand_over(item)
                room.acquire()
                if ended.is_set():
                    return
            hand_over(None)
        except Exception as error:  # raised below, where somebody listens
            hand_over(error)

    threading.Thread(target=read, name="reader", daemon=True).start()
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
            room.release()
    finally:
        ended.set()
        room.release()
