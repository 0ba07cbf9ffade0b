"""The folded networks as OpenVINO graphs: in float, or with the convolutions in 8-bit integers.

Integers are for the convolutions only, and not for those that read the image: they are a fiftieth of the work, and
rounding the image would cost more of a surface's fine grain than all other roundings together. What comes after the
two differences (square, mean, division by what is expected) stays in float32: its range is that of anomalies, which
no good image shows; integers would cut it off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op

from pipeline.architecture import TEACHER_CHANNELS, AveragePool, Convolution, Dropout, Relu, Upsample
from pipeline.engine import LARGEST_INT8_WEIGHT
from pipeline.folded import Expectation, Filters, Folded, Trunk
from pipeline.geometry import AUTOENCODER_PX
from pipeline.winograd import Tiling, pays, transforms

Ranges = Mapping[str, float]
"""Largest magnitude that the input of each convolution in int8 takes, by the convolution's name."""
_LEVELS = 256
_SMALLEST_RANGE = 1e-30
"""Of what is zero all over, so that nothing is divided by it."""

Part = Literal["whole", "prediction", "tile"]


def build_graph(
    networks: Folded, part: Part = "whole", ranges: Ranges | None = None, *, winograd: bool = False
) -> ov.Model:
    """Build a graph for one image (batch 1).

    Args:
        networks: with the weights.
        part: `whole`, from (1, 3, H, W) to the raw maps (map_height, map_width), student-teacher and
            autoencoder; or, for tiles, `prediction`, from the image to what the student should imitate of the
            autoencoder (1, 384, map_height, map_width), and `tile`, from a tile's pixels and its part of the
            prediction to its part of the maps.
        ranges: quantise the convolutions for these ranges; None: leave them in float.
        winograd: compute the large convolutions in float by fewer multiplications, which wants float32.

    Raises KeyError when a range is missing.
    """
    return ov.Model(*_Builder(networks, ranges, winograd=winograd).part(part), part)


def build_observer(networks: Folded, part: Part = "whole", *, winograd: bool = True) -> tuple[ov.Model, list[str]]:
    """Build a part's graph that returns how large each input for integers is, and the prediction where it is one.

    Returns the graph and the convolutions' names, in the order of the magnitudes.
    """
    builder = _Builder(networks, None, winograd=winograd)
    results, parameters = builder.part(part)
    axes = np.arange(4)
    largest = [op.reshape(op.reduce_max(op.abs(node), axes), [1], False) for node in builder.inputs.values()]
    read_on = results if part == "prediction" else []  # maps would cost their convolutions, and nobody wants them
    return ov.Model([op.concat(largest, 0), *read_on], parameters, "observer"), list(builder.inputs)


def convolution_names(networks: Folded) -> list[str]:
    """Name what `build_graph` wants a range of."""
    return build_observer(networks, winograd=False)[1]


