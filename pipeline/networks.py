"""EfficientAD's networks in PyTorch: PDN teacher and student, the autoencoder, and the two raw anomaly maps.

Batzner, Heckler, König, "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies",
arXiv 2303.14535, algorithms 1 and 3.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.architecture import (
    TEACHER_CHANNELS,
    AveragePool,
    Convolution,
    Dropout,
    Layer,
    PdnSize,
    Relu,
    Upsample,
    efficientad_layers,
    pdn_layers,
)
from pipeline.geometry import AUTOENCODER_PX, Geometry, Tile


def pdn(size: PdnSize, out_channels: int, *, padded: bool) -> nn.Sequential:
    """Build a patch description network (`pdn_layers`)."""
    return nn.Sequential(*map(make_module, pdn_layers(size, out_channels, padded=padded)))


def make_module(layer: Layer) -> nn.Module:
    """Build one layer, its weights random."""
    match layer:
        case Convolution():
            return nn.Conv2d(
                layer.inputs, layer.outputs, layer.kernel_px, stride=layer.stride, padding=layer.padding
            )
        case Relu():
            return nn.ReLU(inplace=True)
        case AveragePool():
            return nn.AvgPool2d(2, 2, padding=layer.padding)
        case Upsample():
            return nn.Upsample(size=layer.cells, mode="bilinear")
        case Dropout():
            return nn.Dropout(layer.rate)


class Expected(nn.Conv2d):
    """What the student-teacher map is divided by: at least 1, and no more than good images showed."""

    largest: Tensor
    """(1,), how much more than 1 at most: a strange part must not excuse itself."""

    def __init__(self, channels: int, kernel_px: int) -> None:
        super().__init__(channels, 1, kernel_px)
        self.register_buffer("largest", torch.full((1,), torch.inf))

    def forward(self, features: Tensor) -> Tensor:
        """Return the divisor of each cell, (N, h, w) float32 or wider, for (N, channels, …) features."""
        return 1 + widened(super().forward(features))[:, 0].relu().minimum(self.largest)


class EfficientAD(nn.Module):
    """Teacher, student and autoencoder with the teacher's channel statistics.

    `forward` takes (N, 3, H, W) float32, ImageNet-normalised, and returns the two raw maps
    (student-teacher, autoencoder-student), each (N, map_height, map_width).
    """

    expected: Expected | None
    """From the teacher's channel-normalised features to how far the student is expected to be off; where it is
    there, the student-teacher map is divided by it. Not the paper's."""

    teacher_mean: Tensor
    """(384,) per-channel mean of the teacher's output over the training images."""
    teacher_std: Tensor
    """(384,) per-channel standard deviation of the teacher's output over the training images."""

    def __init__(self, size: PdnSize, geometry: Geometry) -> None:
        super().__init__()
        self.size = size
        self.geometry = geometry
        self.teacher, self.student, self.autoencoder = (
            nn.Sequential(*map(make_module, layers)) for layers in efficientad_layers(size, geometry).values()
        )
        self.register_buffer("teacher_mean", torch.zeros(TEACHER_CHANNELS))
        self.register_buffer("teacher_std", torch.ones(TEACHER_CHANNELS))
        self.register_module("expected", None)
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
        """Return the raw maps: mean over channels of the squared differences (algorithm 3).

        The first is divided by what is expected, where that is there.
        """
        predicted = self.autoencode(image)
        return maps_by_tiles(self.geometry, lambda tile: self._tile_maps(image, predicted, tile))

    def _tile_maps(self, image: Tensor, predicted: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        piece = image[:, :, tile.y_px, tile.x_px]
        described, student = self.describe(piece), self.student(piece)
        map_st = (described - student[:, :TEACHER_CHANNELS]).square().mean(dim=1)
        if self.expected is not None:
            map_st = map_st / self.expected(described)
        target = predicted[:, :, tile.rows, tile.columns]
        map_ae = (target - student[:, TEACHER_CHANNELS:]).square().mean(dim=1)
        return map_st, map_ae


def widened(tensor: Tensor) -> Tensor:
    """Return float16 as float32: the square of a strong anomaly is more than float16 can hold."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def weights_of(networks: EfficientAD) -> dict[str, NDArray[np.float32]]:
    """Copy what a model keeps of its networks."""
    # In the order of the dimensions, whatever it is in memory.
    state = networks.state_dict()
    return {name: np.array(tensor.detach().cpu().numpy(), order="C") for name, tensor in state.items()}


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
