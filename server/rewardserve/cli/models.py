"""`rewardserve models ACTION [NAME [SOURCE]]`: what a server serves, and changing it.

Exit codes: 0; 1 if a server could not or would not do it; 2 for wrong usage.
"""

import asyncio
import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field
from pydantic_settings import CliPositionalArg
from pydantic_settings import SettingsConfigDict as SettingsConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewardserve.cli.rows import NonEmpty, Turn, explain, json_of, one_of
from rewardserve.cli.running import DEFAULT_ENDPOINT, MAX_TIMEOUT_S, connect, guarded
from rewardserve.cli.table import TABLE, make_console, one_line
from rewardserve.client import AsyncRewardClient, CanaryPair, ModelInfo, SwapResult
from rewardserve.client.types import Prompt
from rewardserve.options import ConfigError, Options, Repeated, load_options

ACTIONS = {
    "list": (),
    "get": ("NAME",),
    "load": ("NAME", "SOURCE"),
    "unload": ("NAME",),
    "swap": ("NAME", "SOURCE"),
    "rollback": ("NAME",),
    "update": ("NAME", "SOURCE"),
}
COLUMNS = ("name", "state", "version", "architecture", "path", "dtype", "device", "max_length", "restarts")
LEFT_OUT_FIRST = ("device", "dtype", "architecture", "max_length", "path", "version", "endpoint", "restarts")
STYLES = {"serving": "green", "failed": "bold red"}  # of a state; any other is passing
MEANT_FOR = {  # options that do something for these actions alone
    "dtype": ("load", "swap"),
    "canaries": ("swap",),
    "shadow_share": ("swap",),
    "min_rank_correlation": ("swap",),
    "keep_previous": ("swap",),
}
SUFFIX = "ForSequenceClassification"  # of every architecture that can be served


class ModelsOptions(Options):
    """Lists the models a server serves (list, get NAME), or changes them."""

    model_config = SettingsConfig(cli_shortcuts={"json-output": "json"})

    action: CliPositionalArg[str] = Field(
        default="list", description="list, get, load, unload, swap, rollback, or update: weights in place"
    )
    name: CliPositionalArg[str] = Field(default="", description="the name a model is served by; not for list")
    source: CliPositionalArg[str] = Field(
        default="", description="load, swap, update: checkpoint, a hub name or a folder on the server's machine"
    )
    endpoint: Repeated = Field(default=[], description=f"server to ask; repeat for several [{DEFAULT_ENDPOINT}]")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="load, swap: precision of the backbone; auto is as the server was told"
    )
    canaries: str = Field(
        default="", description='swap: JSONL of {"prompt", "chosen", "rejected"} that the new version must rank right'
    )
    shadow_share: float = Field(
        default=0.0, ge=0, le=1, description="swap: share of live requests that both versions score before"
    )
    min_rank_correlation: float | None = Field(
        default=None, ge=-1, le=1, description="swap: least rank correlation of the two over those requests"
    )
    keep_previous: bool = Field(default=False, description="swap: keep the old version loaded, for a fast rollback")
    timeout: float = Field(
        default=600.0, gt=0, le=MAX_TIMEOUT_S, description="seconds to wait; a change that has begun goes on"
    )
    json_output: bool = Field(default=False, description="print JSON instead of a table")

    def check(self) -> None:
        if self.action not in ACTIONS:
            close = difflib.get_close_matches(self.action, ACTIONS, n=1)
            near = f"; did you mean '{close[0]}'?" if close else f"; there are {', '.join(ACTIONS)}"
            raise ConfigError(f"no action '{self.action}'{near}")
        wanted = ACTIONS[self.action]
        given = [value for value in (self.name, self.source) if value]
        self.require(len(given) == len(wanted), f"usage: rewardserve models {' '.join((self.action, *wanted))}")
        if self.action in ("list", "get"):  # they change nothing, and a file may say how to swap
            return
        for name, actions in MEANT_FOR.items():
            is_given = getattr(self, name) != type(self).model_fields[name].default
            flag = f"--{name.replace('_', '-')}"
            self.require(
                not is_given or self.action in actions,
                f"{flag} does nothing for {self.action}: it is for {' and '.join(actions)}; leave it out",
            )


def run(arguments: Sequence[str]) -> int:
    return guarded("models", lambda: asyncio.run(_models(load_options(ModelsOptions, "models", arguments))))


async def _models(options: ModelsOptions) -> int:
    options.check()
    async with connect(options.endpoint, options.timeout) as client:
        show = _show_json if options.json_output else _show_tables
        show(options, await _ask(client, options))
    return 0


async def _ask(client: AsyncRewardClient, options: ModelsOptions) -> tuple[ModelInfo, ...]:
    match options.action:
        case "list":
            return await client.list_models()
        case "get":
            return (await client.get_model(options.name),)
        case "load":
            return (await client.load_model(options.name, options.source, options.dtype),)
        case "swap":
            (result, *_) = await client.swap_model(
                options.name,
                options.source,
                options.dtype,
                canaries=read_pairs(options.canaries) if options.canaries else (),
                shadow_share=options.shadow_share,
                min_rank_correlation=options.min_rank_correlation,
                keep_previous=options.keep_previous,
            )
            _tell(result)
            return (result.model,)
        case "update":
            return (await client.update_weights(options.name, options.source),)
        case "rollback":
            return (await client.rollback_model(options.name),)
        case _:
            await client.unload_model(options.name)
            return ()


