"""EfficientAD's networks as layers in words, for every engine to build: PDN, autoencoder, and what they learn.

Batzner, Heckler, König, "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies",
arXiv 2303.14535, tables 5 to 7. Layers are counted as in the public reference: its state dicts have the same keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.geometry import AUTOENCODER_PX, Geometry

PdnSize = Literal["small", "medium"]
TEACHER_CHANNELS = 384
_DROPOUT = 0.2


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution with a square kernel and a bias; zeros are padded on all sides."""

    inputs: int
    outputs: int
    kernel_px: int
    stride: int = 1
    padding: int = 0


@dataclass(frozen=True, slots=True)
class Relu:
    """What is negative becomes 0."""


@dataclass(frozen=True, slots=True)
class AveragePool:
    """The mean of 2×2; padded zeros count."""

    padding: int


@dataclass(frozen=True, slots=True)
class Upsample:
    """Bilinear to a square of so many cells."""

    cells: int


@dataclass(frozen=True, slots=True)
class Dropout:
    """Zeros at random while training, nothing afterwards."""

    rate: float


Layer = Convolution | Relu | AveragePool | Upsample | Dropout
Layers = tuple[Layer, ...]


def pdn_layers(size: PdnSize, out_channels: int, *, padded: bool) -> Layers:
    """List the layers of a patch description network (paper, tables 5 and 6).

    Args:
        size: `small` (EfficientAD-S) or `medium` (EfficientAD-M).
        out_channels: 384 for a teacher, 768 for a student.
        padded: zero-pad as in the paper (64×64 for 256×256), or not at all (56×56).
    """
    wide, one = (3, 1) if padded else (0, 0)
    channels = 128 if size == "small" else 256
    first: Layers = (
        Convolution(3, channels, 4, padding=wide),
        Relu(),
        AveragePool(one),
        Convolution(channels, 2 * channels, 4, padding=wide),
        Relu(),
        AveragePool(one),
    )
    if size == "small":
        return (*first, Convolution(256, 256, 3, padding=one), Relu(), Convolution(256, out_channels, 4))
    return (
        *first,
        Convolution(512, 512, 1),
        Relu(),
        Convolution(512, 512, 3, padding=one),
        Relu(),
        Convolution(512, out_channels, 4),
        Relu(),
        Convolution(out_channels, out_channels, 1),
    )


def autoencoder_layers(out_channels: int, output_cells: int) -> Layers:
    """List the layers of the autoencoder (paper, table 7): 256×256 px through a bottleneck of 64 numbers.

    Args:
        out_channels: 384, as the teacher's.
        output_cells: side of the square output: 56 beside an unpadded PDN, 64 beside a padded one.
    """
    layers: list[Layer] = []
    channels = 3
    for width in (32, 32, 64, 64, 64):
        layers += [Convolution(channels, width, 4, stride=2, padding=1), Relu()]
        channels = width
    layers.append(Convolution(64, 64, 8))
    for cells in (3, 8, 15, 32, 63, 127):
        layers += [Upsample(cells), Convolution(64, 64, 4, padding=2), Relu(), Dropout(_DROPOUT)]
    layers += [Upsample(output_cells), Convolution(64, 64, 3, padding=1), Relu()]
    return (*layers, Convolution(64, out_channels, 3, padding=1))


def efficientad_layers(size: PdnSize, geometry: Geometry) -> dict[str, Layers]:
    """List the layers of `teacher`, `student` and `autoencoder`."""
    whole = Geometry(AUTOENCODER_PX, AUTOENCODER_PX, padded=geometry.padded)
    return {
        "teacher": pdn_layers(size, TEACHER_CHANNELS, padded=geometry.padded),
        "student": pdn_layers(size, 2 * TEACHER_CHANNELS, padded=geometry.padded),
        "autoencoder": autoencoder_layers(TEACHER_CHANNELS, whole.map_width),
    }


def weight_shapes(size: PdnSize, geometry: Geometry, *, expects: bool = False) -> dict[str, tuple[int, ...]]:
    """Name all that a model knows, with its shape: the networks' weights and the teacher's channel statistics.

    Args:
        size: of teacher and student.
        geometry: of the image.
        expects: with what foretells the difference of student and teacher (`networks.EfficientAD.expected`).
    """
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("teacher_mean", "teacher_std"), (TEACHER_CHANNELS,))
    if expects:
        shapes |= {"expected.weight": (1, TEACHER_CHANNELS, 1, 1), "expected.bias": (1,), "expected.largest": (1,)}
    for network, layers in efficientad_layers(size, geometry).items():
        for index, layer in enumerate(layers):
            if isinstance(layer, Convolution):
                shapes[f"{network}.{index}.weight"] = (
                    layer.outputs,
                    layer.inputs,
                    layer.kernel_px,
                    layer.kernel_px,
                )
                shapes[f"{network}.{index}.bias"] = (layer.outputs,)
    return shapes
