"""Is this a picture of a part at all? Black, saturated and frozen frames are not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drivers.frame import Image, PixelFormat

_SMALLEST_STEP_PX, _SAMPLES = 5, 20_000
"""Levels are read from about so many pixels, at an odd step in both axes, which meets every Bayer colour."""
_BRIGHT_SHARE = 1e-3
_SATURATED = 0.995


@dataclass(frozen=True, slots=True)
class PlausibleLimits:
    """Limits of a plausible frame; shares are of the pixel format's full range."""

    black_below: float = 0.04
    """A frame is black when 99.9% of its pixels are darker than this share of the range; 0: no check."""
    saturated_above: float = 0.95
    """A frame is saturated when more than this share of its samples is at 99.5% of the range; 1: no check."""
    frozen_frames: int = 3
    """A frame is frozen when it is the n-th identical one in a row; 0: no check."""


class PlausibilityCheck:
    """Check frames in their order. Keeps the previous image, which must stay valid until the next call."""

    def __init__(self, limits: PlausibleLimits) -> None:
        self._limits = limits
        self._previous: tuple[Image, Image] | None = None
        """The image before, and its sample."""
        self._identical = 1

    def problem(self, image: Image, fmt: PixelFormat) -> str | None:
        """Say what is implausible about a frame, or None.

        Args:
            image: (height, width) or (height, width, 3).
            fmt: its pixel format.
        """
        limits = self._limits
        step = _step_px(image)
        sample = image[::step, ::step].copy()
        previous, self._previous = self._previous, (image, sample)
        same = limits.frozen_frames > 0 and previous is not None and _repeats(previous, (image, sample))
        self._identical = self._identical + 1 if same else 1
        if 0 < limits.frozen_frames <= self._identical:
            return f"frozen: identical to the {self._identical - 1} frames before it"
        if _share_from(sample, limits.black_below * fmt.max_value) < _BRIGHT_SHARE:
            bright = float(np.quantile(sample.astype(np.float32), 1 - _BRIGHT_SHARE)) / fmt.max_value
            return f"black: 99.9% of the pixels are below {bright:.4f} of the range"
        if limits.saturated_above < 1:
            saturated = _share_from(sample, _SATURATED * fmt.max_value)
            if saturated > limits.saturated_above:
                return f"saturated: {saturated:.1%} of the samples are at the end of the range"
        return None

    def forget(self) -> None:
        """Compare the next frame with none: the one before it was not looked at."""
        self._previous = None


def _repeats(previous: tuple[Image, Image], now: tuple[Image, Image]) -> bool:
    """Compare two images, each with its sample: real frames differ by noise everywhere, also in that."""
    (old, old_sample), (new, new_sample) = previous, now
    if old.shape != new.shape or old.dtype != new.dtype:
        return False
    return np.array_equal(old_sample, new_sample) and np.array_equal(old, new)


def _step_px(image: Image) -> int:
    return max(_SMALLEST_STEP_PX, math.isqrt(image.shape[0] * image.shape[1] // _SAMPLES) | 1)


def _share_from(sample: NDArray[Any], level: float) -> float:
    """Return the share of samples at or above a level; whole numbers are compared with whole numbers, for speed."""
    return np.count_nonzero(sample >= math.ceil(level)) / sample.size