class _Builder:
    def __init__(self, networks: Folded, ranges: Ranges | None, *, winograd: bool) -> None:
        self._networks = networks
        self._ranges = ranges
        self._winograd = winograd
        self.inputs: dict[str, ov.Node] = {}
        """What each convolution reads that is for integers, by its name."""

    def part(self, part: Part) -> tuple[list[ov.Node], list[ov.Node]]:
        """Return the results and the parameters of a part."""
        g = self._networks.geometry
        (first, *_) = g.tiles()
        image = op.parameter([1, 3, g.image_height, g.image_width], np.float32, name="image")
        if part == "prediction":
            return [self.predict(image)], [image]
        if part == "whole":
            return self.maps(image, self.predict(image)), [image]
        tile_px = (first.y_px.stop - first.y_px.start, first.x_px.stop - first.x_px.start)
        cells = (first.rows.stop - first.rows.start, first.columns.stop - first.columns.start)
        piece = op.parameter([1, 3, *tile_px], np.float32, name="piece")
        predicted = op.parameter([1, TEACHER_CHANNELS, *cells], np.float32, name="predicted")
        return self.maps(piece, predicted), [piece, predicted]

    def predict(self, image: ov.Node) -> ov.Node:
        networks, g = self._networks, self._networks.geometry
        for axis, size_px in ((2, g.image_height), (3, g.image_width)):
            if size_px != AUTOENCODER_PX:
                image = _shrunk(image, axis, size_px)
        hidden = self._sequence("autoencoder", image, networks.autoencoder)
        predicted = self._convolution("predicted", hidden, networks.predicted)
        return _stretched(predicted, g.map_height, g.map_width)

    def maps(self, piece: ov.Node, predicted: ov.Node) -> list[ov.Node]:
        networks = self._networks
        teacher = self._sequence("teacher", piece, networks.teacher)
        student = self._sequence("student", piece, networks.student)
        if self._ranges is None:
            both = op.concat([teacher, student], 1)
            self.inputs |= {"difference.teacher": teacher, "difference.student": student}
            difference = self._in_float(both, networks.difference)
        else:
            # Each network's features have their own range.
            channels = teacher.output(0).get_shape()[1]
            of_teacher, of_student = np.split(networks.difference.weight, [channels], axis=1)
            difference = op.add(
                self._convolution("difference.teacher", teacher, replace(networks.difference, weight=of_teacher)),
                self._convolution("difference.student", student, Filters(of_student)),
            )
        missed = op.subtract(predicted, self._convolution("imitated", student, networks.imitated))
        map_st, map_ae = (op.reduce_mean(op.multiply(d, d), np.array([0, 1]), False) for d in (difference, missed))
        if networks.expected is not None:
            map_st = op.divide(map_st, self._expectation(teacher, networks.expected))
        return [map_st, map_ae]

    def _expectation(self, teacher: ov.Node, expectation: Expectation) -> ov.Node:
        """Return what the student-teacher map is divided by, (map_height, map_width)."""
        filters = expectation.filters
        if self._ranges is None:  # directly: for one output Winograd's way would cost more
            expected = _convolved(teacher, op.constant(filters.weight), filters)
        else:
            expected = quantised_convolution(teacher, filters, self._ranges["difference.teacher"])
        within = op.clamp(op.squeeze(expected, np.array([0, 1])), 0.0, expectation.largest)
        return op.add(within, op.constant(np.float32(1)))

    def _sequence(self, name: str, node: ov.Node, trunk: Trunk) -> ov.Node:
        for index, layer in enumerate(trunk.layers):
            match layer:
                case Convolution():
                    node = self._convolution(f"{name}.{index}", node, trunk.filters[index])
                case Relu():
                    node = op.relu(node)
                case AveragePool():
                    pad = [layer.padding] * 2
                    node = op.avg_pool(node, [2, 2], pad, pad, [2, 2], False)
                case Upsample():
                    node = _stretched(node, layer.cells, layer.cells)
                case Dropout():
                    pass
        return node

    def _convolution(self, name: str, node: ov.Node, filters: Filters) -> ov.Node:
        reads_image = filters.weight.shape[1] == 3
        if not reads_image:
            self.inputs[name] = node
        if self._ranges is None or reads_image:
            return self._in_float(node, filters)
        return quantised_convolution(node, filters, self._ranges[name])

    def _in_float(self, node: ov.Node, filters: Filters) -> ov.Node:
        if self._winograd and filters.stride == 1 and pays(filters.weight.shape):
            return winograd_convolution(node, filters)
        return _convolved(node, op.constant(filters.weight), filters)