class _PairIn(pydantic.BaseModel):
    """A canary as it stands in the file. What else it holds is left alone."""

    model_config = pydantic.ConfigDict(strict=True, extra="allow")
    prompt: NonEmpty[str] | None = None
    messages: NonEmpty[list[Turn]] | None = None
    chosen: str
    rejected: str


def read_pairs(path: str) -> list[CanaryPair]:
    """Empty lines are passed over. Raises ConfigError naming the line that is wrong."""
    pairs = []
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"--canaries {path}: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _PairIn.model_validate_json(json_of(line))
            is_text = one_of(row, ("prompt", "messages")) == "prompt"
        except pydantic.ValidationError as error:
            raise ConfigError(f"--canaries {path}, line {number}: {explain(error.errors()[0])}") from None
        except ValueError as error:
            raise ConfigError(f"--canaries {path}, line {number}: {error}") from None
        prompt: Prompt = row.prompt or "" if is_text else [turn.model_dump() for turn in row.messages or ()]
        pairs.append(CanaryPair(prompt, row.chosen, row.rejected))
    return pairs


def _tell(result: SwapResult) -> None:
    """How the new version was tried; on stderr, beside what it is."""
    told = [f"version {result.previous_version} -> {result.model.version}"]
    if result.num_canaries:
        told.append(f"{result.num_canaries_right} of {result.num_canaries} canary pairs right")
    if result.rank_correlation is not None:
        told.append(f"rank correlation {result.rank_correlation:.3f} over {result.num_shadow_requests} requests")
    print("; ".join(told), file=sys.stderr)


def _show_json(options: ModelsOptions, models: Sequence[ModelInfo]) -> None:
    values: Any = [dataclasses.asdict(model) for model in models]
    if options.action in ("get", "load", "swap", "rollback", "update"):
        (values,) = values
    print(json.dumps({"unloaded": options.name} if options.action == "unload" else values))


def _show_tables(options: ModelsOptions, models: Sequence[ModelInfo]) -> None:
    console = make_console()
    if options.action == "unload":
        console.print(f"unloaded {options.name}")
    elif options.action == "get":
        console.print(_details(models[0]))
    elif models:
        _show_list(console, models)
    else:
        where = ", ".join(options.endpoint) or DEFAULT_ENDPOINT
        print(f"no model is served at {where}; `rewardserve models load NAME SOURCE` loads one", file=sys.stderr)


def _show_list(console: Console, models: Sequence[ModelInfo]) -> None:
    """A line for each model, and below what a model has to say."""
    several = len({model.endpoint for model in models}) > 1
    columns = [*COLUMNS, *(("endpoint",) if several else ())]
    left_out = []
    while True:
        table = _list(models, columns)
        width = console.measure(table, options=console.options.update(width=1000)).maximum
        if not console.is_terminal:  # a pipe is as wide as it needs to be: one line is one model, whole
            console.width = max(console.width, width)
        least = next((column for column in LEFT_OUT_FIRST if column in columns), None)
        if width <= console.width or least is None:
            break
        columns.remove(least)  # or every column would shrink, the names to nothing
        left_out.append(least)
    console.print(table)
    if left_out:
        note = f" no room for {', '.join(left_out)}: `rewardserve models get NAME` shows all"
        console.print(Text(note), soft_wrap=True)
    for model in models:
        for text in _remarks(model):
            console.print(Text(f" {model.name}: {one_line(text)}"), soft_wrap=True)


def _list(models: Sequence[ModelInfo], columns: Sequence[str]) -> Table:
    table = Table(**TABLE)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in ("max_length", "restarts") else "left"
        table.add_column(column, justify=justify, no_wrap=True, overflow="ellipsis")
    for model in models:
        cells = dict(zip((*COLUMNS, "endpoint"), (*_cells(model), Text(model.endpoint)), strict=True))
        table.add_row(*(cells[column] for column in columns))
    return table


def _cells(model: ModelInfo) -> list[Text]:
    architecture = model.architecture.removesuffix(SUFFIX)
    path = model.path
    if model.members:
        architecture, path = f"{model.aggregate}({'+'.join(model.members)})", ""
    return [
        Text(model.name, "bold"),
        Text(model.state, STYLES.get(model.state, "yellow")),
        *map(Text, (model.version, architecture, path, model.dtype, model.device)),
        Text(str(model.max_length)),
        Text(str(model.num_restarts)),
    ]


def _remarks(model: ModelInfo) -> list[str]:
    kind = {"padded": "padded, and so slower", "vllm": "by vLLM"}.get(model.path, model.path)
    reason = [f"{kind}: {model.path_reason}"] if model.path_reason else []
    return [*reason, *([f"{model.state}: {model.message}"] if model.message else [])]


def _details(model: ModelInfo) -> Table:
    """Everything that is known of one model."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in dataclasses.asdict(model).items():
        grid.add_row(name, Text(f"{value:,}" if type(value) is int else str(value)))
    return grid
