"""EfficientAD with everything folded that can be: the same maps with fewer roundings and passes over memory.

The teacher's channel statistics go into its last convolution. That convolution and the student's are then one over
both networks' features, which gives teacher − student without two large numbers being rounded before they are
subtracted. The autoencoder's difference is treated alike, except that the kernels' sizes differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.architecture import TEACHER_CHANNELS, Convolution, Layers, PdnSize, efficientad_layers
from pipeline.geometry import Geometry

Weights = Mapping[str, NDArray[np.floating[Any]]]
"""By the names of `weight_shapes`."""


@dataclass(frozen=True)
class Filters:
    """A convolution with its numbers."""

    weight: NDArray[np.floating[Any]]
    """(outputs, inputs, kernel, kernel)"""
    bias: NDArray[np.floating[Any]] | None = None
    """(outputs,)"""
    stride: int = 1
    padding: int = 0


@dataclass(frozen=True)
class Trunk:
    """A network without its last convolution."""

    layers: Layers
    filters: Mapping[int, Filters]
    """Of its convolutions, by their place among the layers."""


@dataclass(frozen=True)
class Expectation:
    """How large the difference is expected to be (`networks.Expected`)."""

    filters: Filters
    """Over the teacher's features."""
    largest: float
    """What is beyond is cut off."""


@dataclass(frozen=True)
class Folded:
    """EfficientAD for inference; exact in exact arithmetic."""

    geometry: Geometry
    teacher: Trunk
    student: Trunk
    autoencoder: Trunk
    difference: Filters
    """Teacher − student, over the features of both, the teacher's first."""
    predicted: Filters
    """Autoencoder, less the bias of the student's part."""
    imitated: Filters
    """The student's imitation of the autoencoder."""
    expected: Expectation | None


def fold(size: PdnSize, geometry: Geometry, weights: Weights) -> Folded:
    """Fold a model's weights, in float64; the results are of the weights' own type."""
    networks = {
        name: _network(name, layers, weights) for name, layers in efficientad_layers(size, geometry).items()
    }
    (teacher, described), (student, imitates), (autoencoder, predicted) = networks.values()
    dtype = described.weight.dtype
    scale = 1 / weights["teacher_std"].astype(np.float64)
    shift = (_bias(described) - weights["teacher_mean"]) * scale
    scaled = described.weight * scale[:, None, None, None]
    imitates_teacher, imitates_autoencoder = np.split(imitates.weight, [TEACHER_CHANNELS])
    bias_teacher, bias_autoencoder = np.split(_bias(imitates), [TEACHER_CHANNELS])
    return Folded(
        geometry=geometry,
        teacher=teacher,
        student=student,
        autoencoder=autoencoder,
        difference=Filters(
            np.concatenate([scaled, -imitates_teacher], axis=1).astype(dtype), (shift - bias_teacher).astype(dtype)
        ),
        predicted=Filters(
            predicted.weight, (_bias(predicted) - bias_autoencoder).astype(dtype), padding=predicted.padding
        ),
        imitated=Filters(imitates_autoencoder),
        expected=_expectation(scaled, shift, weights) if "expected.weight" in weights else None,
    )


def _expectation(scaled: NDArray[np.float64], shift: NDArray[np.float64], weights: Weights) -> Expectation:
    """Put what reads the teacher's normalised features on what its last convolution reads."""
    weight, bias, largest = (weights[f"expected.{name}"] for name in ("weight", "bias", "largest"))
    of_features = weight[0, :, 0, 0].astype(np.float64)
    filters = Filters(
        np.tensordot(of_features, scaled, axes=1)[None].astype(weight.dtype),
        (bias + of_features @ shift).astype(weight.dtype),
    )
    return Expectation(filters, float(largest[0]))


def _network(name: str, layers: Layers, weights: Weights) -> tuple[Trunk, Filters]:
    """Return a network's trunk and its last convolution."""
    filters = {
        index: Filters(
            weights[f"{name}.{index}.weight"], weights[f"{name}.{index}.bias"], layer.stride, layer.padding
        )
        for index, layer in enumerate(layers)
        if isinstance(layer, Convolution)
    }
    last = filters.pop(len(layers) - 1)
    return Trunk(layers[:-1], filters), last


def _bias(filters: Filters) -> NDArray[np.float64]:
    assert filters.bias is not None
    return filters.bias.astype(np.float64)
