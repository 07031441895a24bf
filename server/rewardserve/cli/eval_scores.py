"""Scores of an evaluation: what there is in DIR/scores.jsonl is kept, and the rest is scored."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rewardserve.cli.rows import Row
from rewardserve.cli.score import Tally, open_output, score_rows
from rewardserve.cli.scorer import Scorer
from rewardserve.evaluation.calibration_file import log_odds
from rewardserve.evaluation.data import Judged, Prompt, Scored, ScoredPrompt
from rewardserve.evaluation.suites import Altered
from rewardserve.options import ConfigError
from rewardserve.types import ScoreKind

FILE = "scores.jsonl"
RAW_LOGIT, PROBABILITY = (kind.name.lower() for kind in (ScoreKind.RAW_LOGIT, ScoreKind.PROBABILITY))


@dataclass(frozen=True, slots=True)
class ItemValues:
    """What is kept of one response. Probabilities are kept as their log-odds, whose margins are Bradley and Terry's."""

    score: float | None  # None where it failed
    num_tokens: int
    members: tuple[float, ...] | None = None  # each member's score, of an ensemble


@dataclass(slots=True)
class Scores:
    """What a run has scored, by the key of a row."""

    by_key: dict[str, list[ItemValues]] = field(default_factory=dict)
    kind: str = RAW_LOGIT  # what they mean where they were scored
    num_failed: int = 0
    num_truncated: int = 0
    failures: Counter[str] = field(default_factory=Counter)  # by status
    examples: dict[str, str] = field(default_factory=dict)  # by status, the first message of it


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is to be scored: a row for each prompt, and one for its altered responses."""

    judged: tuple[Judged, ...]
    altered: tuple[Altered, ...]
    overflow: str

    def rows(self) -> Iterator[Row]:
        """What has equal prompts and responses is scored once. A prompt's two rows follow each other: it is cached."""
        seen: set[str | int | None] = set()
        of_row = self._altered_of_rows()
        for index, judged in enumerate(self.judged):
            texts = [judged.responses, *([of_row[index]] if index in of_row else [])]
            for row in (self._row(judged, responses) for responses in texts):
                if row.row_id not in seen:
                    seen.add(row.row_id)
                    yield row

    def prompts(self, scores: Scores) -> list[ScoredPrompt]:
        """One for each of `judged`; a pair of which one response has no score is left with none."""
        return [self._scored(judged, self._values(scores, judged, judged.responses)) for judged in self.judged]

    def judged_scores(self, scores: Scores) -> list[list[float | None]]:
        """Of the responses of each of `judged`."""
        return [[item.score for item in self._values(scores, each, each.responses)] for each in self.judged]

    def altered_scores(self, scores: Scores) -> list[float | None]:
        """Of each of `altered`."""
        of_row = self._altered_of_rows()
        values = {row: self._values(scores, self.judged[row], texts) for row, texts in of_row.items()}
        upcoming = {row: iter(items) for row, items in values.items()}
        return [next(upcoming[each.row]).score for each in self.altered]

    def _altered_of_rows(self) -> dict[int, tuple[str, ...]]:
        found: dict[int, tuple[str, ...]] = {}
        for each in self.altered:
            found[each.row] = (*found.get(each.row, ()), each.text)
        return found

    def _row(self, judged: Judged, responses: Sequence[str]) -> Row:
        key = _key(judged.prompt, responses, self.overflow)
        return Row(judged.prompt, responses, "", judged.line, key, (), sum(map(len, responses)))

    def _values(self, scores: Scores, judged: Judged, responses: Sequence[str]) -> list[ItemValues]:
        return scores.by_key[_key(judged.prompt, responses, self.overflow)]

    def _scored(self, judged: Judged, items: Sequence[ItemValues]) -> ScoredPrompt:
        ratings = judged.ratings or (None,) * len(items)
        responses = tuple(
            Scored(item.score, len(text), item.num_tokens, rating, item.members)
            for item, text, rating in zip(items, judged.responses, ratings, strict=True)
            if item.score is not None
        )
        is_whole = judged.ratings is not None or len(responses) == len(items)
        return ScoredPrompt(judged.prompt_key, judged.domain, responses if is_whole else (), judged.gap)


async def score_plan(plan: Plan, scorer: Scorer, folder: Path, source: str, resume: bool) -> Scores:
    """With a bar. Raises ConfigError where DIR holds scores of another version, or none of ours."""
    rows = list(plan.rows())
    path = folder / FILE
    with open_output(str(path), source, resume) as output:
        output.check_version(scorer)
        _check_kinds(path)
        with Tally(scorer, sum(row.num_bytes for row in rows), hidden=False) as tally:
            await score_rows(rows, output, scorer, tally)
    return _read(path, {str(row.row_id) for row in rows})


def _check_kinds(path: Path) -> None:
    """Raises ConfigError for rows of an earlier release, which do not say whether their scores are probabilities."""
    with path.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if "kind" not in row and any(score is not None for score in row["scores"]):
                raise ConfigError(
                    f"{path} does not say what its scores mean, as it was written by an earlier release; "
                    "score them again with --no-resume, or choose another --output"
                )


def _key(prompt: Prompt, responses: Sequence[str], overflow: str) -> str:
    """Of the content, so that an edited row is scored again and one that has only moved is not."""
    turns = prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    return hashlib.sha256(json.dumps([turns, *responses, overflow]).encode()).hexdigest()[:24]


def _read(path: Path, wanted: set[str]) -> Scores:
    """Of all rows `wanted`, each of which is there."""
    scores = Scores()
    with path.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row.get("id") not in wanted or row["id"] in scores.by_key:
                continue
            members = row.get("members") or [None] * len(row["scores"])
            items = zip(row["scores"], row["num_response_tokens"], members, strict=True)
            scores.kind = row.get("kind", scores.kind)
            value = log_odds if row.get("kind") == PROBABILITY else float
            scores.by_key[row["id"]] = [
                ItemValues(
                    None if score is None else value(score),
                    num_tokens,
                    tuple(map(value, of_members.values())) if of_members else None,
                )
                for score, num_tokens, of_members in items
            ]
            scores.num_truncated += sum(row["truncated"])
            for error in row.get("errors", ()):
                scores.num_failed += 1
                scores.failures[error["code"]] += 1
                scores.examples.setdefault(error["code"], error["message"])
    return scores
