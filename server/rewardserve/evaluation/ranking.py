"""How often the preferred response gets the higher score: in all, in each domain, and where nobody trained for it."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from rewardserve.evaluation.data import Pairs
from rewardserve.evaluation.intervals import Estimate, Share, difference, share


@dataclass(frozen=True, slots=True)
class Spillover:
    """What a model is worth outside of the domains it is for."""

    in_domain: Share
    out_of_domain: Share
    difference: Estimate  # in-domain less out-of-domain accuracy


@dataclass(frozen=True, slots=True)
class Ranking:
    accuracy: Share  # of all pairs: a prompt with many responses has many
    by_domain: dict[str, Share]
    spillover: Spillover | None  # None unless the domains were named, and there are others


def ranking(pairs: Pairs, in_domain: Collection[str] = ()) -> Ranking:
    """Needs at least one pair."""
    accuracy = _where(pairs, np.ones(len(pairs), dtype=bool))
    assert accuracy is not None, "no pair"
    by_domain = {str(domain): _where(pairs, pairs.domain == domain) for domain in np.unique(pairs.domain)}
    return Ranking(
        accuracy,
        {domain: found for domain, found in by_domain.items() if found is not None},
        _spillover(pairs, in_domain),
    )


def _spillover(pairs: Pairs, in_domain: Collection[str]) -> Spillover | None:
    inside = np.isin(pairs.domain, list(in_domain))
    here, there = _where(pairs, inside), _where(pairs, ~inside)
    if here is None or there is None:
        return None
    return Spillover(here, there, difference(here, there))


def _where(pairs: Pairs, mask: np.ndarray) -> Share | None:
    return share(pairs.margin[mask], pairs.prompt[mask])
