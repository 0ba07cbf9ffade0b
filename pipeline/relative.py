"""Raw maps of surfaces relative to their own image: what stands out of it, and of its surroundings, counts.

Surfaces differ in grain, contrast and light from image to image and from place to place, and the whole raw map with
them, so that its maximum says more about the image than about a defect. The student-teacher map comes relative to
what each place's features let expect (`networks.Expected`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Self

import cv2
import numpy as np
from numpy.typing import NDArray

_BESIDE_CELLS = 3
"""Side of the square over which a map is smoothed: much less than what the networks see at once (33 px)."""
_AROUND_CELLS = 15
"""Side of a cell's surroundings: about twice what the networks see at once."""
_LARGEST = 1e15
"""Two such levels multiplied are still a float32."""


@dataclass(frozen=True, slots=True)
class LevelRange:
    """Between which levels the raw maps of good images lie; what lies beyond excuses nothing more."""

    image_low: float
    """Of an image: the lower quartile of its map."""
    image_high: float
    around_low: float
    """Of a cell's surroundings: their mean, as a multiple of the image's level. A multiple, so that an image that
    differs all over cannot claim in each cell what good images reach in one."""
    around_high: float
    floor: float = 0.0
    """Taken off every cell first: what rounding in a precision of fewer bits adds to a map's squares, which is much
    where an image's level is low."""

    def __post_init__(self) -> None:
        if not np.isfinite(self.floor):
            raise ValueError(f"the floor of a map is {self.floor}")
        for low, high in ((self.image_low, self.image_high), (self.around_low, self.around_high)):
            if not 0 < low <= high < _LARGEST:
                raise ValueError(f"levels from {low} to {high} are no range of positive numbers")

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read what `asdict` gave. Raises KeyError, TypeError or ValueError when it is not that."""
        return cls(*(float(data[field.name]) for field in fields(cls)))


class RelativeMaps:
    """Divide raw maps by their levels: in each cell the geometric mean of the image's and the surroundings'."""

    def __init__(self, counted: NDArray[np.bool_]) -> None:
        """Prepare.

        Args:
            counted: (map_height, map_width), False in ignored cells, which count nowhere.
        """
        self._counted = counted
        self._weights = counted.astype(np.float32)
        # An ignored cell far from all others has nothing around it, and whatever is divided there is left out.
        self._share_beside, self._share_around = (
            np.maximum(mean(self._weights), np.float32(1e-6)) for mean in (_mean_beside, _mean_around)
        )

    def __call__(self, raw_map: NDArray[np.float32], within: LevelRange) -> NDArray[np.float32]:
        """Return the smoothed map divided by its levels, or by the nearest that good images show."""
        if within.floor:
            raw_map = np.maximum(raw_map - np.float32(within.floor), np.float32(0))
        image, around = self.levels(raw_map)
        smoothed = _mean_beside(raw_map * self._weights) / self._share_beside
        image = max(image, within.image_low)
        divisor = np.sqrt(np.clip(around / np.float32(image), within.around_low, within.around_high))
        divisor *= np.float32(min(image, within.image_high))
        return np.asarray(smoothed / divisor, np.float32)

    def levels(self, raw_map: NDArray[np.float32]) -> tuple[float, NDArray[np.float32]]:
        """Return a raw map's lower quartile, and the mean around each cell, (map_height, map_width).

        The quartile is the ⌈n/4⌉-th smallest of n values.
        """
        values = raw_map[self._counted]
        place = (values.size + 3) // 4 - 1
        around = _mean_around(raw_map * self._weights) / self._share_around
        return float(np.partition(values, place)[place]), np.asarray(around, np.float32)

    def range_of(self, raw_maps: Iterable[NDArray[np.float32]]) -> LevelRange:
        """Return between which levels some raw maps lie. Raises ValueError when one is zero or not finite."""
        images, arounds = [], []
        for raw_map in raw_maps:
            image, around = self.levels(raw_map)
            with np.errstate(divide="ignore", invalid="ignore"):
                multiples = around[self._counted] / np.float32(image)
            images.append(image)
            arounds += [multiples.min(), multiples.max()]
        # NumPy's minimum and maximum keep a NaN, Python's only where it comes first.
        return LevelRange(*(float(found) for of in (images, arounds) for found in (np.min(of), np.max(of))))


def _mean_beside(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(cv2.blur(values, (_BESIDE_CELLS, _BESIDE_CELLS)), np.float32)


def _mean_around(values: NDArray[np.float32]) -> NDArray[np.float32]:
    # Beyond the border there is nothing, and it does not count.
    return np.asarray(cv2.blur(values, (_AROUND_CELLS, _AROUND_CELLS), borderType=cv2.BORDER_CONSTANT), np.float32)
