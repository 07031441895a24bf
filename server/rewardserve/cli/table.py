"""Rankings as people read them, and as programs do."""

import json
import sys
import time
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewardserve.cli.rows import Row
from rewardserve.cli.running import counted
from rewardserve.cli.scorer import Scorer
from rewardserve.client import ItemScore, Rendered, TokenIds

PIPE_WIDTH = 100  # columns, where stdout is no terminal
TABLE: dict[str, Any] = {"box": box.SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0), "header_style": "dim"}


@dataclass(frozen=True, slots=True)
class Ranking:
    row: Row
    items: tuple[ItemScore, ...]

    @property
    def ranked(self) -> list[int]:
        """Indices of the responses with a score, best first; equal scores as they were sent."""
        scored = [index for index, item in enumerate(self.items) if item.ok]
        return sorted(scored, key=lambda index: -self.items[index].score)

    @property
    def failed(self) -> list[int]:
        return [index for index, item in enumerate(self.items) if not item.ok]


class Summary:
    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._started = time.monotonic()
        self.num_groups = self.num_pairs = self.num_failed = 0

    def count(self, ranking: Ranking) -> None:
        self.num_groups += 1
        self.num_pairs += len(ranking.items)
        self.num_failed += len(ranking.failed)

    def values(self) -> dict[str, Any]:
        seconds = time.monotonic() - self._started
        return {
            "num_groups": self.num_groups,
            "num_pairs": self.num_pairs,
            "num_failed": self.num_failed,
            "model": self._scorer.name,
            "version": self._scorer.version,
            "seconds": round(seconds, 3),
            "pairs_per_s": round(self.num_pairs / max(seconds, 1e-9), 1),
        }

    def line(self) -> str:
        v = self.values()
        failed = f" ({v['num_failed']} failed)" if v["num_failed"] else ""
        speed = f"{v['seconds']:.2f} s, {v['pairs_per_s']} pairs/s"
        work = f"{counted(v['num_groups'], 'group')}, {counted(v['num_pairs'], 'pair')}{failed}"
        return f"{work}, scored by {v['model']} {v['version']} in {speed}"


class JsonView:
    """One object: of a single group, or `groups` of a file, with the summary's numbers."""

    def __init__(self, scorer: Scorer, top_k: int | None, single: bool) -> None:
        self.summary = Summary(scorer)
        self._top_k, self._single = top_k, single
        self._groups: list[dict[str, Any]] = []

    def show(self, ranking: Ranking) -> None:
        self.summary.count(ranking)
        ranked = [
            {"rank": rank, "score": ranking.items[index].score, **_response_values(ranking, index)}
            for rank, index in enumerate(ranking.ranked[: self._top_k], 1)
        ]
        statuses = [(index, ranking.items[index].status) for index in ranking.failed]
        failed = [
            {"code": status.code.name, "message": status.message, **_response_values(ranking, index)}
            for index, status in statuses
        ]
        row = ranking.row
        key = {} if self._single else {"line": row.line} if row.row_id is None else {"id": row.row_id}
        self._groups.append({**key, "ranked": ranked, "failed": failed})

    def close(self) -> None:
        groups = self._groups[0] if self._single else {"groups": self._groups}
        print(json.dumps({**groups, **self.summary.values()}))


def _response_values(ranking: Ranking, index: int) -> dict[str, Any]:
    row, item = ranking.row, ranking.items[index]
    response = row.responses[index]
    return {
        "index": index,
        **({"label": row.labels[index]} if row.labels else {}),
        "num_response_tokens": item.num_response_tokens,
        "truncated": item.truncated,
        "response": list(response) if isinstance(response, TokenIds) else response,
    }


class TableView:
    """A table for each group, as wide as the terminal."""

    def __init__(self, scorer: Scorer, top_k: int | None) -> None:
        self.summary = Summary(scorer)
        self._top_k = top_k
        self._console = make_console()

    def show(self, ranking: Ranking) -> None:
        self.summary.count(ranking)
        row = ranking.row
        where = "" if row.row_id is None else str(row.row_id)
        self._console.print(_heading(_title(row), where, self._console.width))
        if ranking.ranked:
            self._console.print(self._table(ranking))
        for index in ranking.failed:
            label = f" ({row.labels[index]})" if row.labels else ""
            status = ranking.items[index].status
            text = f"  failed: response {index}{label}: {status.code.name}: {one_line(status.message)}"
            self._console.print(Text(text, "red"), soft_wrap=True)
        self._console.print()

    def close(self) -> None:
        self._console.print(Text(self.summary.line(), "dim"), soft_wrap=True)

    def _table(self, ranking: Ranking) -> Table:
        row, items = ranking.row, ranking.items
        table = Table(**TABLE, expand=True)
        for name in ("rank", "score", "tokens"):
            table.add_column(name, justify="right", no_wrap=True)
        if row.labels:
            table.add_column("label", no_wrap=True, max_width=20, overflow="ellipsis")
        table.add_column("response", no_wrap=True, overflow="ellipsis", ratio=1)
        for rank, index in enumerate(ranking.ranked[: self._top_k], 1):
            item = items[index]
            tokens = f"{item.num_response_tokens}{'*' if item.truncated else ''}"
            label = [Text(one_line(row.labels[index]))] if row.labels else []
            style = "bold green" if rank == 1 else ""
            cells = [Text(str(rank)), Text(f"{item.score:.4f}"), Text(tokens), *label, _shown(row.responses[index])]
            table.add_row(*cells, style=style)
        if any(items[index].truncated for index in ranking.ranked[: self._top_k]):
            table.caption, table.caption_justify = "* cut to the model's max_length", "left"
        return table


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError; rich would exit from inside the event loop


def make_console() -> Console:
    """stdout: coloured and as wide as it is on a terminal, plain and of a fixed width elsewhere."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a letter the terminal does not know is no reason to stop
    return _Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False, markup=False, emoji=False)


def one_line(text: str) -> str:
    """The first line that says something, without control characters: a response must not steer the terminal."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    return "".join(letter if letter.isprintable() else " " for letter in first).strip()


def _heading(title: str, where: str, width: int) -> Table:
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    grid.add_column(no_wrap=True, overflow="ellipsis", justify="right", max_width=width // 3)
    grid.add_row(Text(title, "bold"), Text(one_line(where), "dim"))
    return grid


def _title(row: Row) -> str:
    """The last thing the user said."""
    match row.prompt:
        case str(text) | Rendered(text):
            return one_line(text)
        case TokenIds():
            return f"{len(row.prompt)} prompt tokens"
        case turns:
            said = [turn["content"] for turn in turns if turn["role"] == "user"] or [turns[-1]["content"]]
            return one_line(said[-1])


def _shown(response: str | TokenIds) -> Text:
    if isinstance(response, TokenIds):
        return Text(f"{len(response)} token ids", "dim")
    return Text(one_line(response)) if response.strip() else Text("(empty)", "dim")
