"""The one thing that leaves a driver: a `Frame`, with its pixel format and its status."""

from __future__ import annotations

import string
import time
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

BayerPattern = Literal["RGGB", "GRBG", "GBRG", "BGGR"]
ColourOrder = Literal["RGB", "BGR"]
Image = NDArray[np.uint8] | NDArray[np.uint16]


class PixelFormat(StrEnum):
    """Pixel formats by their GenICam (PFNC) names; more than 8 bits lie unpacked in 16-bit words."""

    MONO8 = "Mono8"
    MONO10 = "Mono10"
    MONO12 = "Mono12"
    MONO16 = "Mono16"
    BAYER_RG8 = "BayerRG8"
    BAYER_GR8 = "BayerGR8"
    BAYER_GB8 = "BayerGB8"
    BAYER_BG8 = "BayerBG8"
    BAYER_RG12 = "BayerRG12"
    BAYER_GR12 = "BayerGR12"
    BAYER_GB12 = "BayerGB12"
    BAYER_BG12 = "BayerBG12"
    RGB8 = "RGB8"
    BGR8 = "BGR8"

    @cached_property
    def bits(self) -> int:
        """Significant bits per channel; the full range is 0 … 2**bits − 1."""
        return int(self.value.lstrip(string.ascii_letters))

    @cached_property
    def max_value(self) -> int:
        """Largest value the format can hold, never guessed from an image."""
        return (1 << self.bits) - 1

    @cached_property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """Type of one stored sample."""
        return np.uint8 if self.bits == 8 else np.uint16

    @cached_property
    def channels(self) -> int:
        """Samples per pixel as stored: 1 for mono and Bayer, 3 for colour."""
        return 3 if self.colour_order else 1

    @cached_property
    def bayer(self) -> BayerPattern | None:
        """Colours of the top-left 2×2 pixels, row by row; None where there is no colour filter.

        GenICam names the first two pixels of the first row (PFNC 2.x), so BayerRG begins R G / G B.
        """
        return _BAYER.get(self.value[5:7]) if self.value.startswith("Bayer") else None

    @cached_property
    def colour_order(self) -> ColourOrder | None:
        """Order of the three channels, None for mono and Bayer."""
        order = self.value[:3]
        return "RGB" if order == "RGB" else "BGR" if order == "BGR" else None

    def fits(self, image: Image) -> bool:
        """Tell whether an array has this format's sample type and number of channels."""
        shape_fits = image.ndim == 3 and image.shape[2] == 3 if self.channels == 3 else image.ndim == 2
        return bool(shape_fits and image.dtype == self.dtype)


_BAYER: dict[str, BayerPattern] = {"RG": "RGGB", "GR": "GRBG", "GB": "GBRG", "BG": "BGGR"}


class FrameStatus(StrEnum):
    """Why a frame can or cannot be judged."""

    COMPLETE = "complete"
    """Every pixel arrived."""
    INCOMPLETE = "incomplete"
    """The camera or the transport delivered part of the buffer."""
    UNREADABLE = "unreadable"
    """A file that could not be decoded."""
    LOST = "lost"
    """The camera counted a frame that never reached us."""
    TIMEOUT = "timeout"
    """A trigger that brought no frame in time."""
    CAMERA = "camera"
    """The camera failed while a trigger was waiting for its frame."""
    PENDING = "pending"
    """A trigger that was fired and whose frame has not come yet."""
    OVERLOAD = "overload"
    """The frame came while every slot was taken (`on_overload: invalid`)."""


@dataclass(slots=True)
class Frame:
    """One frame, or the report that a frame should have been there."""

    status: FrameStatus
    source: str
    """File name, or the camera's serial number."""
    image: Image | None = None
    """(height, width) or (height, width, 3) in `pixel_format`; valid as long as its driver says (`Camera.grab`)."""
    pixel_format: PixelFormat | None = None
    device_id: int | None = None
    """The camera's own counter."""
    device_timestamp_ns: int | None = None
    """The camera's own clock at exposure."""
    detail: str = ""
    """What went wrong, in words; empty for a complete frame."""
    arrived_ns: int = field(default_factory=time.monotonic_ns)
    """Host monotonic clock when the frame came to the driver's queue, as near as the driver can tell."""
    wall_ns: int = 0
    """Host wall clock (UTC, Unix epoch) at `arrived_ns`; 0: worked out from it."""
    grabbed_ns: int = 0
    """Host monotonic clock when the frame lay in its ring slot; 0 before that."""
    sequence: int = 0
    """The station's number, from 1 and gapless; 0 until the station has numbered it."""

    def __post_init__(self) -> None:
        if not self.wall_ns:
            self.wall_ns = time.time_ns() - (time.monotonic_ns() - self.arrived_ns)

    def forget_image(self) -> None:
        """Keep no more of the image than its shape and type: its memory is needed for others."""
        if self.image is not None:
            shape, dtype = self.image.shape, self.image.dtype
            self.image = np.ndarray(shape, dtype, bytes(dtype.itemsize), strides=(0,) * len(shape))
