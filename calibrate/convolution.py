"""Convolutions to learn with, by Winograd's algorithm where they are in float32 on the CPU (`pipeline.winograd`).

The gradients are the same algorithm backwards: of the inputs, and of the transformed weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.winograd import TILE_PX, Tiling, pays, transforms


class WinogradConv2d(nn.Conv2d):
    """A convolution that is computed by Winograd's algorithm where that is faster."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - its name in nn.Conv2d
        """Convolve (N, channels, H, W)."""
        return convolve(input, self.weight, self.bias, cast(tuple[int, int], self.padding))


def use_winograd(network: nn.Sequential) -> None:
    """Put `WinogradConv2d` in the place of a network's plain convolutions, with their parameters."""
    for index, layer in enumerate(network):
        if isinstance(layer, nn.Conv2d) and (layer.stride, layer.dilation, layer.groups) == ((1, 1), (1, 1), 1):
            replacement = WinogradConv2d(
                *(layer.in_channels, layer.out_channels, cast(tuple[int, int], layer.kernel_size)),
                padding=cast(tuple[int, int], layer.padding),
                device="meta",
            )
            replacement.weight, replacement.bias = layer.weight, layer.bias
            network[index] = replacement


def convolve(image: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """Convolve with stride 1, differentiably.

    Args:
        image: (N, channels, H, W)
        weight: (outputs, channels, kernel, kernel)
        bias: (outputs,)
        padding: zeros above and below, left and right.
    """
    on_cpu_in_float32 = image.device.type == "cpu" and image.dtype == weight.dtype == torch.float32
    if not (on_cpu_in_float32 and pays(weight.shape)) or torch.is_autocast_enabled("cpu"):
        return F.conv2d(image, weight, bias, padding=padding)
    if any(padding):
        image = F.pad(image, (padding[1], padding[1], padding[0], padding[0]))
    convolved: Tensor = _Winograd.apply(image, weight, bias)  # type: ignore[no-untyped-call]
    return convolved


class _Plan:
    """How images are convolved: a few rows of tiles at a time, so that what is transformed stays small."""

    def __init__(self, image: Tensor, weight: Tensor) -> None:
        self.count, self.channels, height, width = image.shape
        self.outputs, _, self.kernel_px, _ = weight.shape
        self.tiling = Tiling(height, width, self.kernel_px)
        matrices = transforms(self.kernel_px)
        self.to_points, self.to_outputs, self.kernel = (
            torch.from_numpy(matrix.astype(np.float32))
            for matrix in (matrices.inputs, matrices.outputs, matrices.kernel)
        )
        self.points = len(self.to_points)

    def bands(self) -> Iterator[tuple[int, int, int]]:
        """Yield image, first row of tiles and number of rows."""
        for number in range(self.count):
            for first, rows in self.tiling.bands(max(self.channels, self.outputs)):
                yield number, first, rows

    def weights(self, weight: Tensor) -> Tensor:
        """Transform kernels: (n², channels, outputs)."""
        rows = weight.permute(2, 3, 1, 0).reshape(self.kernel_px**2, -1)
        return (self.kernel @ rows).view(self.points, self.channels, self.outputs)

    def pixels(self, image: Tensor) -> Tensor:
        """Put channels last, with zeros up to whole tiles: (N, 4·(down + 1), 4·(across + 1), channels)."""
        t = self.tiling
        more = (TILE_PX * (t.across + 1) - t.width, TILE_PX * (t.down + 1) - t.height)
        return F.pad(image.permute(0, 2, 3, 1), (0, 0, 0, more[0], 0, more[1])).contiguous()

    def transformed(self, pixels: Tensor, number: int, first: int, rows: int) -> Tensor:
        """Transform a band of tiles: (n², rows·across, channels)."""
        t = self.tiling
        image = pixels[number, TILE_PX * first :]
        row, column, _ = image.stride()
        tiles = image.as_strided(
            (t.side, t.side, rows, t.across, self.channels), (row, column, TILE_PX * row, TILE_PX * column, 1)
        )
        return (self.to_points @ tiles.reshape(self.points, -1)).view(self.points, -1, self.channels)

    def add_back(self, tiles: Tensor, into: Tensor) -> None:
        """Add a band's tiles, which overlap, to their pixels.

        Args:
            tiles: (n², rows·across·channels), what each tile adds.
            into: (rows + 1, 4, across + 1, 4, channels)
        """
        t, rows = self.tiling, into.shape[0] - 1
        by_place = into.permute(1, 3, 0, 2, 4)
        tiles = tiles.view(t.side, t.side, rows, t.across, self.channels)
        overlap = t.side - TILE_PX
        for down, high in ((0, TILE_PX), (1, overlap)):
            for right, wide in ((0, TILE_PX), (1, overlap)):
                own = tiles[TILE_PX * down :, TILE_PX * right :][:high, :wide]
                by_place[:high, :wide, down : down + rows, right : right + t.across] += own


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(image, weight)
        plan = _Plan(image, weight)
        t = plan.tiling
        pixels, weights = plan.pixels(image), plan.weights(weight)
        # No view of another tensor: a ReLU may work in its place.
        shape = (plan.count, plan.outputs, t.height_out, t.width_out)
        found = torch.empty(shape, memory_format=torch.channels_last)
        rows_of = found.permute(0, 2, 3, 1)
        for number, first, rows in plan.bands():
            products = torch.bmm(plan.transformed(pixels, number, first, rows), weights)
            results = (plan.to_outputs @ products.view(plan.points, -1)).view(
                TILE_PX, TILE_PX, rows, t.across, plan.outputs
            )
            whole = results.permute(2, 0, 3, 1, 4).reshape(TILE_PX * rows, TILE_PX * t.across, plan.outputs)
            band = rows_of[number, TILE_PX * first : TILE_PX * (first + rows)]
            band.copy_(whole[: band.shape[0], : t.width_out])
        if bias is not None:
            rows_of.add_(bias)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        image, weight = ctx.saved_tensors
        for_image, for_weight, for_bias = ctx.needs_input_grad
        plan = _Plan(image, weight)
        t = plan.tiling
        more = (TILE_PX * t.across - t.width_out, TILE_PX * t.down - t.height_out)
        given = F.pad(gradient.permute(0, 2, 3, 1), (0, 0, 0, more[0], 0, more[1]))
        given = given.reshape(plan.count, t.down, TILE_PX, t.across, TILE_PX, plan.outputs)
        pixels, weights = plan.pixels(image), plan.weights(weight).transpose(1, 2)
        of_weights = torch.zeros(plan.points, plan.channels, plan.outputs)
        of_pixels = torch.zeros_like(pixels).view(
            plan.count, t.down + 1, TILE_PX, t.across + 1, TILE_PX, plan.channels
        )
        from_outputs, from_points = plan.to_outputs.T.contiguous(), plan.to_points.T.contiguous()
        for number, first, rows in plan.bands():
            band = given[number, first : first + rows].permute(1, 3, 0, 2, 4).reshape(TILE_PX**2, -1)
            products = (from_outputs @ band).view(plan.points, -1, plan.outputs)
            if for_weight:
                # Transformed again: kept since the forward pass the tiles would take three times the image.
                of_weights.baddbmm_(plan.transformed(pixels, number, first, rows).transpose(1, 2), products)
            if for_image:
                tiles = from_points @ torch.bmm(products, weights).view(plan.points, -1)
                plan.add_back(tiles, of_pixels[number, first : first + rows + 1])
        of_image = of_pixels.view_as(pixels)[:, : t.height, : t.width].permute(0, 3, 1, 2)
        of_kernel = (plan.kernel.T @ of_weights.view(plan.points, -1)).view(
            plan.kernel_px, plan.kernel_px, plan.channels, plan.outputs
        )
        return (
            of_image if for_image else None,
            of_kernel.permute(3, 2, 0, 1) if for_weight else None,
            gradient.sum((0, 2, 3)) if for_bias else None,
        )
