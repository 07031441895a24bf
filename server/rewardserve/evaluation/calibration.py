"""Whether a margin means what Bradley and Terry (1952) say it means, and what would make it so.

The probability that the preferred response is preferred is sigmoid(margin). Which of two responses comes first is
arbitrary, so a pair is looked at from the side of the higher score: the model is sure of it by sigmoid(|margin|), from
one half up, and is right or wrong.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, minimize_scalar
from scipy.special import expit

from rewardserve.evaluation import calibration_file
from rewardserve.evaluation.calibration_file import Affine, Isotonic, Temperature
from rewardserve.evaluation.data import Floats, Pairs
from rewardserve.evaluation.intervals import Estimate, Share, ends, resamples, share, wins

NUM_BINS = 10
NUM_FOLDS = 5
NUM_DRAWS = 200


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs of which the model is about equally sure."""

    low: float
    high: float
    confidence: float  # mean of sigmoid(|margin|)
    accuracy: Share


@dataclass(frozen=True, slots=True)
class Errors:
    """How far probabilities are from what came true; less is better."""

    ece: float  # expected calibration error, 0 to 0.5
    brier: float  # mean squared error; 0.25 is what "one half" for every pair gets
    log_loss: float  # nats; 0.693 is what "one half" for every pair gets


@dataclass(frozen=True, slots=True)
class CalibrationFigures:
    curve: tuple[Bin, ...]
    raw: Errors  # of sigmoid(margin)
    ece: Estimate  # that of `raw`, by the bootstrap over prompts, which tends to be a little above it
    ece_by_chance: float  # what a perfect model would show on so many pairs, were they independent
    temperature: float  # that fits all pairs best
    fitted: dict[str, Errors]  # by kind, each pair judged by a fit that has not seen its prompt


def calibration(pairs: Pairs, mean_score: float, seed: int) -> CalibrationFigures:
    """Needs at least one pair. `mean_score` is for the offset of an affine fit, see `fit`."""
    temperature = fit("temperature", pairs.margin, mean_score)
    assert isinstance(temperature, Temperature)
    return CalibrationFigures(
        curve(pairs),
        errors(expit(pairs.margin)),
        _ece_estimate(pairs, seed),
        _ece_by_chance(expit(np.abs(pairs.margin)), seed),
        temperature.temperature,
        _fitted(pairs, mean_score, seed),
    )


def curve(pairs: Pairs) -> tuple[Bin, ...]:
    """The reliability curve, from one half to 1 in equal steps; empty steps are left out."""
    confidence = expit(np.abs(pairs.margin))
    places = _bins_of(confidence)
    found = []
    for place in np.unique(places):
        here = places == place
        accuracy = share(pairs.margin[here], pairs.prompt[here])
        assert accuracy is not None
        low = 0.5 + place / (2 * NUM_BINS)
        found.append(Bin(float(low), float(low + 0.5 / NUM_BINS), float(confidence[here].mean()), accuracy))
    return tuple(found)


def errors(probabilities: Floats) -> Errors:
    """Of the probabilities [num_pairs] given to what is in truth preferred.

    Expected calibration error as in Naeini et al. (2015) and Guo et al. (2017), with 10 bins from one half to 1; Brier
    (1950); the log loss is the loss Bradley-Terry reward models are trained with.
    """
    confidence, right = np.maximum(probabilities, 1 - probabilities), (1 + np.sign(probabilities - 0.5)) / 2
    return Errors(
        _ece(_bins_of(confidence), confidence - right),
        float(np.mean((1 - probabilities) ** 2)),
        float(-np.mean(np.log(np.maximum(probabilities, 1e-12)))),
    )


def fit(kind: str, margins: Floats, mean_score: float) -> calibration_file.Calibration:
    """To pairs whose preferred response is ahead by `margins` [num_pairs], at least one.

    `temperature` and `affine` are Platt's (1999) with the intercept that symmetry allows, none, and with his targets,
    so that a model that is always right is not fitted as infinitely sure; an affine fit's offset brings `mean_score` to
    0, which no pair can tell. `isotonic` is the least-squares curve that never falls, of each pair from both sides.
    """
    if kind == Isotonic.kind:
        return _fit_isotonic(margins)
    temperature = _fit_temperature(margins)
    return Temperature(temperature) if kind == Temperature.kind else _affine(temperature, mean_score)


def _affine(temperature: float, mean_score: float) -> Affine:
    return Affine(1 / temperature, -mean_score / temperature)


