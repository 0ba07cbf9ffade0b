"""How well scores and maps agree with the truth: ROC, precision-recall, PRO, sPRO, and rates with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from calibrate.layouts import Defect

PRO_LIMIT = 0.3
"""False-positive rate up to which PRO is integrated (Bergmann et al. 2021, MVTec AD)."""
SPRO_LIMIT = 0.05
"""The limit that MVTec LOCO's authors use for sPRO."""
_MAX_EDGES = 1 << 16

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ImageMetrics:
    """Ranking of whole images; 0 … 1 each."""

    auroc: float
    ap: float
    f1_max: float


@dataclass(frozen=True, slots=True)
class Rate:
    """Some of many, with Wilson's 95% interval."""

    count: int
    of: int

    @property
    def rate(self) -> float | None:
        """Their share; None of none."""
        return self.count / self.of if self.of else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's score interval at 95%; None of none."""
        if not self.of:
            return None
        ci = binomtest(self.count, self.of).proportion_ci(0.95, method="wilson")
        return float(ci.low), float(ci.high)


@dataclass(frozen=True, slots=True)
class Curve:
    """Overlap against false-positive rate."""

    fpr: Floats
    overlap: Floats

    def area(self, limit: float) -> float:
        """Return the area up to a false-positive rate, divided by it, so that 1 is perfect."""
        end = float(np.interp(limit, self.fpr, self.overlap))
        inside = self.fpr < limit
        return float(auc(np.append(self.fpr[inside], limit), np.append(self.overlap[inside], end)) / limit)


@dataclass(frozen=True, slots=True)
class PixelMetrics:
    """Ranking of pixels; 0 … 1 each."""

    auroc: float
    ap: float
    aupro: float
    """Area under the PRO curve up to PRO_LIMIT."""
    auspro: float | None
    """Area under the sPRO curve up to SPRO_LIMIT; None without saturation thresholds."""
    auspro_30: float | None
    """The same up to PRO_LIMIT."""
    pro: Curve


def image_metrics(defective: NDArray[np.bool_], scores: Floats) -> ImageMetrics:
    """Rank images by score; both classes must occur."""
    precision, recall, _ = precision_recall_curve(defective, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return ImageMetrics(
        float(roc_auc_score(defective, scores)), float(average_precision_score(defective, scores)), float(f1.max())
    )


def score_edges(maps: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Choose the scores at which pixels are told apart: every value of the maps, or the densest 65,536.

    All values above the median of what is too many keep their place among the highest, where curves up to a
    small false-positive rate are decided; the rest are spread evenly by rank.
    """
    values = np.unique(np.concatenate([m.ravel()[np.isfinite(m.ravel())] for m in maps]))
    if len(values) <= _MAX_EDGES:
        return values
    half = _MAX_EDGES // 2
    low = values[:-half]
    spread = low[np.linspace(0, len(low) - 1, half).astype(np.int64)]
    return np.unique(np.concatenate([spread, values[-half:]]))


class PixelTally:
    """Counts pixels by score, so that any number of images fits in memory.

    PRO and sPRO are ROC curves whose positive pixels carry weights: with D defects, each pixel of a defect of
    n pixels weighs 1/(D·n); where a defect saturates at s pixels, its s highest weigh 1/(D·s), the rest nothing.
    """

    def __init__(self, edges: NDArray[np.float32]) -> None:
        """Prepare.

        Args:
            edges: ascending scores; pixels between two neighbours count as equal.
        """
        self._edges = edges
        self._normal: dict[str, Floats] = {}
        self._defective: dict[str, Floats] = {}
        self._pro: dict[str, Floats] = {}
        self._spro: dict[str, Floats] = {}
        self._regions: dict[str, int] = {}
        self._saturating: dict[str, int] = {}

    def add(
        self,
        kind: str,
        values: NDArray[np.float32],
        regions: Sequence[Defect],
        saturating: Sequence[Defect] = (),
    ) -> None:
        """Count one image.

        Args:
            kind: `good`, or the kind of defect.
            values: (height, width) anomaly map; pixels that are not finite do not count.
            regions: connected regions of the truth; none for a good image.
            saturating: defects with their saturation areas.
        """
        counted = np.isfinite(values)
        bins = np.searchsorted(self._edges, values, side="right").astype(np.int64)
        truth = np.zeros(values.shape, np.bool_)
        for defect in (*regions, *saturating):
            truth |= defect.mask
        self._count(self._normal, kind, bins[counted & ~truth])
        self._count(self._defective, kind, bins[counted & truth])
        for defect in regions:
            inside = bins[defect.mask & counted]
            if inside.size:
                self._count(self._pro, kind, inside, np.full(inside.size, 1 / inside.size))
                self._regions[kind] = self._regions.get(kind, 0) + 1
        for defect in saturating:
            inside = np.sort(bins[defect.mask & counted])[::-1]
            if inside.size:
                area = min(defect.saturation_px, inside.size)
                weights = np.clip(area - np.arange(inside.size), 0, 1) / area
                self._count(self._spro, kind, inside, weights)
                self._saturating[kind] = self._saturating.get(kind, 0) + 1

    def _count(
        self, into: dict[str, Floats], kind: str, bins: NDArray[np.int64], weights: Floats | None = None
    ) -> None:
        counts = np.bincount(bins, weights, len(self._edges) + 1).astype(np.float64)
        into[kind] = into[kind] + counts if kind in into else counts

    def metrics(self, kinds: Iterable[str]) -> PixelMetrics | None:
        """Return the metrics over images of these kinds; None without a defective or without a normal pixel."""
        kinds = list(kinds)
        normal, defective = self._sum(self._normal, kinds), self._sum(self._defective, kinds)
        if not normal.any() or not defective.any():
            return None
        places = np.arange(len(normal))
        truth = np.repeat([False, True], len(places))
        scores = np.concatenate([places, places])
        weights = np.concatenate([normal, defective])
        pro = self._curve(normal, self._sum(self._pro, kinds))
        spro = None
        if any(self._saturating.get(kind) for kind in kinds):
            spro = self._curve(normal, self._sum(self._spro, kinds))
        return PixelMetrics(
            auroc=float(roc_auc_score(truth, scores, sample_weight=weights)),
            ap=float(average_precision_score(truth, scores, sample_weight=weights)),
            aupro=pro.area(PRO_LIMIT),
            auspro=None if spro is None else spro.area(SPRO_LIMIT),
            auspro_30=None if spro is None else spro.area(PRO_LIMIT),
            pro=pro,
        )

    def _sum(self, counts: dict[str, Floats], kinds: Sequence[str]) -> Floats:
        total = np.zeros(len(self._edges) + 1)
        for kind in kinds:
            if kind in counts:
                total += counts[kind]
        return total

    @staticmethod
    def _curve(normal: Floats, positive: Floats) -> Curve:
        places = np.arange(len(normal))
        used = (normal > 0) | (positive > 0)
        fpr, overlap, _ = roc_curve(
            np.repeat([False, True], int(used.sum())),
            np.concatenate([places[used], places[used]]),
            sample_weight=np.concatenate([normal[used], positive[used]]),
            drop_intermediate=False,
        )
        return Curve(fpr, overlap)
