"""`rewardserve rank`: the responses to a prompt, best first, as a table for people or as JSON for programs.

Exit codes: 0; 1 if the run could not go on or no response could be scored; 2 for wrong usage.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Sequence

from pydantic import Field
from pydantic_settings import SettingsConfigDict as SettingsConfig

from rewardserve.cli.rows import Row, in_thread, open_input, read_rows
from rewardserve.cli.running import guarded
from rewardserve.cli.scorer import Scorer, ScoringOptions, open_scorer
from rewardserve.cli.table import JsonView, Ranking, TableView
from rewardserve.options import ConfigError, Repeated, load_options


class RankOptions(ScoringOptions):
    """Ranks the responses to one prompt, or to each prompt of a file, best first."""

    model_config = SettingsConfig(cli_shortcuts={"json-output": "json"})

    prompt: str = Field(default="", description="the prompt: one user turn")
    prompt_file: str = Field(default="", description="file that holds the prompt; - for stdin")
    response: Repeated = Field(default=[], description="a response; repeat for each")
    responses_file: str = Field(
        default="", description="file with one response per line, plain or as a JSON string; - for stdin"
    )
    input: str = Field(default="", description="JSONL of many groups instead, rows as for `score`; - for stdin")
    top_k: int = Field(default=0, ge=0, description="show only so many of each group; 0: all")
    json_output: bool = Field(default=False, description="print one JSON object instead of tables")

    def check(self) -> None:
        super().check()
        single = (self.prompt, self.prompt_file, self.response, self.responses_file)
        self.require(not (self.input and any(single)), "--input brings its own prompts and responses; give it alone")
        self.require(bool(self.input or any(single)), "give --prompt and --response, or --input FILE; see --help")
        both = self.prompt_file == self.responses_file == "-"
        self.require(not both, "stdin can hold the prompt or the responses, not both; give one of them by a file")
        if not self.input:
            self.require(bool(self.prompt) != bool(self.prompt_file), "give the prompt by --prompt or by --prompt-file")
            self.require(bool(self.response or self.responses_file), "no response: give --response or --responses-file")


def run(arguments: Sequence[str]) -> int:
    return guarded("rank", lambda: asyncio.run(_rank(load_options(RankOptions, "rank", arguments))))


async def _rank(options: RankOptions) -> int:
    options.check()
    with open_input(options.input) if options.input else contextlib.nullcontext() as source:
        rows = read_rows(source) if source is not None else iter([_row_of(options)])
        async with open_scorer(options) as scorer:
            top_k = options.top_k or None
            view = JsonView(scorer, top_k, source is None) if options.json_output else TableView(scorer, top_k)
            async for ranking in _in_order(scorer, in_thread(rows)):
                view.show(ranking)
            view.close()
    return 1 if 0 < view.summary.num_pairs == view.summary.num_failed else 0


def _row_of(options: RankOptions) -> Row:
    """The one group given by flags. Raises ConfigError."""
    prompt = options.prompt or _read(options.prompt_file).rstrip("\n")
    lines = _read(options.responses_file).split("\n") if options.responses_file else []  # as other files are cut
    responses = [*options.response, *(_response(line) for line in lines if line.strip())]
    if not prompt.strip() or not responses:
        raise ConfigError(f"{'--responses-file' if prompt.strip() else 'the prompt'} is empty")
    for text in (prompt, *responses):
        text.encode()  # raises UnicodeEncodeError: named here, for a tokenizer would say it with a traceback
    return Row(prompt, responses)


def _read(path: str) -> str:
    try:
        if path == "-":
            return sys.stdin.read()
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start})") from None


def _response(line: str) -> str:
    """A JSON string can hold line breaks; what is none is taken as it stands."""
    with contextlib.suppress(ValueError):
        value = json.loads(line) if line.startswith('"') else line
        return value
    return line


async def _in_order(scorer: Scorer, rows: AsyncIterator[Row]) -> AsyncIterator[Ranking]:
    """Rankings in the order of the rows, although scores come in any order."""
    order: list[Row] = []
    finished: dict[int, Ranking] = {}  # by line

    async def noted() -> AsyncIterator[Row]:
        async for row in rows:
            order.append(row)
            yield row

    async with contextlib.aclosing(scorer.score(noted())) as results:
        async for row, items in results:
            finished[row.line] = Ranking(row, items)
            while order and order[0].line in finished:
                yield finished.pop(order.pop(0).line)
