"""EfficientAD with everything folded that can be: the same maps with fewer roundings and passes over memory.

The teacher's channel statistics go into its last convolution. That convolution and the student's are then one over
both networks' features, which gives teacher − student without two large numbers being rounded before they are
subtracted. The autoencoder's difference is treated alike, except that the kernels' sizes differ.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from pipeline.geometry import Tile
from pipeline.networks import TEACHER_CHANNELS, EfficientAD, maps_by_tiles, run_autoencoder


class FoldedEfficientAD(nn.Module):
    """EfficientAD for inference; exact in exact arithmetic.

    `forward` takes and returns what `EfficientAD.forward` does.
    """

    @torch.no_grad()
    def __init__(self, networks: EfficientAD) -> None:
        """Fold. What does not change is shared with the networks given, which are set to inference."""
        super().__init__()
        self.geometry = networks.geometry
        self.teacher, teacher = _without_last(networks.teacher)
        self.student, student = _without_last(networks.student)
        self.autoencoder, predicted = _without_last(networks.autoencoder)
        assert teacher.bias is not None
        assert student.bias is not None
        assert predicted.bias is not None
        scale = 1 / networks.teacher_std.double()
        described = teacher.weight.double() * scale[:, None, None, None]
        shift = (teacher.bias.double() - networks.teacher_mean.double()) * scale
        imitates, imitates_predicted = torch.split(student.weight, TEACHER_CHANNELS)
        bias, bias_predicted = torch.split(student.bias.double(), TEACHER_CHANNELS)
        dtype = teacher.weight.dtype
        self.difference = _convolution(
            torch.cat([described, -imitates.double()], dim=1).to(dtype), (shift - bias).to(dtype)
        )
        """Teacher − student, over the features of both, the teacher's first."""
        self.predicted = _convolution(
            predicted.weight, (predicted.bias.double() - bias_predicted).to(dtype), predicted.padding
        )
        """Autoencoder, less the bias of the student's part."""
        self.imitated = _convolution(imitates_predicted, None)
        """The student's imitation of the autoencoder."""
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the raw maps."""
        predicted = self.predict(image)

        def tile_maps(tile: Tile) -> tuple[Tensor, Tensor]:
            piece = image[:, :, tile.y_px, tile.x_px]
            return self.tile_maps(self.teacher(piece), self.student(piece), predicted, tile)

        return maps_by_tiles(self.geometry, tile_maps)

    def predict(self, image: Tensor) -> Tensor:
        """Return what the student should imitate of the autoencoder, (N, 384, map_height, map_width)."""
        return run_autoencoder(nn.Sequential(*self.autoencoder, self.predicted), image, self.geometry)

    def tile_maps(self, teacher: Tensor, student: Tensor, predicted: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """Return a tile's raw maps.

        Args:
            teacher: the tile's features before the last convolution.
            student: the same of the student.
            predicted: what `predict` returned of the whole image.
            tile: which.
        """
        difference = self.difference(torch.cat([teacher, student], dim=1))
        missed = predicted[:, :, tile.rows, tile.columns] - self.imitated(student)
        return _mean_square(difference), _mean_square(missed)


def _mean_square(difference: Tensor) -> Tensor:
    # The square of a strong anomaly is more than float16 can hold.
    wide = difference.float() if difference.dtype == torch.float16 else difference
    return wide.square().mean(dim=1)


def _without_last(network: nn.Sequential) -> tuple[nn.Sequential, nn.Conv2d]:
    *trunk, last = network
    return nn.Sequential(*trunk), cast(nn.Conv2d, last)


def _convolution(weight: Tensor, bias: Tensor | None, padding: object = (0, 0)) -> nn.Conv2d:
    channels_out, channels_in, height, width = weight.shape
    made = nn.Conv2d(
        channels_in,
        channels_out,
        (height, width),
        padding=cast(tuple[int, int], padding),
        bias=bias is not None,
        dtype=weight.dtype,
    )
    made.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return made
