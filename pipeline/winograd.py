"""Convolutions with fewer multiplications: Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308).

A tile of 4×4 outputs is computed at n² points, n = 4 + kernel − 1, instead of from 4²·kernel² products: 49 for 256
(4×4) and 36 for 144 (3×3). Tiles and kernels are taken to the points and the products taken back by the matrices of
Toom and Cook, exact in exact arithmetic; in float32 the results differ from a direct convolution's by some 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import numpy as np
from numpy.typing import NDArray

TILE_PX = 4
"""Side of a tile of outputs."""
_POINTS = {
    3: [Fraction(p) for p in ("0", "1", "-1", "2", "-2")],
    4: [Fraction(p) for p in ("0", "1", "-1", "2", "-2", "1/2")],
}
"""By the kernel's size, infinity apart: small ones and their inverses cost the fewest digits."""
_SMALLEST_CHANNELS = 128
"""Fewest inputs for which transforming costs less than it saves (seen on a Zen 3)."""
LARGEST_BAND = 2**24
"""Values of one band of transformed tiles: 64 MiB in float32, of which an engine holds up to three at once."""
_BLOCK = 64
"""Outputs whose kernels are transformed together: in float64 all of them would take twice what remains."""


@dataclass(frozen=True)
class Transforms:
    """What takes tiles to the points and back, for one size of kernel."""

    inputs: NDArray[np.float32]
    """(n², n²) from a tile's inputs, row by row."""
    outputs: NDArray[np.float32]
    """(16, n²) to a tile's outputs, row by row."""
    kernel: NDArray[np.float64]
    """(n², kernel²) from a kernel, row by row."""

    @property
    def points(self) -> int:
        """n², the points of a tile."""
        return len(self.inputs)

    def weights(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """Take kernels (outputs, channels, kernel, kernel) to the points: (n², channels, outputs)."""
        outputs, channels, *_ = weight.shape
        found = np.empty((self.points, channels, outputs), np.float32)
        for first in range(0, outputs, _BLOCK):
            block = weight[first : first + _BLOCK].transpose(2, 3, 1, 0)
            rows = block.reshape(self.kernel.shape[1], -1).astype(np.float64)
            found[..., first : first + _BLOCK] = (self.kernel @ rows).reshape(self.points, channels, -1)
        return found


@dataclass(frozen=True)
class Tiling:
    """How tiles cover an image."""

    height: int
    """Of the (padded) input."""
    width: int
    """The same."""
    kernel_px: int
    """3 or 4."""

    @property
    def side(self) -> int:
        """n, of a tile's inputs."""
        return TILE_PX + self.kernel_px - 1

    @property
    def height_out(self) -> int:
        """Of the output."""
        return self.height - self.kernel_px + 1

    @property
    def width_out(self) -> int:
        """Of the output."""
        return self.width - self.kernel_px + 1

    @property
    def down(self) -> int:
        """Rows of tiles; the last may reach beyond the edge."""
        return -(-self.height_out // TILE_PX)

    @property
    def across(self) -> int:
        """Tiles in a row."""
        return -(-self.width_out // TILE_PX)

    def bands(self, channels: int) -> Iterator[tuple[int, int]]:
        """Yield first row and number of rows of tiles that are computed together.

        Args:
            channels: the larger number of input's and output's.
        """
        most = max(1, LARGEST_BAND // (self.side**2 * self.across * channels))
        each = -(-self.down // -(-self.down // most))
        for first in range(0, self.down, each):
            yield first, min(each, self.down - first)

    def inputs(self, first: int, rows: int) -> NDArray[np.int32]:
        """Tell which pixel each point's tile reads in a band: (n²·tiles,), row by row of the (padded) input."""
        # What lies beyond the edge counts for outputs that are cut off again.
        y = np.minimum(np.arange(self.side)[:, None] + TILE_PX * np.arange(first, first + rows), self.height - 1)
        x = np.minimum(np.arange(self.side)[:, None] + TILE_PX * np.arange(self.across), self.width - 1)
        return np.asarray(y[:, None, :, None] * self.width + x[None, :, None, :], np.int32).ravel()

    def outputs(self, first: int, rows: int) -> NDArray[np.int32]:
        """Tell which of a band's (16·tiles) results each pixel of the output is, row by row."""
        y, x = np.arange(min(TILE_PX * rows, self.height_out - TILE_PX * first)), np.arange(self.width_out)
        place = (y % TILE_PX)[:, None] * TILE_PX + x % TILE_PX
        tile = (y // TILE_PX)[:, None] * self.across + x // TILE_PX
        return np.asarray(place * (rows * self.across) + tile, np.int32).ravel()


def pays(shape: Sequence[int]) -> bool:
    """Tell whether a convolution of stride 1 is faster so, by its weights' shape."""
    _, channels, *kernel = shape
    return channels >= _SMALLEST_CHANNELS and kernel in ([3, 3], [4, 4])


@cache
def transforms(kernel_px: int) -> Transforms:
    """Make the matrices for a kernel of 3×3 or 4×4.

    Raises KeyError for others.
    """
    points = _POINTS[kernel_px]
    others = [[q for q in points if q != p] for p in points]
    scale = [math.prod(p - q for q in rest) for p, rest in zip(points, others, strict=True)]
    kernel = [[p**power / s for power in range(kernel_px)] for p, s in zip(points, scale, strict=True)]
    kernel.append([Fraction(power == kernel_px - 1) for power in range(kernel_px)])
    outputs = [[*(p**power for p in points), Fraction(power == TILE_PX - 1)] for power in range(TILE_PX)]
    inputs = [[*_polynomial(rest), Fraction(0)] for rest in others] + [_polynomial(points)]
    to_points, back, taken = (_both_axes(matrix) for matrix in (inputs, outputs, kernel))
    return Transforms(to_points.astype(np.float32), back.astype(np.float32), taken)


def _both_axes(matrix: list[list[Fraction]]) -> NDArray[np.float64]:
    one = np.array(matrix, np.float64)
    return np.asarray(np.kron(one, one), np.float64)


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Return the coefficients of the polynomial with these roots, the constant first."""
    found = [Fraction(1)]
    for root in roots:
        found = [a - root * b for a, b in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
    return found