def probabilities(fitted: calibration_file.Calibration, margins: Floats) -> Floats:
    """`fitted.probability` of each [num_pairs]; of millions it would be minutes, one by one."""
    match fitted:
        case Temperature(temperature):
            return expit(margins / temperature)
        case Affine(scale, _):
            return expit(margins * scale)
        case Isotonic():
            at, level = np.array(fitted.margins), np.array(fitted.probabilities)
            right = np.searchsorted(at, margins, side="right")
            before, after = np.maximum(right - 1, 0), np.minimum(right, len(at) - 1)
            width = np.where(before == after, 1.0, at[after] - at[before])  # level outside of them
            return level[before] + (level[after] - level[before]) * ((margins - at[before]) / width)


def _fit_temperature(margins: Floats) -> float:
    unit = float(np.sqrt(np.mean(margins**2))) or 1.0
    target = (len(margins) + 1) / (len(margins) + 2)

    def loss(log_temperature: float) -> float:
        logits = margins / (unit * np.exp(log_temperature))
        return float(np.mean(target * np.logaddexp(0, -logits) + (1 - target) * np.logaddexp(0, logits)))

    found = minimize_scalar(loss, bounds=(np.log(1e-3), np.log(1e3)), method="bounded", options={"xatol": 1e-6})
    return float(unit * np.exp(found.x))


def _fit_isotonic(margins: Floats) -> Isotonic:
    both = np.concatenate([margins, -margins])
    won = np.concatenate([np.ones(len(margins)), np.zeros(len(margins))])
    places, back, counts = np.unique(both, return_inverse=True, return_counts=True)
    level = isotonic_regression(np.bincount(back, won) / counts, weights=counts).x
    surest = (len(margins) + 1) / (len(margins) + 2)  # Platt's target again: no pair is worth a certainty
    level = np.clip(level, 1 - surest, surest)
    kept = np.ones(len(level), dtype=bool)  # the ends of each level stretch say all
    kept[1:-1] = (level[1:-1] != level[:-2]) | (level[1:-1] != level[2:])
    return Isotonic(tuple(places[kept].tolist()), tuple(level[kept].tolist()))


def _fitted(pairs: Pairs, mean_score: float, seed: int) -> dict[str, Errors]:
    """Prompts are dealt into folds; a fold's pairs are judged by what fits the others. Empty for a single prompt."""
    folds = _folds(pairs.prompt, seed)
    if folds.max() == 0:
        return {}
    found = {kind: np.empty(len(pairs)) for kind in calibration_file.KINDS}
    for fold in range(folds.max() + 1):
        here, others = folds == fold, pairs.margin[folds != fold]
        temperature = _fit_temperature(others)
        for fitted in (Temperature(temperature), _affine(temperature, mean_score), _fit_isotonic(others)):
            found[fitted.kind][here] = probabilities(fitted, pairs.margin[here])
    return {kind: errors(values) for kind, values in found.items()}


def _folds(prompts: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    known, places = np.unique(prompts, return_inverse=True)
    dealt = np.random.default_rng(seed).permutation(len(known)) % min(NUM_FOLDS, len(known))
    return dealt[places]


def _bins_of(confidence: Floats) -> NDArray[np.int64]:
    return np.minimum(((confidence - 0.5) * 2 * NUM_BINS).astype(np.int64), NUM_BINS - 1)


def _ece(places: NDArray[np.int64], gaps: Floats) -> float:
    """Means over bins of |how sure - how often right|, weighted by the bins' pairs.

    Of each pair [num_pairs] its bin, and how sure the model is of it less 1 where it is right.
    """
    return float(np.abs(np.bincount(places, gaps, minlength=NUM_BINS)).sum() / len(gaps))


def _ece_estimate(pairs: Pairs, seed: int) -> Estimate:
    confidence = expit(np.abs(pairs.margin))
    bins, apart = _bins_of(confidence), confidence - wins(pairs.margin)
    value = _ece(bins, apart)
    known, places = np.unique(pairs.prompt, return_inverse=True)
    if len(known) == 1:
        return Estimate(value, None, None, 1)
    gaps = np.zeros((len(known), NUM_BINS))
    np.add.at(gaps, (places, bins), apart)
    counts = np.bincount(places)
    low, high = ends(np.array([np.abs(times @ gaps).sum() / (times @ counts) for times in resamples(len(known), seed)]))
    return Estimate(value, float(low), float(high), len(known))


def _ece_by_chance(confidence: Floats, seed: int) -> float:
    rng, places = np.random.default_rng(seed), _bins_of(confidence)
    drawn = (rng.random(len(confidence)) < confidence for _ in range(NUM_DRAWS))
    return float(np.mean([_ece(places, confidence - right) for right in drawn]))
