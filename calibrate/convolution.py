"""Convolutions to learn with, by fewer multiplications where they are in float32 on the CPU (`pipeline.winograd`).

The gradients are the same algorithm backwards: of the inputs, and of the weights at the points.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.winograd import KERNELS_PX, SMALLEST_CHANNELS, TILE_PX, Tiling, transforms


class Convolution(nn.Conv2d):
    """A convolution that takes the fast way where there is one."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - its name in nn.Conv2d
        """Convolve (N, channels, H, W)."""
        return convolve(input, self.weight, self.bias, cast(tuple[int, int], self.padding))


def with_fast_convolutions(network: nn.Sequential) -> None:
    """Put `Convolution` in the place of a network's convolutions, with their parameters."""
    for index, layer in enumerate(network):
        if isinstance(layer, nn.Conv2d) and layer.stride == (1, 1):
            fast = Convolution(
                *(layer.in_channels, layer.out_channels, cast(tuple[int, int], layer.kernel_size)),
                padding=cast(tuple[int, int], layer.padding),
                device="meta",
            )
            fast.weight, fast.bias = layer.weight, layer.bias
            network[index] = fast


def convolve(image: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """Convolve with stride 1, differentiably.

    Args:
        image: (N, channels, H, W)
        weight: (outputs, channels, kernel, kernel)
        bias: (outputs,)
        padding: zeros above and below, left and right.
    """
    if not _is_faster_by_points(image, weight):
        return F.conv2d(image, weight, bias, padding=padding)
    if any(padding):
        image = F.pad(image, (padding[1], padding[1], padding[0], padding[0]))
    convolved: Tensor = _ByPoints.apply(image, weight)  # type: ignore[no-untyped-call]
    return convolved if bias is None else convolved + bias[:, None, None]


def _is_faster_by_points(image: Tensor, weight: Tensor) -> bool:
    return (
        image.device.type == "cpu"
        and image.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and weight.shape[1] >= SMALLEST_CHANNELS
        and weight.shape[2:] in {(side, side) for side in KERNELS_PX}
    )


class _Tiles:
    """Where an image's tiles lie: a few rows of one image at a time, so that what is at the points stays small."""

    def __init__(self, image: Tensor, weight: Tensor) -> None:
        self.count, self.channels, self.height, self.width = image.shape
        self.outputs, _, self.kernel_px, _ = weight.shape
        self._tiling = tiling = Tiling(self.height, self.width, self.kernel_px)
        self.side, self.down, self.across = tiling.side, tiling.down, tiling.across
        self.height_out, self.width_out = tiling.height_out, tiling.width_out
        taken = transforms(self.kernel_px)
        self.inputs, self.results, self.kernel = (
            torch.from_numpy(matrix.astype(np.float32)) for matrix in (taken.inputs, taken.outputs, taken.kernel)
        )

    def bands(self) -> Iterator[tuple[int, int, int]]:
        """Yield image, first row of tiles and number of rows."""
        for number in range(self.count):
            for first, rows in self._tiling.bands(max(self.channels, self.outputs)):
                yield number, first, rows

    def weights(self, weight: Tensor) -> Tensor:
        """Take a kernel to the points, (n², channels, outputs)."""
        rows = weight.permute(2, 3, 1, 0).reshape(self.kernel_px**2, -1)
        return (self.kernel @ rows).view(-1, self.channels, self.outputs)

    def pixels(self, image: Tensor) -> Tensor:
        """Put channels last, with zeros up to whole tiles: (N, 4·(down + 1), 4·(across + 1), channels)."""
        more = (TILE_PX * (self.across + 1) - self.width, TILE_PX * (self.down + 1) - self.height)
        return F.pad(image.permute(0, 2, 3, 1), (0, 0, 0, more[0], 0, more[1])).contiguous()

    def at_points(self, pixels: Tensor, number: int, first: int, rows: int) -> Tensor:
        """Take a band of tiles to the points, (n², rows·across, channels)."""
        image = pixels[number, TILE_PX * first :]
        row, column, _ = image.stride()
        tiles = image.as_strided(
            (self.side, self.side, rows, self.across, self.channels),
            (row, column, TILE_PX * row, TILE_PX * column, 1),
        )
        return (self.inputs @ tiles.reshape(self.side**2, -1)).view(self.side**2, -1, self.channels)

    def back(self, tiles: Tensor, into: Tensor) -> None:
        """Add a band's tiles (n, n, rows, across, channels), which overlap, to their pixels.

        Args:
            tiles: what each tile adds.
            into: (rows + 1, 4, across + 1, 4, channels)
        """
        by_place = into.permute(1, 3, 0, 2, 4)
        _, _, rows, across, _ = tiles.shape
        overlap = self.side - TILE_PX
        for down, high in ((0, TILE_PX), (1, overlap)):
            for right, wide in ((0, TILE_PX), (1, overlap)):
                own = tiles[TILE_PX * down :, TILE_PX * right :][:high, :wide]
                by_place[:high, :wide, down : down + rows, right : right + across] += own


class _ByPoints(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(image, weight)
        t = _Tiles(image, weight)
        pixels, weights = t.pixels(image), t.weights(weight)
        found = image.new_empty(t.count, t.down, TILE_PX, t.across, TILE_PX, t.outputs)
        for number, first, rows in t.bands():
            products = torch.bmm(t.at_points(pixels, number, first, rows), weights)
            results = t.results @ products.view(t.side**2, -1)
            found[number, first : first + rows].permute(1, 3, 0, 2, 4).copy_(
                results.view(TILE_PX, TILE_PX, rows, t.across, t.outputs)
            )
        whole = found.view(t.count, TILE_PX * t.down, TILE_PX * t.across, t.outputs)
        return whole[:, : t.height_out, : t.width_out].permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        image, weight = ctx.saved_tensors
        t = _Tiles(image, weight)
        more = (TILE_PX * t.across - t.width_out, TILE_PX * t.down - t.height_out)
        given = F.pad(gradient.permute(0, 2, 3, 1), (0, 0, 0, more[0], 0, more[1]))
        given = given.reshape(t.count, t.down, TILE_PX, t.across, TILE_PX, t.outputs)
        pixels, weights = t.pixels(image), t.weights(weight).transpose(1, 2)
        of_weights = torch.zeros(t.side**2, t.channels, t.outputs)
        of_pixels = torch.zeros(t.count, t.down + 1, TILE_PX, t.across + 1, TILE_PX, t.channels)
        results, inputs = t.results.T.contiguous(), t.inputs.T.contiguous()
        for number, first, rows in t.bands():
            band = given[number, first : first + rows].permute(1, 3, 0, 2, 4).reshape(TILE_PX**2, -1)
            products = (results @ band).view(t.side**2, -1, t.outputs)
            # The tiles at their points again: kept since the forward pass they would take three times the image.
            of_weights.baddbmm_(t.at_points(pixels, number, first, rows).transpose(1, 2), products)
            if ctx.needs_input_grad[0]:
                tiles = inputs @ torch.bmm(products, weights).view(t.side**2, -1)
                t.back(
                    tiles.view(t.side, t.side, rows, t.across, t.channels),
                    of_pixels[number, first : first + rows + 1],
                )
        of_image = None
        if ctx.needs_input_grad[0]:
            whole = of_pixels.view(t.count, TILE_PX * (t.down + 1), TILE_PX * (t.across + 1), t.channels)
            of_image = whole[:, : t.height, : t.width].permute(0, 3, 1, 2)
        kernel = (t.kernel.T @ of_weights.view(t.side**2, -1)).view(t.kernel_px, t.kernel_px, t.channels, t.outputs)
        return of_image, kernel.permute(3, 2, 0, 1)
