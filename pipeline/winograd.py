"""Convolutions with fewer multiplications: Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308).

A tile of 4×4 outputs is computed at n² points, n = 4 + kernel − 1, instead of from 4²·kernel² products: 49 for 256
(4×4) and 36 for 144 (3×3). Tiles and kernels are taken to the points and the products taken back by the matrices of
Toom and Cook, exact in exact arithmetic; in float32 the results differ from a direct convolution's by some 1e-6.
"""

from __future__ import annotations

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
KERNELS_PX = tuple(_POINTS)
"""Kernels that can be computed so."""
SMALLEST_CHANNELS = 128
"""Fewest inputs for which the way to the points and back costs less than it saves (seen on a Zen 3)."""
LARGEST_BAND = 2**24
"""Values at the points of one band of tiles: 64 MiB in float32."""


@dataclass(frozen=True)
class Transforms:
    """What takes tiles to the points and back, for one size of kernel."""

    points: int
    """n², the points of a tile."""
    inputs: NDArray[np.float32]
    """(n², n²) from a tile's inputs, row by row."""
    outputs: NDArray[np.float32]
    """(16, n²) to a tile's outputs, row by row."""
    kernel: NDArray[np.float64]
    """(n², kernel²) from a kernel, row by row."""

    def weights(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """Take kernels (outputs, channels, kernel, kernel) to the points: (n², channels, outputs)."""
        outputs, channels, *_ = weight.shape
        rows = weight.transpose(2, 3, 1, 0).reshape(-1, channels * outputs)
        return (self.kernel @ rows.astype(np.float64)).astype(np.float32).reshape(-1, channels, outputs)


@dataclass(frozen=True)
class Band:
    """Some rows of an image's tiles, computed together."""

    tiles: int
    inputs: NDArray[np.int32]
    """(n²·tiles,) the pixel that each point's tile reads, row by row of the (padded) input."""
    outputs: NDArray[np.int32]
    """(rows·width of the output,) which of the (16·tiles) results each of its pixels is, row by row."""


@cache
def transforms(kernel_px: int) -> Transforms:
    """Make the matrices for a kernel of 3×3 or 4×4.

    Raises KeyError for others.
    """
    points = _POINTS[kernel_px]
    others = [[q for q in points if q != p] for p in points]
    scale = [_product([p - q for q in rest]) for p, rest in zip(points, others, strict=True)]
    kernel = [[p**power / s for power in range(kernel_px)] for p, s in zip(points, scale, strict=True)]
    kernel.append([Fraction(power == kernel_px - 1) for power in range(kernel_px)])
    outputs = [[*(p**power for p in points), Fraction(power == TILE_PX - 1)] for power in range(TILE_PX)]
    inputs = [[*_polynomial(rest), Fraction(0)] for rest in others] + [_polynomial(points)]
    to_points, back, taken = (_both_axes(matrix) for matrix in (inputs, outputs, kernel))
    return Transforms(
        points=len(to_points), inputs=to_points.astype(np.float32), outputs=back.astype(np.float32), kernel=taken
    )


def bands(height: int, width: int, kernel_px: int, channels: int) -> Iterator[Band]:
    """Cut an image into bands of tiles, from top to bottom.

    Args:
        height: of the (padded) input.
        width: the same.
        kernel_px: 3 or 4.
        channels: the larger number of input's and output's.
    """
    side = TILE_PX + kernel_px - 1
    height_out, width_out = height - kernel_px + 1, width - kernel_px + 1
    down, across = -(-height_out // TILE_PX), -(-width_out // TILE_PX)
    most = max(1, LARGEST_BAND // (side**2 * across * channels))
    rows_each = -(-down // -(-down // most))
    # What lies beyond the edge counts for outputs that are cut off again.
    x = np.minimum(np.arange(side)[:, None] + TILE_PX * np.arange(across), width - 1)
    x_out = np.arange(width_out)
    for first in range(0, down, rows_each):
        rows = min(rows_each, down - first)
        y = np.minimum(np.arange(side)[:, None] + TILE_PX * np.arange(first, first + rows), height - 1)
        y_out = np.arange(min(TILE_PX * rows, height_out - TILE_PX * first))
        place = (y_out % TILE_PX)[:, None] * TILE_PX + x_out % TILE_PX
        tile = (y_out // TILE_PX)[:, None] * across + x_out // TILE_PX
        yield Band(
            tiles=rows * across,
            inputs=(y[:, None, :, None] * width + x[None, :, None, :]).astype(np.int32).ravel(),
            outputs=(place * (rows * across) + tile).astype(np.int32).ravel(),
        )


def _both_axes(matrix: list[list[Fraction]]) -> NDArray[np.float64]:
    one = np.array(matrix, np.float64)
    return np.kron(one, one).astype(np.float64)


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Return the coefficients of the polynomial with these roots, the constant first."""
    found = [Fraction(1)]
    for root in roots:
        found = [a - root * b for a, b in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
    return found


def _product(factors: Sequence[Fraction]) -> Fraction:
    found = Fraction(1)
    for factor in factors:
        found *= factor
    return found
