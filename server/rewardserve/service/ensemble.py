"""Several models' scores as one: each member scores by itself, with its own tokenizer, version and calibration.

What they come to may be calibrated once more, and pays its own length penalty.
"""

import hashlib
import statistics
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from itertools import cycle, product

from rewardserve.engine.base import ADAPTED
from rewardserve.metrics import ModelMetrics
from rewardserve.postprocess.members import fold_members
from rewardserve.service.finish import Finishing, applied, not_finite
from rewardserve.types import (
    Aggregate,
    EnsembleScore,
    GroupScore,
    How,
    ItemCode,
    ItemFailure,
    ItemScore,
    ScoreKind,
    ScoreRequest,
    ScoreResult,
    Timings,
)

MAX_APART = 6  # members, each of which may apply its adapter in either way: 64 versions


@dataclass(slots=True)
class Ensemble:
    """A name under which members are scored together. It has no admission of its own: its members' hold."""

    name: str
    members: tuple[str, ...]
    aggregate: Aggregate
    metrics: ModelMetrics
    configured: Finishing = field(default_factory=Finishing)
    _of_version: tuple[str, Finishing] = field(default_factory=lambda: ("", Finishing()), init=False)
    _alike: frozenset[str] = field(default=frozenset(), init=False)

    def finishing(self, members: Sequence[tuple[str, str]]) -> tuple[str, Finishing]:
        """Its version, and what of what is configured is for it; `members` are names and versions, in their order."""
        version = version_of(self, members)
        if version != self._of_version[0]:
            alike = _alike(self, members)  # no calibration depends on how adapters are applied
            finishing = self.configured.of(self.name, version, alike)
            self._of_version, self._alike = (version, finishing), frozenset(map(finishing.version_of, alike))
        return self._of_version

    def alike(self, members: Sequence[tuple[str, str]]) -> Set[str]:
        """What it would be with the same weights, however adapters are applied: scores differ in roundings only."""
        self.finishing(members)
        return self._alike

    def version(self, members: Sequence[tuple[str, str]]) -> str:
        """What its scores say they are of."""
        version, finishing = self.finishing(members)
        return finishing.version_of(version)


def combine(ensemble: Ensemble, request: ScoreRequest, results: Sequence[ScoreResult]) -> ScoreResult:
    """`results` are the members', in their order, of this request."""
    versions = tuple((result.model, result.version) for result in results)
    version, finishing = ensemble.finishing(versions)
    groups = tuple(
        _group(parts, ensemble, finishing, request.by_step)
        for parts in zip(*(result.groups for result in results), strict=True)
    )
    return ScoreResult(
        request.request_id,
        ensemble.name,
        finishing.version_of(version),
        groups,
        Timings(*(max(getattr(r.timings, name) for r in results) for name in Timings.__slots__)),
        members=versions,
        curve=finishing.curve,
    )


def version_of(ensemble: Ensemble, members: Sequence[tuple[str, str]]) -> str:
    """Before it is finished. Changes with any member's; `members` are their names and versions, in their order."""
    told = "".join(f"{name} {version}\n" for name, version in members) + str(ensemble.aggregate)
    return "ensemble-" + hashlib.blake2b(told.encode(), digest_size=6).hexdigest()


def _alike(ensemble: Ensemble, members: Sequence[tuple[str, str]]) -> list[str]:
    """As if each of its members applied an adapter in either way, or of many members all of them in one."""
    repeat = len(members) if len(members) <= MAX_APART else 1
    return [
        version_of(ensemble, [(name, applied(version, way)) for (name, version), way in zip(members, cycle(ways))])
        for ways in product(("", ADAPTED), repeat=repeat)
    ]


def _group(parts: Sequence[GroupScore], ensemble: Ensemble, finishing: Finishing, by_step: bool) -> GroupScore:
    items = zip(*(part.items for part in parts), strict=True)
    return GroupScore(parts[0].id, tuple(_item(each, ensemble, finishing, by_step) for each in items))


def _item(parts: Sequence[ItemScore], ensemble: Ensemble, finishing: Finishing, by_step: bool) -> ItemScore:
    """One failed member fails the item: a mean over fewer is another score."""
    for name, part in zip(ensemble.members, parts, strict=True):
        if part.failure is not None:
            return _failed(parts, part.failure.code, f"member '{name}': {part.failure.message}")
    steps_agree = len({len(part.steps) for part in parts}) == 1  # not, where a member scores steps unasked
    if by_step and not steps_agree:
        seen = ", ".join(f"'{name}' {len(part.steps)}" for name, part in zip(ensemble.members, parts, strict=True))
        advice = "give the response as steps, or options.step_separator"
        return _failed(
            parts, ItemCode.INVALID_ARGUMENT, f"its members see different numbers of steps: {seen}; {advice}"
        )
    scores = tuple(part.score for part in parts if part.score is not None)
    raw_scores = tuple(part.raw for part in parts if part.raw is not None)
    assert len(scores) == len(raw_scores) == len(parts), "what has not failed has both"
    folded = fold_members(scores, ensemble.aggregate)
    kind, counts = _kind(parts, ensemble.aggregate), _counts(parts)
    num_response_tokens = counts[1]

    def finished(score: float) -> float:
        return finishing.finished(score, kind is ScoreKind.PROBABILITY, num_response_tokens)

    final, each = finished(folded.score), [finished(score) for score in scores]
    if failure := next(filter(None, map(not_finite, (final, *each))), None):
        return _failed(parts, failure.code, failure.message)
    return ItemScore(
        final,
        None,
        *counts,
        raw=fold_members(raw_scores, ensemble.aggregate).score,
        kind=ScoreKind.NORMALIZED if finishing.is_changing else kind,
        steps=_steps(parts, ensemble.aggregate) if steps_agree else (),
        std=statistics.pstdev(each),
        members=EnsembleScore(finished(folded.mean), finished(folded.min), scores, raw_scores),
    )


def _kind(parts: Sequence[ItemScore], aggregate: Aggregate) -> ScoreKind:
    """What is made of members of several kinds has none of theirs, nor is a probability less a spread a probability."""
    kinds = {part.kind for part in parts}
    if len(kinds) > 1 or (kinds == {ScoreKind.PROBABILITY} and aggregate.how is How.MEAN_LESS_STD):
        return ScoreKind.NORMALIZED
    return parts[0].kind


def _steps(parts: Sequence[ItemScore], aggregate: Aggregate) -> tuple[float, ...]:
    """Of each step as of the whole; what the members made of their own steps is folded apart."""
    return tuple(fold_members(step, aggregate).score for step in zip(*(part.steps for part in parts), strict=True))


def _counts(parts: Sequence[ItemScore]) -> tuple[int, int, int, bool]:
    """Tokens of prompt, response and cache, and whether it was truncated, whichever members did the most."""
    return (
        max(part.num_prompt_tokens for part in parts),
        max(part.num_response_tokens for part in parts),
        min(part.num_cached_tokens for part in parts),
        any(part.truncated for part in parts),
    )


def _failed(parts: Sequence[ItemScore], code: ItemCode, message: str) -> ItemScore:
    return ItemScore(None, ItemFailure(code, message), *_counts(parts))
