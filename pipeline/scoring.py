"""From the two raw maps to the anomaly map, the image score and the regions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.geometry import Geometry
from pipeline.relative import LevelRange, RelativeMaps
from pipeline.resample import resize

FloatMap = NDArray[np.float32]
BoolMap = NDArray[np.bool_]

_TOUCHED = 1e-4
MAX_REGIONS = 64
"""Regions listed per part, largest first, so that a message stays small whatever the picture."""


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Two quantiles of each raw map over held-out good images: what becomes 0 and 0.1."""

    st_a: float
    st_b: float
    ae_a: float | None
    """None where the autoencoder branch was not trained: the map is then the student-teacher map alone."""
    ae_b: float | None
    st_levels: LevelRange | None = None
    """Where given, quantiles and map are of raw maps relative to their own levels (`pipeline.relative`)."""
    ae_levels: LevelRange | None = None

    def __post_init__(self) -> None:
        if (self.ae_a is None) != (self.ae_b is None):
            raise ValueError("the autoencoder's quantiles come both or not at all")
        if (self.ae_levels is not None) != (self.is_relative and self.ae_a is not None):
            raise ValueError("levels belong to every map that has quantiles, or to none")
        if not all(
            np.isfinite(value) for value in (self.st_a, self.st_b, self.ae_a, self.ae_b) if value is not None
        ):
            raise ValueError("a quantile is not finite")
        for name, a, b in (("student-teacher", self.st_a, self.st_b), ("autoencoder", self.ae_a, self.ae_b)):
            if a is not None and b is not None and b <= a:
                raise ValueError(f"the {name} map's upper quantile, {b:.6g}, must lie above the lower one, {a:.6g}")

    @property
    def is_relative(self) -> bool:
        """True where maps are relative to their own levels."""
        return self.st_levels is not None

    def to_json(self) -> dict[str, Any]:
        """Describe the quantiles for a bundle."""
        ranges = ("st_levels", "ae_levels")
        return {name: value for name, value in asdict(self).items() if value is not None or name not in ranges}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read what `to_json` wrote. Raises KeyError, TypeError or ValueError when it is not that."""
        ae_a, ae_b = (None if data[name] is None else float(data[name]) for name in ("ae_a", "ae_b"))
        ranges = {name: LevelRange.from_json(data[name]) for name in ("st_levels", "ae_levels") if name in data}
        return cls(float(data["st_a"]), float(data["st_b"]), ae_a, ae_b, **ranges)


@dataclass(frozen=True, slots=True)
class Region:
    """A connected part of the map above the threshold, in full-frame pixels."""

    x: int
    y: int
    width: int
    height: int
    area_px: int
    peak: float
    """Largest map value inside."""


@dataclass(frozen=True, slots=True)
class FrameArea:
    """The part of the full frame that the score grid covers, in pixels."""

    x: int
    y: int
    width: int
    height: int


class Scorer:
    """Combine the raw maps, stretch over the score grid, leave ignored areas out, find maximum and regions."""

    def __init__(self, geometry: Geometry, ignore: BoolMap | None = None) -> None:
        """Prepare the masks.

        Args:
            geometry: sizes.
            ignore: (height, width) of the region of interest in full-frame pixels, True where ignored.

        Raises ValueError when nothing is left to look at.
        """
        self.geometry = geometry
        self.ignored_score: BoolMap | None = None
        """(score_height, score_width), True where ignored."""
        self.ignored_cells: BoolMap | None = None
        """(map_height, map_width), True where ignored."""
        if ignore is not None:
            self._ignore(ignore)
        cells = (geometry.map_height, geometry.map_width)
        self.counted_cells = np.ones(cells, bool) if self.ignored_cells is None else ~self.ignored_cells
        """(map_height, map_width), False where ignored."""
        self.relative_maps = RelativeMaps(self.counted_cells)

    def _ignore(self, ignore: BoolMap) -> None:
        g, pad = self.geometry, self.geometry.padding_cells
        share = ignore.astype(np.float32)
        score_share = resize(share, g.score_width, g.score_height)
        cell_share = resize(share, g.map_width + 2 * pad, g.map_height + 2 * pad)
        # Whatever the mask touches is ignored, so that a thin strip does not vanish at the map's resolution.
        self.ignored_score = score_share > _TOUCHED
        self.ignored_cells = cell_share[pad : pad + g.map_height, pad : pad + g.map_width] > _TOUCHED
        if self.ignored_score.all() or self.ignored_cells.all():
            raise ValueError("the ignore mask leaves nothing to inspect")

    def combine(self, raw_st: FloatMap, raw_ae: FloatMap, quantiles: Quantiles) -> FloatMap:
        """Normalise both raw maps and average them (paper, algorithm 3); without autoencoder, the first alone.

        Relative maps are not the paper's.

        Args:
            raw_st: (map_height, map_width), student-teacher.
            raw_ae: the same for autoencoder and student.
            quantiles: the values that become 0 and 0.1, and the range of levels, if maps are divided by them.
        """
        q = quantiles
        st = (self.relative(raw_st, q.st_levels) - np.float32(q.st_a)) * np.float32(0.1 / (q.st_b - q.st_a))
        if q.ae_a is None or q.ae_b is None:
            return np.asarray(st, np.float32)
        ae = (self.relative(raw_ae, q.ae_levels) - np.float32(q.ae_a)) * np.float32(0.1 / (q.ae_b - q.ae_a))
        return np.asarray(0.5 * st + 0.5 * ae, np.float32)

    def relative(self, raw_map: FloatMap, within: LevelRange | None) -> FloatMap:
        """Divide a raw map by its levels; without a range of them it stays as it is."""
        return raw_map if within is None else self.relative_maps(raw_map, within)

    def blank(self, anomaly_map: FloatMap) -> FloatMap:
        """Return the map with 0 in its ignored cells."""
        if self.ignored_cells is None:
            return anomaly_map
        return np.where(self.ignored_cells, np.float32(0), anomaly_map)

    def stretch(self, anomaly_map: FloatMap) -> FloatMap:
        """Pad with zeros and upsample bilinearly to (score_height, score_width); ignored pixels are −inf."""
        g, pad = self.geometry, self.geometry.padding_cells
        padded = np.zeros((g.map_height + 2 * pad, g.map_width + 2 * pad), np.float32)
        padded[pad : pad + g.map_height, pad : pad + g.map_width] = self.blank(anomaly_map)
        stretched = cv2.resize(padded, (g.score_width, g.score_height), interpolation=cv2.INTER_LINEAR)
        if self.ignored_score is not None:
            stretched[self.ignored_score] = -np.inf
        return np.asarray(stretched, np.float32)

    def counted_values(self, raw_map: FloatMap) -> NDArray[np.float32]:
        """Return the raw map's values outside ignored areas, flat: what quantiles are taken of."""
        return np.asarray(raw_map[self.counted_cells], np.float32)

    def regions(self, stretched: FloatMap, threshold: float, area: FrameArea) -> list[Region]:
        """List connected areas above the threshold, largest first, at most MAX_REGIONS.

        Args:
            stretched: what `stretch` returned.
            threshold: values above it belong to a region (8-connected).
            area: where the score grid lies in the full frame.
        """
        above = (stretched > threshold).view(np.uint8)
        # Only where anything is: that is mostly a small part of the map.
        left_edge, top_edge, box_width, box_height = cv2.boundingRect(above)
        if box_width == 0:
            return []
        box = (slice(top_edge, top_edge + box_height), slice(left_edge, left_edge + box_width))
        stretched = stretched[box]
        count, labels, stats, _ = cv2.connectedComponentsWithStats(
            np.ascontiguousarray(above[box]), connectivity=8, ltype=cv2.CV_32S
        )
        scale_x = area.width / self.geometry.score_width
        scale_y = area.height / self.geometry.score_height
        order = np.argsort(-stats[1:count, cv2.CC_STAT_AREA], kind="stable")[:MAX_REGIONS] + 1
        regions = []
        for label, (left, top, width, height, pixels) in zip(order.tolist(), stats[order].tolist(), strict=True):
            window = (slice(top, top + height), slice(left, left + width))
            peak = float(stretched[window][labels[window] == label].max())
            left, top = left + left_edge, top + top_edge
            x0, x1 = round(left * scale_x), round((left + width) * scale_x)
            y0, y1 = round(top * scale_y), round((top + height) * scale_y)
            regions.append(
                Region(
                    x=area.x + x0,
                    y=area.y + y0,
                    width=max(1, x1 - x0),
                    height=max(1, y1 - y0),
                    area_px=max(1, round(pixels * scale_x * scale_y)),
                    peak=peak,
                )
            )
        return regions
