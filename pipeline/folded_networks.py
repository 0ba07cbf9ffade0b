"""The folded networks in PyTorch, for the CUDA engine."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.folded import Expectation, Filters, Folded, Trunk
from pipeline.geometry import Tile
from pipeline.networks import Expected, make_module, maps_by_tiles, run_autoencoder, widened


class FoldedEfficientAD(nn.Module):
    """EfficientAD for inference; exact in exact arithmetic.

    `forward` takes and returns what `EfficientAD.forward` does.
    """

    def __init__(self, folded: Folded) -> None:
        """Build the modules; the numbers are copied."""
        super().__init__()
        self.geometry = folded.geometry
        self.teacher, self.student, self.autoencoder = (
            _sequence(trunk) for trunk in (folded.teacher, folded.student, folded.autoencoder)
        )
        self.difference, self.predicted, self.imitated = (
            _convolution(filters) for filters in (folded.difference, folded.predicted, folded.imitated)
        )
        self.expected = None if folded.expected is None else _expected(folded.expected)
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
        map_st, map_ae = (widened(d).square().mean(dim=1) for d in (difference, missed))
        if self.expected is not None:
            map_st = map_st / self.expected(teacher)
        return map_st, map_ae


def _sequence(trunk: Trunk) -> nn.Sequential:
    filters = trunk.filters
    return nn.Sequential(
        *(
            _convolution(filters[index]) if index in filters else make_module(layer)
            for index, layer in enumerate(trunk.layers)
        )
    )


def _convolution(filters: Filters) -> nn.Conv2d:
    outputs, inputs, height, width = filters.weight.shape
    made = nn.Conv2d(
        *(inputs, outputs, (height, width)),
        stride=filters.stride,
        padding=filters.padding,
        bias=filters.bias is not None,
        device="meta",
    )
    numbers = {"weight": filters.weight, "bias": filters.bias}
    copied = {n: torch.from_numpy(np.array(array)) for n, array in numbers.items() if array is not None}
    made.load_state_dict(copied, assign=True)
    return made


def _expected(expectation: Expectation) -> Expected:
    weight, bias = expectation.filters.weight, expectation.filters.bias
    made = Expected(weight.shape[1], weight.shape[2])
    numbers = {"weight": weight, "bias": bias, "largest": np.array([expectation.largest], weight.dtype)}
    made.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in numbers.items()}, assign=True)
    return made
