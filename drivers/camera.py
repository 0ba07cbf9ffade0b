"""What every driver promises, and how it fails."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum, auto
from typing import ClassVar, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from drivers.frame import Frame, PixelFormat


class CameraError(Exception):
    """The camera cannot be used as configured; trying again may help, the message says what to do."""


class CameraLost(CameraError):
    """The camera went away or must be reopened."""


class EndOfStream(Exception):
    """The source has delivered its last frame."""


class DriverMissing(Exception):
    """The driver's library is not installed; the message names the extra to install."""


class Options(BaseModel):
    """Base of every driver's options: unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class CameraInfo:
    """What an open camera says of itself."""

    source: str
    """Serial number, or the folder or file."""
    model: str
    """Make and model, or the kind of source."""
    width: int | None = None
    """Pixels; None where frames vary in size."""
    height: int | None = None
    """Pixels; None where frames vary in size."""
    pixel_format: PixelFormat | None = None
    """None where frames vary in format."""
    lends: int = 0
    """Frames that may be kept as they are at one time; 0: each image is valid until the next grab only.

    An image that is lent stays while anyone refers to it; then the driver has its memory again.
    """

    @property
    def frame_bytes(self) -> int:
        """Size of a frame; 0 where frames vary."""
        if self.width is None or self.height is None or self.pixel_format is None:
            return 0
        fmt = self.pixel_format
        return self.width * self.height * fmt.channels * np.dtype(fmt.dtype).itemsize


class Fires(Enum):
    """Who decides when the next frame is exposed."""

    ITSELF = auto()
    """The camera, its free run or its trigger line."""
    WHEN_READY = auto()
    """We do, as soon as the camera is ready (and due, where a rate is set)."""
    ON_COMMAND = auto()
    """We do, when somebody asks for it."""


NEW_IMAGES = sys.maxsize
"""`CameraInfo.lends` of a source that makes each image anew."""


class Camera(Protocol):
    """One camera or one simulated source. Used by a single thread; reopened after `close`."""

    live: ClassVar[bool]
    """True where frames come on their own time, so that a slow consumer would lose them."""
    fires: Fires
    """Other than ITSELF: each `fire` is answered by `grab`, with a frame or the report that none came."""
    signals_pass: bool
    """An output line is configured that `signal_pass` drives."""

    def open(self) -> CameraInfo:
        """Connect and start acquisition. Raises CameraError or DriverMissing."""
        ...

    def grab(self, timeout_s: float) -> list[Frame]:
        """Wait up to `timeout_s` for the next frames, in the order of their exposure.

        Returns an empty list when nothing came, one frame as a rule, and more where the camera's
        counter shows that frames were lost before this one. Images stay valid until the next call,
        those of a camera that lends them while anyone refers to them.
        Raises CameraLost when the camera must be reopened and EndOfStream after the last frame.
        """
        ...

    def ready(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` until a trigger may be fired; not called where `fires` is ITSELF.

        Raises CameraLost.
        """
        ...

    def fire(self) -> None:
        """Fire one trigger. Raises CameraLost."""
        ...

    def signal_pass(self, until_ns: int) -> None:
        """Pulse the output line for a part that is OK, until the pulse is over; nothing where none is configured.

        Called by another thread than the one that grabs. Raises CameraError when the line cannot be driven, or not
        begin its pulse before `until_ns` (`time.monotonic_ns`): it would pass another part.
        """
        ...

    def close(self) -> None:
        """Stop acquisition and disconnect; harmless when already closed."""
        ...