def quantised_convolution(node: ov.Node, filters: Filters, largest: float) -> ov.Node:
    """Convolve in integers: the input by one scale, the weights by one for each output channel.

    Args:
        node: (1, channels, height, width)
        filters: in float.
        largest: magnitude of the input that is not cut off.
    """
    weight = filters.weight
    largest = max(largest, _SMALLEST_RANGE)
    low = 0.0 if _is_rectified(node) else -largest * (_LEVELS // 2) / (_LEVELS // 2 - 1)
    edges = [op.constant(np.float32(value)) for value in (low, largest, low, largest)]
    scale = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / LARGEST_INT8_WEIGHT
    scale = np.maximum(scale, np.float32(_SMALLEST_RANGE))
    integers = np.round(weight / scale).astype(np.int8)
    rescaled = op.multiply(op.convert(op.constant(integers), np.float32), op.constant(scale))
    return _convolved(op.fake_quantize(node, *edges, _LEVELS), rescaled, filters)


def winograd_convolution(node: ov.Node, filters: Filters) -> ov.Node:
    """Convolve by Winograd's algorithm.

    Args:
        node: (1, channels, height, width)
        filters: 3×3 or 4×4, of stride 1.
    """
    outputs, channels, kernel_px, _ = filters.weight.shape
    t = transforms(kernel_px)
    # Channels last: a pixel is one stretch of memory, and gathering tiles is copying such stretches.
    pixels = op.transpose(node, np.array([0, 2, 3, 1]))
    if filters.padding:
        edge = np.array([0, filters.padding, filters.padding, 0])
        pixels = op.pad(pixels, edge, edge, "constant", op.constant(np.array(0, np.float32)))
    _, height, width, _ = pixels.output(0).get_shape()
    pixels = op.reshape(pixels, np.array([height * width, channels]), False)
    to_points, back, weights = (op.constant(matrix) for matrix in (t.inputs, t.outputs, t.weights(filters.weight)))
    tiling = Tiling(height, width, kernel_px)
    convolved = []
    for first, rows in tiling.bands(max(channels, outputs)):
        tiles = op.gather(pixels, op.constant(tiling.inputs(first, rows)), np.array(0))
        tiles = op.matmul(to_points, op.reshape(tiles, np.array([t.points, -1]), False), False, False)
        products = op.matmul(op.reshape(tiles, np.array([t.points, -1, channels]), False), weights, False, False)
        results = op.matmul(back, op.reshape(products, np.array([t.points, -1]), False), False, False)
        results = op.reshape(results, np.array([-1, outputs]), False)
        convolved.append(op.gather(results, op.constant(tiling.outputs(first, rows)), np.array(0)))
    image = op.reshape(op.concat(convolved, 0), np.array([1, tiling.height_out, tiling.width_out, outputs]), False)
    return _plus(op.transpose(image, np.array([0, 3, 1, 2])), filters.bias)


def _is_rectified(node: ov.Node) -> bool:
    """Tell whether a node's values are never negative: averages and interpolations are where their input is."""
    while node.get_type_name() in ("AvgPool", "Interpolate"):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Relu")


def _convolved(node: ov.Node, weight: ov.Node, filters: Filters) -> ov.Node:
    step, pad = [filters.stride] * 2, [filters.padding] * 2
    return _plus(op.convolution(node, weight, step, pad, pad, [1, 1]), filters.bias)


def _plus(node: ov.Node, bias: NDArray[np.floating[Any]] | None) -> ov.Node:
    return node if bias is None else op.add(node, op.constant(bias.reshape(1, -1, 1, 1)))


def _stretched(node: ov.Node, height: int, width: int) -> ov.Node:
    if tuple(node.output(0).get_shape())[2:] == (height, width):
        return node
    return op.interpolate(
        node,
        np.array([height, width]),
        "linear_onnx",  # bilinear over two axes, as PyTorch's
        "sizes",
        coordinate_transformation_mode="half_pixel",
        axes=np.array([2, 3]),
    )


def _shrunk(node: ov.Node, axis: int, size_px: int) -> ov.Node:
    """Resize one axis to the autoencoder's size."""
    weights = antialiased_weights(size_px, AUTOENCODER_PX)
    if axis == 2:
        return op.matmul(op.constant(weights), node, False, False)
    return op.matmul(node, op.constant(weights), False, True)


def antialiased_weights(inputs: int, outputs: int) -> NDArray[np.float32]:
    """Return what PyTorch's bilinear `interpolate(antialias=True)` takes of each input, (outputs, inputs)."""
    step = inputs / outputs
    centres = step * (np.arange(outputs) + 0.5)
    distance = np.abs(np.arange(inputs) + 0.5 - centres[:, None])
    weights = np.maximum(0, 1 - distance / max(step, 1))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)
