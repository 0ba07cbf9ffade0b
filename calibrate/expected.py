"""What student and teacher are expected to differ by, foretold from the teacher's features alone.

A student misses rare and strong features by more than common ones, on good parts, too. What it misses beyond that
tells of defects. This is ours and not the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibrate.layouts import DatasetError
from pipeline.architecture import TEACHER_CHANNELS
from pipeline.geometry import Geometry
from pipeline.networks import EfficientAD, Expected

_BASE = 2.0
"""Means of the difference that are expected everywhere: no cell counts for so much as to drown all others."""
_RIDGE = 1e-3
"""Of a feature's mean square: what keeps weights finite where features say the same, or nothing. Two images are
enough: on MTD what they let expect correlates by 0.91 with the difference on other good tiles, 25 0.94."""


@torch.no_grad()
def expect_difference(
    networks: EfficientAD, images: Callable[[], Iterable[Tensor]], counted: NDArray[np.bool_]
) -> float:
    """Fit `networks.expected` to good images by linear regression (ridge).

    Args:
        networks: trained; told what they should expect.
        images: (1, 3, image_height, image_width) each, ImageNet-normalised, on the networks' device; called twice.
        counted: (map_height, map_width), False in ignored cells.

    Returns:
        What a cell is divided by at most.

    Raises DatasetError when student and teacher do not differ, or by what is not finite.
    """
    networks.eval()
    products = torch.zeros(TEACHER_CHANNELS + 1, TEACHER_CHANNELS + 1, dtype=torch.float64)
    towards = torch.zeros(TEACHER_CHANNELS + 1, dtype=torch.float64)
    for piece, new in _pieces(networks.geometry, images(), counted):
        described, student = networks.describe(piece)[0], networks.student(piece)[0, :TEACHER_CHANNELS]
        features = torch.cat([described, torch.ones_like(described[:1])])[:, new]
        difference = (described - student).square().mean(dim=0)[new]
        products += (features @ features.T).double().cpu()
        towards += (features @ difference).double().cpu()
    # The last feature is 1 everywhere.
    mean = towards[-1] / products[-1, -1]
    if not 0 < mean < torch.inf:
        raise DatasetError(f"student and teacher differ by {mean.item()} on the good images")
    ridge = _RIDGE * products.diagonal().mean() * torch.eye(len(towards), dtype=torch.float64)
    weights = torch.linalg.solve(products + ridge, towards) / (_BASE * mean)
    expected = Expected(TEACHER_CHANNELS, 1).requires_grad_(False).to(next(networks.parameters()).device)
    numbers = {"weight": weights[:-1].view(1, -1, 1, 1), "bias": weights[-1:], "largest": expected.largest}
    expected.load_state_dict(numbers)
    seen = (
        expected(networks.describe(piece))[0][new].max()
        for piece, new in _pieces(networks.geometry, images(), counted)
    )
    largest = float(max(found.item() for found in seen))
    expected.largest.fill_(largest - 1)
    networks.expected = expected
    return largest


def _pieces(
    geometry: Geometry, images: Iterable[Tensor], counted: NDArray[np.bool_]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tiles of images, and which of their cells count: each once, of those of overlapping tiles."""
    for image in images:
        left = torch.from_numpy(counted.copy())
        for tile in geometry.tiles():
            new = left[tile.rows, tile.columns].clone()
            left[tile.rows, tile.columns] = False
            if new.any():
                yield image[:, :, tile.y_px, tile.x_px], new.to(image.device)
