"""Quantiles of the raw maps and the threshold, from good images that training never saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibrate.layouts import DatasetError
from pipeline.engine import RawMaps
from pipeline.scoring import Quantiles, Scorer, combine_maps

QUANTILE_A, QUANTILE_B = 0.9, 0.995
"""The levels whose quantiles become 0 and 0.1 (paper, section 3.4)."""


def map_quantiles(
    maps: Sequence[RawMaps],
    scorer: Scorer,
    levels: tuple[float, float] = (QUANTILE_A, QUANTILE_B),
    *,
    autoencoder: bool = True,
) -> Quantiles:
    """Take the exact quantiles of each raw map over all held-out images, ignored areas left out.

    Args:
        maps: of the held-out images.
        scorer: knows the ignored areas.
        levels: the lower and the upper level, from 0 to 1.
        autoencoder: False where that branch was not trained and must not be part of the map.

    Raises DatasetError when there are no maps or they are flat.
    """
    if not maps:
        raise DatasetError("no held-out good image is left to take quantiles from")
    st = np.quantile(np.concatenate([scorer.counted_values(m.student_teacher) for m in maps]), levels)
    try:
        if not autoencoder:
            return Quantiles(float(st[0]), float(st[1]), None, None)
        ae = np.quantile(np.concatenate([scorer.counted_values(m.autoencoder) for m in maps]), levels)
        return Quantiles(float(st[0]), float(st[1]), float(ae[0]), float(ae[1]))
    except ValueError as error:
        raise DatasetError(f"the maps of the held-out images cannot be normalised: {error}") from error


def score_maps(maps: Sequence[RawMaps], scorer: Scorer, quantiles: Quantiles) -> NDArray[np.float64]:
    """Score each image: the maximum of its normalised, stretched map."""
    return np.array(
        [float(scorer.stretch(combine_maps(m.student_teacher, m.autoencoder, quantiles)).max()) for m in maps]
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
