"""Rows of a JSONL file -> prompts with judged responses."""

import gzip
import hashlib
import zlib
from typing import Annotated

import pydantic
from pydantic import Field

from rewardserve.cli.rows import BadRow, NonEmpty, Turn, explain, json_of, one_of, open_input
from rewardserve.evaluation.data import NO_DOMAIN, Judged
from rewardserve.options import ConfigError
from rewardserve.training.rows import TIE

Finite = Annotated[float, Field(allow_inf_nan=False)]
JUDGEMENTS = ("responses", "chosen")


class _JudgedIn(pydantic.BaseModel):
    """A row as it stands in the file. What else it holds is left alone; null is the same as not there."""

    model_config = pydantic.ConfigDict(strict=True, extra="allow")
    prompt: NonEmpty[str] | None = None
    messages: NonEmpty[list[Turn]] | None = None
    responses: NonEmpty[list[str]] | None = None
    ratings: NonEmpty[list[Finite]] | None = None
    chosen: str | None = None
    rejected: str | None = None
    margin: Annotated[Finite, Field(ge=0)] | None = None
    label: Annotated[float, Field(ge=0, le=1)] | None = None  # how sure it is that `chosen` is; below 0.5 it is not
    domain: str | None = None  # empty is none, as in training


def read_judged(path: str) -> tuple[list[Judged], str]:
    """All rows of INPUT, which may be compressed (.gz), and the SHA-256 of its lines. Empty lines are passed over.

    Raises ConfigError, which BadRow is.
    """
    rows, digest = [], hashlib.sha256()
    with open_input(path) as source:
        try:
            for number, line in enumerate(gzip.GzipFile(fileobj=source) if path.endswith(".gz") else source, 1):
                digest.update(line)
                if line.strip():
                    rows.append(_read_row(number, line))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ConfigError(f"INPUT {path}: is no whole gzip file: {error}") from None
    if not rows:
        raise ConfigError(f"INPUT {path}: there is no row in it")
    return rows, digest.hexdigest()


def _read_row(number: int, line: bytes) -> Judged:
    try:
        return _judged(number, _JudgedIn.model_validate_json(json_of(line)))
    except pydantic.ValidationError as error:
        raise BadRow(f"INPUT line {number}: {explain(error.errors()[0])}") from None
    except ValueError as error:
        raise BadRow(f"INPUT line {number}: {error}") from None


def _judged(number: int, row: _JudgedIn) -> Judged:
    """Raises ValueError that begins with the field."""
    turns = one_of(row, ("prompt", "messages")) == "messages"
    prompt = tuple(turn.model_dump() for turn in row.messages or ()) if turns else row.prompt
    assert prompt is not None
    domain = row.domain or NO_DOMAIN
    if one_of(row, JUDGEMENTS) == "chosen":
        if row.rejected is None:
            raise ValueError("rejected: is missing, and chosen is there")
        if row.ratings is not None:
            raise ValueError("ratings: go with responses; chosen and rejected have none")
        pair = (str(row.chosen), row.rejected)
        if row.label is not None and row.label <= TIE:
            if row.label == TIE:
                return Judged(number, prompt, pair, None, domain, 0.0)
            pair = pair[::-1]
        return Judged(number, prompt, pair, None, domain, row.margin)
    responses, ratings = row.responses or [], row.ratings
    if ratings is None:
        raise ValueError("ratings: is missing; a number for each of the responses, or give chosen and rejected")
    if len(ratings) != len(responses):
        raise ValueError(f"ratings: there are {len(ratings)}, for {len(responses)} responses")
    return Judged(number, prompt, tuple(responses), tuple(ratings), domain)
