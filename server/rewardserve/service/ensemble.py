"""Several models' scores as one: each member scores by itself, with its own tokenizer, version and calibration."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rewardserve.metrics import ModelMetrics
from rewardserve.postprocess.members import fold_members
from rewardserve.types import Aggregate, EnsembleScore, GroupScore, ItemFailure, ItemScore, ScoreResult, Timings


@dataclass(frozen=True, slots=True)
class Ensemble:
    """A name under which members are scored together. It has no admission of its own: its members' hold."""

    name: str
    members: tuple[str, ...]
    aggregate: Aggregate
    metrics: ModelMetrics


def combine(ensemble: Ensemble, request_id: str, results: Sequence[ScoreResult]) -> ScoreResult:
    """`results` are the members', in their order, of one request."""
    groups = tuple(_group(parts, ensemble) for parts in zip(*(result.groups for result in results), strict=True))
    versions = tuple((result.model, result.version) for result in results)
    return ScoreResult(
        request_id,
        ensemble.name,
        version_of(ensemble, versions),
        groups,
        Timings(*(max(getattr(r.timings, name) for r in results) for name in Timings.__slots__)),
        members=versions,
    )


def version_of(ensemble: Ensemble, members: Sequence[tuple[str, str]]) -> str:
    """Changes with any member's; `members` are their names and versions, in their order."""
    told = "".join(f"{name} {version}\n" for name, version in members) + str(ensemble.aggregate)
    return "ensemble-" + hashlib.blake2b(told.encode(), digest_size=6).hexdigest()


def _group(parts: Sequence[GroupScore], ensemble: Ensemble) -> GroupScore:
    items = zip(*(part.items for part in parts), strict=True)
    return GroupScore(parts[0].id, tuple(_item(each, ensemble) for each in items))


def _item(parts: Sequence[ItemScore], ensemble: Ensemble) -> ItemScore:
    """One failed member fails the item: a mean over fewer is another score."""
    first = parts[0]
    for name, part in zip(ensemble.members, parts, strict=True):
        if part.failure is not None:
            failure = ItemFailure(part.failure.code, f"member '{name}': {part.failure.message}")
            return replace(first, score=None, raw=None, failure=failure, steps=(), attributes=(), std=None)
    scores = tuple(part.score for part in parts if part.score is not None)
    raw_scores = tuple(part.raw for part in parts if part.raw is not None)
    assert len(scores) == len(raw_scores) == len(parts), "what has not failed has both"
    folded = fold_members(scores, ensemble.aggregate)
    return ItemScore(
        folded.score,
        None,
        max(part.num_prompt_tokens for part in parts),
        max(part.num_response_tokens for part in parts),
        min(part.num_cached_tokens for part in parts),
        any(part.truncated for part in parts),
        raw=fold_members(raw_scores, ensemble.aggregate).score,
        kind=first.kind,
        std=folded.std,
        members=EnsembleScore(folded.mean, folded.min, scores, raw_scores),
    )
