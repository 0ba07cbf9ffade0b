"""EfficientAD's networks: PDN teacher and student, the autoencoder, and the two raw anomaly maps.

Batzner, Heckler, König, "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies",
arXiv 2303.14535, tables 5 to 7 and algorithms 1 and 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.geometry import AUTOENCODER_PX, Geometry, Tile

PdnSize = Literal["small", "medium"]
TEACHER_CHANNELS = 384
_DROPOUT = 0.2


def pdn(size: PdnSize, out_channels: int, *, padded: bool) -> nn.Sequential:
    """Build a patch description network (paper, tables 5 and 6).

    Module indices are those of the public reference, so its state dicts have the same keys.

    Args:
        size: `small` (EfficientAD-S) or `medium` (EfficientAD-M).
        out_channels: 384 for a teacher, 768 for a student.
        padded: zero-pad as in the paper (64×64 for 256×256), or not at all (56×56).
    """
    wide, one = (3, 1) if padded else (0, 0)
    if size == "small":
        return nn.Sequential(
            nn.Conv2d(3, 128, 4, padding=wide),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2, 2, padding=one),
            nn.Conv2d(128, 256, 4, padding=wide),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2, 2, padding=one),
            nn.Conv2d(256, 256, 3, padding=one),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, out_channels, 4),
        )
    return nn.Sequential(
        nn.Conv2d(3, 256, 4, padding=wide),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2, 2, padding=one),
        nn.Conv2d(256, 512, 4, padding=wide),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2, 2, padding=one),
        nn.Conv2d(512, 512, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(512, 512, 3, padding=one),
        nn.ReLU(inplace=True),
        nn.Conv2d(512, out_channels, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 1),
    )


def autoencoder(out_channels: int, output_cells: int) -> nn.Sequential:
    """Build the autoencoder (paper, table 7): 256×256 px through a bottleneck of 64 numbers.

    Args:
        out_channels: 384, as the teacher's.
        output_cells: side of the square output: 56 beside an unpadded PDN, 64 beside a padded one.
    """
    encoder: list[nn.Module] = []
    channels = 3
    for width in (32, 32, 64, 64, 64):
        encoder += [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
        channels = width
    encoder.append(nn.Conv2d(64, 64, 8))
    decoder: list[nn.Module] = []
    for cells in (3, 8, 15, 32, 63, 127):
        decoder += [
            nn.Upsample(size=cells, mode="bilinear"),
            nn.Conv2d(64, 64, 4, padding=2),
            nn.ReLU(inplace=True),
            nn.Dropout(_DROPOUT),
        ]
    decoder += [
        nn.Upsample(size=output_cells, mode="bilinear"),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(64, out_channels, 3, padding=1),
    ]
    return nn.Sequential(*encoder, *decoder)


class EfficientAD(nn.Module):
    """Teacher, student and autoencoder with the teacher's channel statistics.

    `forward` takes (N, 3, H, W) float32, ImageNet-normalised, and returns the two raw maps
    (student-teacher, autoencoder-student), each (N, map_height, map_width).
    """

    teacher_mean: Tensor
    """(384,) per-channel mean of the teacher's output over the training images."""
    teacher_std: Tensor
    """(384,) per-channel standard deviation of the teacher's output over the training images."""

    def __init__(self, size: PdnSize, geometry: Geometry) -> None:
        super().__init__()
        self.size = size
        self.geometry = geometry
        whole = Geometry(AUTOENCODER_PX, AUTOENCODER_PX, padded=geometry.padded)
        self.teacher = pdn(size, TEACHER_CHANNELS, padded=geometry.padded)
        self.student = pdn(size, 2 * TEACHER_CHANNELS, padded=geometry.padded)
        self.autoencoder = autoencoder(TEACHER_CHANNELS, whole.map_width)
        self.register_buffer("teacher_mean", torch.zeros(TEACHER_CHANNELS))
        self.register_buffer("teacher_std", torch.ones(TEACHER_CHANNELS))
        self.teacher.requires_grad_(False)

    def train(self, mode: bool = True) -> EfficientAD:
        """Set training mode, except for the teacher, which never learns."""
        super().train(mode)
        self.teacher.eval()
        return self

    def describe(self, image: Tensor) -> Tensor:
        """Return the teacher's channel-normalised features, (N, 384, h, w), for an image or a tile."""
        return self.describe_trunk(self.teacher[:-1](image))

    def describe_trunk(self, trunk: Tensor) -> Tensor:
        """Return the same from what the teacher's last convolution reads."""
        features: Tensor = self.teacher[-1](trunk)
        return (features - self.teacher_mean[:, None, None]) / self.teacher_std[:, None, None]

    def autoencode(self, image: Tensor) -> Tensor:
        """Return the autoencoder's prediction of the teacher's features for the whole image.

        Args:
            image: (N, 3, image_height, image_width).

        Returns:
            (N, 384, map_height, map_width).
        """
        return run_autoencoder(self.autoencoder, image, self.geometry)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the raw maps: mean over channels of the squared differences (algorithm 3)."""
        predicted = self.autoencode(image)
        return maps_by_tiles(self.geometry, lambda tile: self._tile_maps(image, predicted, tile))

    def _tile_maps(self, image: Tensor, predicted: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        piece = image[:, :, tile.y_px, tile.x_px]
        described, student = self.describe(piece), self.student(piece)
        map_st = (described - student[:, :TEACHER_CHANNELS]).square().mean(dim=1)
        expected = predicted[:, :, tile.rows, tile.columns]
        map_ae = (expected - student[:, TEACHER_CHANNELS:]).square().mean(dim=1)
        return map_st, map_ae


def run_autoencoder(network: nn.Module, image: Tensor, geometry: Geometry) -> Tensor:
    """Show an autoencoder the whole image at its own size; returns (N, channels, map_height, map_width).

    The image is shrunk in its own type, then takes the network's.
    """
    if image.shape[-2:] != (AUTOENCODER_PX, AUTOENCODER_PX):
        image = F.interpolate(image, size=(AUTOENCODER_PX, AUTOENCODER_PX), mode="bilinear", antialias=True)
    features: Tensor = network(image.to(next(network.parameters()).dtype))
    grid = (geometry.map_height, geometry.map_width)
    if features.shape[-2:] != grid:
        features = F.interpolate(features, size=grid, mode="bilinear")
    return features


def maps_by_tiles(geometry: Geometry, tile_maps: Callable[[Tile], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Put the raw maps of an image's tiles together, (N, map_height, map_width) each."""
    found = [(tile, tile_maps(tile)) for tile in geometry.tiles()]
    first, _ = found[0][1]
    if len(found) == 1:
        return found[0][1]
    grid = (first.shape[0], geometry.map_height, geometry.map_width)
    map_st, map_ae = first.new_empty(grid), first.new_empty(grid)
    for tile, maps in found:
        cells = (slice(None), tile.rows, tile.columns)
        map_st[cells], map_ae[cells] = maps
    return map_st, map_ae
