"""The engine: one object that owns a device and turns a frame's pixels into the two raw maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from drivers.frame import Image, PixelFormat
from pipeline.scoring import FloatMap

Precision = Literal["fp32", "bf16", "int8", "fp16"]
"""Of the convolutions; `bf16` and `int8` are the CPU engine's, `fp16` the CUDA engine's."""
LARGEST_INT8_WEIGHT = 64
"""Seven bits of eight: a processor without VNNI adds two products of bytes in 16 bits; 2 · 255 · 64 still fits."""
INT8_SCHEME = {"largest_weight": LARGEST_INT8_WEIGHT, "image": "float"}
"""What int8 is: quantiles that were calibrated with another one do not fit."""
Prepared = NDArray[np.float32]
"""(3, image_height, image_width), ImageNet-normalised."""


@dataclass(frozen=True, slots=True)
class RawMaps:
    """What an engine returns, with the time of its stages."""

    student_teacher: FloatMap
    """(map_height, map_width)"""
    autoencoder: FloatMap
    """(map_height, map_width), autoencoder against student"""
    preprocess_ns: int
    infer_ns: int


Pending = Callable[[], RawMaps]
"""Waits for the maps of a frame that was begun; called once. Raises the device's own errors."""


class Engine(Protocol):
    """Preprocessing and networks on one device. Used by a single thread."""

    device: str
    """`cpu`, or the CUDA device's name."""
    precision: Precision
    """Of the convolutions."""
    at_once: int
    """Frames that may be begun before the first of them is finished."""

    def warm_up(self) -> None:
        """Run once on nothing, so that the first part is not the slowest."""
        ...

    def begin(self, image: Image, fmt: PixelFormat) -> Pending:
        """Begin with one frame, and go on with it beside what the caller does; frames are finished in their order.

        The image must stay as it is until then. Raises FormatMismatch, or the device's own errors.
        """
        ...


class CalibratedEngine(Engine, Protocol):
    """An engine that takes prepared images as well: what calibration and checks compare."""

    def infer(self, prepared: Prepared) -> tuple[FloatMap, FloatMap]:
        """Compute the raw maps of one prepared image, (map_height, map_width) each."""
        ...
