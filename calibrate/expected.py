"""What student and teacher are expected to differ by, foretold from the teacher's features alone.

A student misses rare and strong features by more than common ones, on good parts, too. What it misses beyond that
tells of defects. This is ours and not the paper's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from calibrate.layouts import DatasetError
from pipeline.architecture import TEACHER_CHANNELS
from pipeline.networks import EfficientAD

_BASE = 2.0
"""Means of the difference that are expected everywhere: no cell counts for so much as to drown all others."""
_RIDGE = 1e-3
"""Of a feature's mean square: what keeps weights finite where features say the same, or nothing."""


@torch.no_grad()
def expect_difference(networks: EfficientAD, images: Iterable[Tensor], counted: Tensor) -> None:
    """Fit `networks.expected` to good images by linear regression (ridge).

    Args:
        networks: trained; told what they should expect.
        images: (1, 3, image_height, image_width) each, ImageNet-normalised, on the networks' device.
        counted: (map_height, map_width), False in ignored cells.

    Raises DatasetError when student and teacher do not differ, or by what is not finite.
    """
    networks.eval()
    networks.expected = None
    products = torch.zeros(TEACHER_CHANNELS + 1, TEACHER_CHANNELS + 1, dtype=torch.float64)
    towards = torch.zeros(TEACHER_CHANNELS + 1, dtype=torch.float64)
    for image in images:
        seen = ~counted
        for tile in networks.geometry.tiles():
            piece = image[:, :, tile.y_px, tile.x_px]
            described, student = networks.describe(piece)[0], networks.student(piece)[0, :TEACHER_CHANNELS]
            new = ~seen[tile.rows, tile.columns].to(image.device)
            seen[tile.rows, tile.columns] = True
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
    expected = nn.Conv2d(TEACHER_CHANNELS, 1, 1)
    expected.load_state_dict({"weight": weights[:-1].float().view(1, -1, 1, 1), "bias": weights[-1:].float()})
    networks.expected = expected.requires_grad_(False).to(next(networks.parameters()).device)
