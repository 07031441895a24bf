"""`rewardserve score INPUT OUTPUT`: a JSONL file of prompts and responses in, one row of scores for each row out.

Rows are read, scored and written as a stream: what is in memory is the window, and the ids seen so far. Every row is on
the disk when its scores are there, so a run that ends early, however it ends, goes on where it stopped.

Exit codes: 0; 1 if the run could not go on, if no response at all could be scored or, with --strict, if any could not;
2 for wrong usage, a bad row included. Rows before a bad one are scored first.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from types import NoneType
from typing import IO, Any

from pydantic import Field
from pydantic_settings import CliPositionalArg
from tqdm import tqdm

from rewardserve.cli.rows import BadRow, Row, in_thread, open_input, read_rows
from rewardserve.cli.running import counted, guarded
from rewardserve.cli.scorer import Scorer, ScoringOptions, open_scorer
from rewardserve.client import ItemScore
from rewardserve.options import ConfigError, load_options


class ScoreOptions(ScoringOptions):
    """Scores every row of a JSONL file, against a server or, with --model, in this process."""

    input: CliPositionalArg[str] = Field(
        description='JSONL to read, - for stdin; rows like {"id": 7, "prompt": "...", "responses": ["...", "..."]}, '
        "with messages, rendered or prompt_token_ids for prompt, and response or response_token_ids for responses"
    )
    output: CliPositionalArg[str] = Field(description="JSONL to write, - for stdout; in order of completion")
    resume: bool = Field(default=True, description="keep what OUTPUT holds and score only the rows it does not have")
    strict: bool = Field(default=False, description="exit with 1 if any response could not be scored")


def run(arguments: Sequence[str]) -> int:
    return guarded("score", lambda: asyncio.run(_score(load_options(ScoreOptions, "score", arguments))))


async def _score(options: ScoreOptions) -> int:
    options.check()
    with (
        open_input(options.input) as source,
        open_output(options.output, options.input, options.resume) as output,
    ):
        async with open_scorer(options) as scorer:
            output.check_version(scorer)
            size_bytes = None if options.input == "-" else os.fstat(source.fileno()).st_size
            with Tally(scorer, size_bytes, hidden=output.is_terminal) as tally:
                await score_rows(read_rows(source), output, scorer, tally)
    nothing_scored = 0 < tally.num_pairs == tally.num_failed
    any_failed = tally.num_failed + output.num_failed_before > 0
    return 1 if nothing_scored or (options.strict and any_failed) else 0


async def score_rows(rows: Iterable[Row], output: "Output", scorer: Scorer, tally: "Tally") -> None:
    """Writes those that `output` does not have. Raises BadRow where `rows` does, when all rows before are scored."""
    bad_rows: list[BadRow] = []

    async def missing_rows() -> AsyncIterator[Row]:
        try:
            async for row in in_thread(rows):
                if output.has(row):
                    tally.skip(row)
                else:
                    yield row
        except BadRow as error:
            bad_rows.append(error)

    async with contextlib.aclosing(scorer.score(missing_rows())) as results:
        async for row, items in results:
            output.write(row, items, scorer)
            tally.count(row, items)
    for error in bad_rows:
        raise error


# -- rows out ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_output(path: str, source: str, resume: bool) -> Iterator["Output"]:
    """OUTPUT `path` for the scores of INPUT `source`; what it holds is kept if `resume`.

    Raises ConfigError if it is no place to write to, or holds what no run of ours has written.
    """
    if path == "-":
        yield Output(sys.stdout.buffer)
        return
    if os.path.exists(path) and source != "-" and os.path.samefile(path, source):
        raise ConfigError(f"OUTPUT {path} is INPUT; choose another file")
    is_file = os.path.isfile(path) or not os.path.exists(path)  # /dev/null or a pipe has nothing to resume from
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "a+b" if is_file else "wb"))
        except OSError as error:
            raise ConfigError(f"OUTPUT {path}: {error.strerror}") from None
        if not is_file:
            yield Output(file)
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"OUTPUT {path}: another run is writing it; wait for it, or choose another file"
            ) from None
        output = Output(file)
        if resume:
            output.take_in()
        else:
            file.truncate(0)
        yield output


class Output:
    """OUTPUT, and what an earlier run has left in it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._ids: set[str | int] = set()
        self._lines: set[int] = set()  # of rows without an id
        self._versions: set[str] = set()
        self.num_failed_before = 0
        self.is_terminal = file.isatty()

    def has(self, row: Row) -> bool:
        return row.line in self._lines if row.row_id is None else row.row_id in self._ids

    def check_version(self, scorer: Scorer) -> None:
        """Scores of different versions cannot be compared, so they are not mixed. Raises ConfigError."""
        for version in self._versions - {scorer.version}:
            raise ConfigError(
                f"OUTPUT holds scores of version {version}, and '{scorer.name}' is version {scorer.version}; "
                "choose another OUTPUT, or begin anew with --no-resume"
            )

    def write(self, row: Row, items: Sequence[ItemScore], scorer: Scorer) -> None:
        """On its way to the disk when this returns."""
        text = json.dumps(_row_out(row, items, scorer), ensure_ascii=False, allow_nan=False)
        self._file.write(text.encode() + b"\n")
        self._file.flush()

    def take_in(self) -> None:
        """Notes what is there already; cuts off a last line that was not written to its end. Raises ConfigError."""
        self._file.seek(0)
        end, line = 0, b""
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n") and _is_torn(line):
                break
            self._take_in_row(number, line)
            end += len(line)
        self._file.truncate(end)
        if end and not line.endswith(b"\n") and not _is_torn(line):
            self._file.write(b"\n")  # the row is there and only its newline is not

    def _take_in_row(self, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            scores, key = row["scores"], row["id"] if "id" in row else row["line"]
            if not isinstance(scores, list) or not all(type(score) in (float, int, NoneType) for score in scores):
                raise ValueError("no scores")
            (self._ids if "id" in row else self._lines).add(key)
            self._versions.add(row["version"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(
                f"OUTPUT line {number} is no row of scores; choose another OUTPUT, or overwrite it with --no-resume"
            ) from None
        self.num_failed_before += sum(score is None for score in scores)


def _is_torn(line: bytes) -> bool:
    """A row of ours that ends too early. Anything else without a newline is a file that we must not cut."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return any(line.startswith(key) or key.startswith(line) for key in (b'{"id": ', b'{"line": '))
    return False


def _row_out(row: Row, items: Sequence[ItemScore], scorer: Scorer) -> dict[str, Any]:
    errors = [
        {"index": index, "code": item.status.code.name, "message": item.status.message}
        for index, item in enumerate(items)
        if not item.ok
    ]
    return {
        **({"line": row.line} if row.row_id is None else {"id": row.row_id}),
        "scores": [item.score_or_none for item in items],
        **({"errors": errors} if errors else {}),
        "num_prompt_tokens": [item.num_prompt_tokens for item in items],
        "num_response_tokens": [item.num_response_tokens for item in items],
        "truncated": [item.truncated for item in items],
        **_more(items),
        "model": scorer.name,
        "version": scorer.version,
    }


def _more(items: Sequence[ItemScore]) -> dict[str, Any]:
    """What some models give besides: lists, null for what failed; and what scores mean."""
    found: dict[str, Any] = {}
    for name in ("steps", "attributes", "members", "std"):
        values = [getattr(item, name) if item.ok else None for item in items]
        if any(value not in (None, (), {}) for value in values):
            found[name] = values
    kinds = {item.kind for item in items if item.ok}
    return found | ({"kind": kinds.pop()} if kinds else {})


# -- what is seen meanwhile --------------------------------------------------------------------------------------------


class Tally:
    """Counts, shown as a bar while it goes on, where stderr is a terminal, and as one line at the end.

    The bar's length is INPUT's bytes, since counting its rows would mean to read it twice.
    """

    def __init__(self, scorer: Scorer, size_bytes: int | None, hidden: bool) -> None:
        self._scorer = scorer
        self._started = time.monotonic()
        self.num_rows = self.num_pairs = self.num_failed = self.num_skipped = 0
        self._bar = tqdm(
            total=size_bytes,
            bar_format="{desc} [{elapsed}]"
            if size_bytes is None
            else "{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]",
            file=sys.stderr,
            smoothing=0,  # rows differ in length: the whole run tells the time left better than the last of them
            disable=hidden or None,  # None: shown on terminals
        )

    def __enter__(self) -> "Tally":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()
        there = f"; {counted(self.num_skipped, 'row')} in OUTPUT already" if self.num_skipped else ""
        model = f"{self._scorer.name} {self._scorer.version}"
        print(f"scored {counted(self.num_rows, 'row')}, {self._speed()}{there}; {model}", file=sys.stderr)

    def skip(self, row: Row) -> None:
        self.num_skipped += 1
        if not self._bar.disable:
            self._bar.initial += row.num_bytes  # so that the time left is reckoned from what is scored
            self._bar.update(row.num_bytes)

    def count(self, row: Row, items: Sequence[ItemScore]) -> None:
        self.num_rows += 1
        self.num_pairs += len(items)
        self.num_failed += sum(not item.ok for item in items)
        self._bar.set_description_str(self._speed(), refresh=False)
        self._bar.update(row.num_bytes)

    def _speed(self) -> str:
        failed = f" ({self.num_failed} failed)" if self.num_failed else ""
        seconds = time.monotonic() - self._started
        per_s = self.num_pairs / max(seconds, 1e-9)
        return f"{counted(self.num_pairs, 'pair')}{failed} in {seconds:.1f} s, {per_s:.1f} pairs/s"
