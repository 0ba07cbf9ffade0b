"""The drivers by their names in the configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from drivers.camera import Camera
from drivers.pylon import PylonCamera, PylonOptions
from drivers.replay import ReplayCamera, ReplayOptions
from drivers.synthetic import SyntheticCamera, SyntheticOptions

CameraOptions = Annotated[
    SyntheticOptions | ReplayOptions | PylonOptions,
    Field(discriminator="driver"),
]


def make_camera(options: SyntheticOptions | ReplayOptions | PylonOptions) -> Camera:
    """Make the camera that the options describe; it is opened later, by its own thread."""
    match options:
        case SyntheticOptions():
            return SyntheticCamera(options)
        case ReplayOptions():
            return ReplayCamera(options)
        case PylonOptions():
            return PylonCamera(options)
