"""Frames outside the line: the first one of a check, and photographs of good parts to train on."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel

from daemon.addresses import load
from daemon.images import Picture, write_picture
from drivers.camera import Camera, CameraError, EndOfStream, Fires
from drivers.catalog import CameraOptions, make_camera
from drivers.frame import Frame, FrameStatus

_STEP_S = 0.5
_NUMBER = re.compile(r"\d{6}")


class _CameraOnly(BaseModel):
    """What photographing needs of a station's file: it may come before the first bundle."""

    camera: CameraOptions


def next_frame(camera: Camera, wait_s: float) -> Frame:
    """Take an open camera's next frame, firing the trigger where that is ours to do.

    Raises CameraError when none comes in time, EndOfStream.
    """
    fired = camera.fires is Fires.ITSELF
    deadline_s = time.monotonic() + wait_s
    while time.monotonic() < deadline_s:
        if not fired:
            fired = camera.ready(_STEP_S)
            if not fired:
                continue
            camera.fire()
        frames = camera.grab(_STEP_S)
        if frames:
            frame = frames[-1]
            # The driver's memory is gone with the next grab.
            return frame if frame.image is None else replace(frame, image=frame.image.copy())
    why = "is the trigger connected?" if camera.fires is Fires.ITSELF else "the camera is not ready for a trigger"
    raise CameraError(f"no frame within {wait_s:.0f} s; {why}")


def photograph(
    config: Path, folder: Path, count: int, every_s: float, wait_s: float
) -> Iterator[tuple[Path | None, Frame]]:
    """Keep a camera's next whole frames as it delivers them, with their pixel format beside them.

    Args:
        config: a station's file; only `camera` is looked at.
        folder: gets NUMBER.png and NUMBER.json; goes on after the highest number in it.
        count: photographs to take.
        every_s: from one frame to the next at least.
        wait_s: for a frame.

    Yields:
        The picture's path, None where the frame was not whole, and the frame.

    Raises ConfigError, DriverMissing, CameraError, or OSError.
    """
    options = load(config, _CameraOnly)[1].camera
    folder.mkdir(parents=True, exist_ok=True)
    number = max((int(path.stem) for path in folder.iterdir() if _NUMBER.fullmatch(path.stem)), default=0)
    camera = make_camera(options)
    with closing(camera):
        camera.open()
        last, due_s = number + count, time.monotonic()
        while number < last:
            if not (camera.live and camera.fires is Fires.ITSELF):
                time.sleep(max(0.0, due_s - time.monotonic()))
            try:
                frame = next_frame(camera, wait_s)
            except EndOfStream:
                raise CameraError(f"the source ended {last - number} photographs too early") from None
            if time.monotonic() < due_s:
                continue  # a camera that fires itself goes on, and what waited in its buffers would be old
            if frame.status is not FrameStatus.COMPLETE or frame.image is None or frame.pixel_format is None:
                yield None, frame
                continue
            number += 1
            due_s = time.monotonic() + every_s
            files, _ = write_picture(
                folder / f"{number:06d}", Picture(frame.image, frame.pixel_format, None, None), "png"
            )
            yield files[0], frame
