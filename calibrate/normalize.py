"""Quantiles of the raw maps and the threshold, from good images that training never saw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from calibrate.layouts import DatasetError
from pipeline.bundle import Bundle
from pipeline.engine import RawMaps
from pipeline.relative import LevelRange
from pipeline.scoring import FloatMap, Quantiles, Scorer

QUANTILE_A, QUANTILE_B = 0.9, 0.995
"""The levels whose quantiles become 0 and 0.1 (paper, section 3.4)."""

LevelRanges = tuple[LevelRange | None, LevelRange | None]
"""Of the student-teacher and the autoencoder's map; None: it is not relative."""
NOT_RELATIVE: LevelRanges = (None, None)


def map_quantiles(
    maps: Sequence[RawMaps],
    scorer: Scorer,
    levels: tuple[float, float] = (QUANTILE_A, QUANTILE_B),
    *,
    autoencoder: bool = True,
    ranges: LevelRanges = NOT_RELATIVE,
) -> Quantiles:
    """Take the exact quantiles of each raw map over all held-out images, ignored areas left out.

    Args:
        maps: of the held-out images.
        scorer: knows the ignored areas.
        levels: the lower and the upper level, from 0 to 1.
        autoencoder: False where that branch was not trained and must not be part of the map.
        ranges: of the levels that maps are divided by, student-teacher and autoencoder.

    Raises DatasetError when there are no maps or they are flat.
    """
    if not maps:
        raise DatasetError("no held-out good image is left to take quantiles from")
    st_range, ae_range = ranges

    def of(raw: Iterable[FloatMap], within: LevelRange | None) -> tuple[float, float]:
        values = np.concatenate([scorer.counted_values(scorer.relative(found, within)) for found in raw])
        a, b = np.quantile(values, levels)
        return float(a), float(b)

    st = of((m.student_teacher for m in maps), st_range)
    try:
        if not autoencoder:
            return Quantiles(*st, None, None, st_range)
        return Quantiles(*st, *of((m.autoencoder for m in maps), ae_range), st_range, ae_range)
    except ValueError as error:
        raise DatasetError(f"the maps of the held-out images cannot be normalised: {error}") from error


def level_ranges(maps: Sequence[RawMaps], scorer: Scorer, *, autoencoder: bool = True) -> LevelRanges:
    """Return between which levels the raw maps of good images lie, student-teacher and autoencoder.

    Taken from other images than the held-out ones they treat a new good image and those alike, and take nothing
    from what `choose_threshold` promises. Raises DatasetError when a level is zero or not finite.
    """
    relative = scorer.relative_maps
    try:
        st = relative.range_of(m.student_teacher for m in maps)
        return st, relative.range_of(m.autoencoder for m in maps) if autoencoder else None
    except ValueError as error:
        raise DatasetError(f"the maps of the good images cannot be divided by their levels: {error}") from error


def ranges_in(
    quantiles: Quantiles, maps: Sequence[RawMaps], exact: Sequence[RawMaps], scorer: Scorer
) -> LevelRanges:
    """Return the ranges of levels for a precision: float32's, with the floor that its rounding adds.

    Args:
        quantiles: float32's.
        maps: of the held-out images, in the precision.
        exact: the same in float32.
        scorer: knows the ignored areas.
    """

    def with_floor(within: LevelRange | None, added: Iterable[FloatMap]) -> LevelRange | None:
        if within is None:
            return None
        return replace(within, floor=float(np.mean([scorer.counted_values(one).mean() for one in added])))

    pairs = list(zip(maps, exact, strict=True))
    return (
        with_floor(quantiles.st_levels, (m.student_teacher - e.student_teacher for m, e in pairs)),
        with_floor(quantiles.ae_levels, (m.autoencoder - e.autoencoder for m, e in pairs)),
    )


def score_maps(maps: Sequence[RawMaps], scorer: Scorer, quantiles: Quantiles) -> NDArray[np.float64]:
    """Score each image: the maximum of its normalised, stretched map."""
    return np.array(
        [float(scorer.stretch(scorer.combine(m.student_teacher, m.autoencoder, quantiles)).max()) for m in maps]
    )


@dataclass(frozen=True, slots=True)
class Threshold:
    """A threshold and what is promised with it."""

    value: float
    false_reject_bound: float
    """Expected share of good parts above the threshold, for parts like the held-out ones."""
    held_out: int
    """Number of scores it was taken from."""


def choose_threshold(scores: NDArray[np.float64], false_reject_rate: float) -> Threshold:
    """Choose the smallest held-out score that keeps the expected false-reject rate.

    The k-th smallest of n scores is exceeded by a new exchangeable one with probability at most
    (n + 1 − k)/(n + 1) (split conformal prediction, Vovk et al. 2005). When n is too small for the wanted
    rate, the largest score is taken, with the rate 1/(n + 1) that it gives.
    """
    n = len(scores)
    k = min(n, math.ceil((n + 1) * (1 - false_reject_rate) - 1e-9))
    return Threshold(float(np.sort(scores)[k - 1]), (n + 1 - k) / (n + 1), n)


def promised_false_reject_rate(bundle: Bundle) -> str:
    """Say which false-reject rate a bundle's threshold gives, on average over parts like the held-out ones.

    With both branches the quantiles that weigh one against the other come from the same held-out images as the
    threshold, which makes the bound an approximation; with one they only stretch the scores.
    """
    word = "at most" if bundle.quantiles.ae_a is None else "about"
    return f"{word} {bundle.calibration['false_reject_bound']:.2%}"
