"""Lines of a JSONL file -> rows to learn from: a prompt, its responses, and what is known of which is better."""

import codecs
import difflib
import gzip
import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Annotated, Any

import pydantic
from pydantic import Field

from rewardserve.options import ConfigError
from rewardserve.types import Conversation, Message, PlainText

GZIP = b"\x1f\x8b"  # RFC 1952, section 2.3.1
PROMPTS = ("prompt", "messages")
TIE = 0.5  # of a label


class BadRow(ConfigError):
    """A line that is no row to learn from; the message names file, line and field."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two responses of a row, by their positions."""

    better: int
    worse: int
    label: float = 1.0  # how sure it is that `better` is the better one, from 0.5 (a tie) to 1
    margin: float = 0.0  # by how much its score should be the higher one

    @property
    def is_tie(self) -> bool:
        return self.label == TIE


@dataclass(frozen=True, slots=True)
class Row:
    line: int
    prompt: PlainText | Conversation
    responses: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    ratings: tuple[float, ...] | None  # one for each response; None where pairs were given
    domain: str


class _Turn(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")  # a key left out might change the score
    role: str
    content: str


Finite = Annotated[float, Field(allow_inf_nan=False)]
Response = Annotated[str, Field(min_length=1)]


class _RowIn(pydantic.BaseModel):
    """A row as it stands in the file. What else it holds is left alone; null is the same as not there."""

    model_config = pydantic.ConfigDict(strict=True, extra="allow")
    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[list[_Turn], Field(min_length=1)] | None = None
    chosen: Response | None = None
    rejected: Response | None = None
    margin: Annotated[Finite, Field(ge=0)] | None = None
    label: Annotated[float, Field(ge=0, le=1)] | None = None
    responses: Annotated[list[Response], Field(min_length=1)] | None = None
    ratings: list[Finite] | None = None
    domain: str | None = None


def read_rows(path: str) -> list[Row]:
    """The rows of a file, gzip or not; empty lines are passed over. Raises BadRow, and ConfigError for the file."""
    try:
        with _open(path) as lines:
            return list(parse_rows(lines, path))
    except (OSError, EOFError, zlib.error) as error:  # a gzip file that ends too early, or is damaged in its midst
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _open(path: str) -> IO[bytes]:
    with open(path, "rb") as file:
        is_gzip = file.read(2) == GZIP
    return gzip.open(path, "rb") if is_gzip else open(path, "rb")  # type: ignore[return-value]


def parse_rows(lines: Iterable[bytes], name: str) -> Iterator[Row]:
    """`name` is what the file is called in errors. Raises BadRow."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _parse_row(number, line, name)


def _parse_row(number: int, line: bytes, name: str) -> Row:
    try:
        values = _RowIn.model_validate_json(line.removeprefix(codecs.BOM_UTF8).rstrip())
        prompt = _prompt(values)
        responses, comparisons, ratings = _pair(values) if _is_pair(values) else _rated(values)
    except pydantic.ValidationError as error:
        raise BadRow(f"{name} line {number}: {_explain(error.errors()[0])}") from None
    except ValueError as error:
        raise BadRow(f"{name} line {number}: {error}") from None
    return Row(number, prompt, responses, comparisons, ratings, values.domain or "")


def _prompt(row: _RowIn) -> PlainText | Conversation:
    if row.prompt is not None and row.messages is not None:
        raise ValueError("prompt and messages: give one of them")
    if row.prompt is not None:
        return PlainText(row.prompt)
    if row.messages is not None:
        return Conversation(tuple(Message(turn.role, turn.content) for turn in row.messages))
    raise ValueError(f"prompt: is missing{_misspelling(row, PROMPTS)}")


def _is_pair(row: _RowIn) -> bool:
    """Raises ValueError if it is a pair and rated responses at once, or neither."""
    pair = [key for key in ("chosen", "rejected", "margin", "label") if getattr(row, key) is not None]
    rated = [key for key in ("responses", "ratings") if getattr(row, key) is not None]
    if pair and rated:
        raise ValueError(f"{pair[0]} and {rated[0]}: a row is a pair (chosen, rejected) or has responses and ratings")
    if not pair and not rated:
        near = _misspelling(row, ("chosen", "rejected", "responses", "ratings"))
        raise ValueError(f"chosen: is missing, and so are responses and ratings{near}")
    for key in ("chosen", "rejected") if pair else ("responses", "ratings"):
        if getattr(row, key) is None:
            raise ValueError(f"{key}: is missing{_misspelling(row, (key,))}")
    return bool(pair)


def _pair(row: _RowIn) -> tuple[tuple[str, ...], tuple[Comparison, ...], None]:
    assert row.chosen is not None and row.rejected is not None
    label = 1.0 if row.label is None else row.label
    better, worse = (0, 1) if label >= TIE else (1, 0)
    comparison = Comparison(better, worse, max(label, 1 - label), row.margin or 0.0)
    return (row.chosen, row.rejected), (comparison,), None


def _rated(row: _RowIn) -> tuple[tuple[str, ...], tuple[Comparison, ...], tuple[float, ...]]:
    assert row.responses is not None and row.ratings is not None
    if len(row.ratings) != len(row.responses):
        raise ValueError(f"ratings: there are {len(row.ratings)} for {len(row.responses)} responses")
    return tuple(row.responses), tuple(compare(row.ratings)), tuple(row.ratings)


def compare(ratings: Sequence[float]) -> Iterator[Comparison]:
    """Every two responses of one prompt; those rated the same are ties."""
    for first, second in itertools.combinations(range(len(ratings)), 2):
        if ratings[first] == ratings[second]:
            yield Comparison(first, second, TIE)
        elif ratings[first] > ratings[second]:
            yield Comparison(first, second)
        else:
            yield Comparison(second, first)


def _misspelling(row: _RowIn, names: Sequence[str]) -> str:
    close = [key for key in row.model_extra or () if difflib.get_close_matches(key, names, n=1, cutoff=0.75)]
    return f"; is {close[0]!r} a misspelling?" if close else ""


def _explain(detail: Any) -> str:
    name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in detail["loc"]).lstrip(".")
    message = detail["msg"].replace(" at line 1 column", " at column")
    return f"{name}: {message}" if name else message
