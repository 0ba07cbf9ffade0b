"""Antialiased resizing, defined once as two tables of weights, and the same numbers through OpenCV.

Along each axis an image that shrinks is averaged over the area that each output pixel covers, and one that
grows is interpolated linearly between pixel centres. The tables are what the CUDA kernel reads and what
the tests hold OpenCV against.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

_NEGLIGIBLE_SHARE = 1e-3
"""OpenCV leaves out source pixels of which an output pixel covers no more than this."""
_LARGE_SAMPLES = 1_000_000
"""From so many samples on, averaging whole numbers row by row is faster than converting them all to float32."""


@dataclass(frozen=True, slots=True)
class AxisWeights:
    """Weights of one axis: output i is the sum over k of weights[i, k] × input[start[i] + k]."""

    start: NDArray[np.int32]
    """(outputs,)"""
    weights: NDArray[np.float32]
    """(outputs, taps); unused taps are 0 and may lie beyond the last input."""


def axis_weights(inputs: int, outputs: int) -> AxisWeights:
    """Make the table for one axis from `inputs` to `outputs` pixels."""
    scale = inputs / outputs
    starts: list[int] = []
    rows: list[list[float]] = []
    for i in range(outputs):
        first, row = _covered(i, scale, inputs) if outputs < inputs else _between(i, scale, inputs)
        starts.append(first)
        rows.append(row)
    weights = np.zeros((outputs, max(len(row) for row in rows)), np.float32)
    for i, row in enumerate(rows):
        weights[i, : len(row)] = row
    return AxisWeights(np.array(starts, np.int32), weights)


def _covered(i: int, scale: float, inputs: int) -> tuple[int, list[float]]:
    """Return the shares of the inputs that output i covers when shrinking."""
    low, high = i * scale, (i + 1) * scale
    width = min(scale, inputs - low)
    whole_first = int(np.ceil(low))
    whole_last = min(int(np.floor(high)), inputs - 1)
    whole_first = min(whole_first, whole_last)
    first, row = whole_first, []
    if whole_first - low > _NEGLIGIBLE_SHARE:
        first = whole_first - 1
        row.append((whole_first - low) / width)
    row += [1.0 / width] * (whole_last - whole_first)
    if high - whole_last > _NEGLIGIBLE_SHARE:
        row.append(min(min(high - whole_last, 1.0), width) / width)
    return first, row


def _between(i: int, scale: float, inputs: int) -> tuple[int, list[float]]:
    """Return the weights of the two neighbours of output i's centre when growing."""
    position = (i + 0.5) * scale - 0.5
    first = int(np.floor(position))
    share = position - first
    if first < 0:
        return 0, [1.0]
    if first >= inputs - 1:
        return inputs - 1, [1.0]
    return first, [1.0 - share, share]


def resize(image: NDArray[Any], width: int, height: int) -> NDArray[np.float32]:
    """Resize (h, w) or (h, w, channels), float32 or unsigned whole numbers, to float32 by the rule above."""
    if image.dtype.kind == "u":
        if image.shape[0] > height and image.size >= _LARGE_SAMPLES:
            image = shrink_rows(image, height)
        image = image.astype(np.float32, copy=False)
    in_height, in_width = image.shape[:2]
    if (in_height, in_width) == (height, width):
        return image
    shrinks_x, shrinks_y = in_width > width, in_height > height
    # OpenCV averages areas only when neither axis grows: a picture that does both takes two steps.
    if (shrinks_x or in_width == width) and (shrinks_y or in_height == height):
        return _step(image, width, height, cv2.INTER_AREA)
    if not shrinks_x and not shrinks_y:
        return _step(image, width, height, cv2.INTER_LINEAR)
    if shrinks_x:
        return _step(_step(image, width, in_height, cv2.INTER_AREA), width, height, cv2.INTER_LINEAR)
    return _step(_step(image, in_width, height, cv2.INTER_AREA), width, height, cv2.INTER_LINEAR)


def shrink_rows(image: NDArray[np.unsignedinteger[Any]], height: int) -> NDArray[np.float32]:
    """Average whole numbers over the rows that each output row covers, by the rule above.

    Equal to `resize` of the image as float32 along this axis, without writing the image out as float32 first: on
    large frames that costs more than all the rest.

    Args:
        image: (h, w) or (h, w, channels), unsigned 8 or 16 bits.
        height: rows wanted, fewer than h.
    """
    rows = np.ascontiguousarray(image).reshape(image.shape[0], -1)
    covered = _covered_rows(image.shape[0], height)
    out = np.empty((height, rows.shape[1]), np.float32)
    for i, (first, last) in enumerate(covered.whole):
        cv2.reduce(rows[first:last], 0, cv2.REDUCE_SUM, out[i : i + 1], cv2.CV_32F)
    out *= covered.weight
    for index, weight in covered.edges:
        out += rows[index] * weight
    return out.reshape(height, *image.shape[1:])


class _CoveredRows(NamedTuple):
    """Which input rows each output row covers."""

    whole: list[tuple[int, int]]
    """First row that is covered as a whole, and one after the last."""
    weight: NDArray[np.float32]
    """(outputs, 1), of each of them."""
    edges: list[tuple[NDArray[np.int64], NDArray[np.float32]]]
    """The row before them, then the row after them, and their weights, (outputs, 1); left out where all are 0."""


@lru_cache(maxsize=64)
def _covered_rows(inputs: int, outputs: int) -> _CoveredRows:
    table = axis_weights(inputs, outputs)
    weight = table.weights.max(axis=1, keepdims=True)
    whole = []
    edges = [(np.zeros(outputs, np.int64), np.zeros((outputs, 1), np.float32)) for _ in range(2)]
    for i, start in enumerate(table.start.tolist()):
        alike = np.flatnonzero(table.weights[i] == weight[i])
        whole.append((start + int(alike[0]), start + int(alike[-1]) + 1))
        for (index, share), k in zip(edges, (int(alike[0]) - 1, int(alike[-1]) + 1), strict=True):
            if 0 <= k < table.weights.shape[1] and table.weights[i, k]:
                index[i], share[i] = start + k, table.weights[i, k]
    return _CoveredRows(whole, weight, [edge for edge in edges if edge[1].any()])


def _step(image: NDArray[np.float32], width: int, height: int, method: int) -> NDArray[np.float32]:
    return np.asarray(cv2.resize(image, (width, height), interpolation=method), np.float32)
