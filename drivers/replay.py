"""Images from a folder, a glob or a video file, played as if a camera had taken them."""

from __future__ import annotations

import errno
import glob
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
from natsort import natsorted, ns
from numpy.typing import NDArray
from pydantic import Field, field_validator

from drivers.camera import NEW_IMAGES, CameraError, CameraInfo, EndOfStream, Fires, Options
from drivers.frame import Frame, FrameStatus, Image, PixelFormat
from drivers.pacing import Pacer
from drivers.paths import exists, files_below, is_file, is_folder

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
IMAGE_SCHEMA = "inspectord.image/1"
"""Of the description (`NAME.json`) beside an image that the daemon has kept."""
VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mjpeg", ".mkv", ".mov", ".mp4", ".webm"})


class ReplayOptions(Options):
    """Options of the `replay` driver."""

    driver: Literal["replay"]
    path: str = Field(description="a folder (searched recursively), a glob, an image or a video file")
    rate_fps: float | None = Field(default=None, gt=0, description="None: as fast as they are taken")
    loop: bool = False
    frames: int | None = Field(default=None, ge=1, description="stop after so many; None: at the end")
    pixel_format: PixelFormat | None = Field(
        default=None,
        description="what the files hold where their own type does not say it (Mono12 in 16-bit files, Bayer)",
    )

    @field_validator("path")
    @classmethod
    def _path_exists(cls, path: str) -> str:
        try:
            found = exists(Path(path)) or glob.glob(path, recursive=True)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.ENAMETOOLONG):
                return path  # a disk that is not well is no mistake in the file: opening the folder says it
            raise ValueError(f"{path}: {error.strerror}") from error
        if not found:
            raise ValueError(f"nothing there: {Path(path).absolute()}")
        return path


def _is_hidden(file: Path, root: Path) -> bool:
    """Tell whether a file lies in what a folder does not show: a wastebasket, thumbnails."""
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def list_images(path: str | Path) -> list[tuple[str, Path]]:
    """List image files in natural order (img2 before img10).

    Args:
        path: a folder (recursive, without what is hidden in it), a single file, or a glob pattern.

    Returns:
        Pairs of the name relative to the folder (POSIX style) and the path.

    Raises OSError where a folder cannot be read.
    """
    root = Path(path)
    if is_folder(root):
        found = [
            (readable(file.relative_to(root).as_posix()), file)
            for file in files_below(root)
            if file.suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(file, root) and is_file(file)
        ]
    elif is_file(root):
        found = [(readable(root.name), root)]
    else:
        found = [
            (readable(match), Path(match))
            for match in glob.glob(str(path), recursive=True)
            if Path(match).suffix.lower() in IMAGE_SUFFIXES and is_file(Path(match))
        ]
    # 1.png and 01.png are equal in natural order, and folders are listed in any.
    return natsorted(sorted(found), key=lambda pair: pair[0], alg=ns.PATH)


def readable(name: str) -> str:
    """Replace what is not UTF-8 in a file's name: messages are."""
    return os.fsencode(name).decode("utf-8", "replace")


def decode_image(path: Path) -> Image:
    """Decode an image file, 8 or 16 bits, grey (height, width) or colour (height, width, 3) as BGR.

    Raises OSError when the file cannot be read and ValueError when it is no complete image.
    """
    return decode_contents(path.read_bytes())


def decode_contents(contents: bytes) -> Image:
    """Decode an image file's contents as `decode_image` does. Raises ValueError."""
    if not contents:
        raise ValueError("the file is empty")
    try:
        image = cv2.imdecode(np.frombuffer(contents, np.uint8), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR)
    except cv2.error as error:
        raise ValueError(str(error).strip()) from error
    if image is None:
        raise ValueError("not a complete image in a format that OpenCV reads")
    if image.dtype == np.uint8:
        return image.astype(np.uint8, copy=False)
    if image.dtype == np.uint16:
        if image.ndim == 2:
            return image.astype(np.uint16, copy=False)
        raise ValueError("colour images with 16 bits a channel are not supported; convert them to 8 bits")
    raise ValueError(f"samples of type {image.dtype} are not supported; convert to 8 or 16 bits")


def decode_or_none(contents: bytes, flags: int = cv2.IMREAD_UNCHANGED) -> NDArray[Any] | None:
    """Decode an image file's contents with OpenCV's flags, as they are by default; None where they are no image.

    Of nothing, which a power cut leaves, and of a size that cannot be, OpenCV throws an error of its own.
    """
    try:
        return cv2.imdecode(np.frombuffer(contents, np.uint8), flags)
    except cv2.error:
        return None


def read_image(path: Path, declared: PixelFormat | None = None) -> tuple[Image, PixelFormat]:
    """Decode an image file and name its pixel format: the declared one, else its description's, else its type's.

    Raises OSError or ValueError as `decode_image`, `described_format` and `format_of` do.
    """
    image = decode_image(path)
    return image, format_of(image, declared or described_format(path))


def described_format(path: Path) -> PixelFormat | None:
    """Return what the description beside a kept or captured image states; None where there is none.

    The file's own type cannot tell a Bayer pattern from grey, or 12 bits from 16. Raises OSError or ValueError.
    """
    description = path.with_suffix(".json")
    if not is_file(description):
        return None
    text = description.read_bytes()
    if IMAGE_SCHEMA.encode() not in text:
        return None  # somebody else's file
    try:
        described = json.loads(text)
        if described["file"] != path.name:
            return None
        return PixelFormat(described["pixel_format"])
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{description.name} beside it is damaged: {error}") from error


def format_of(image: Image, declared: PixelFormat | None = None) -> PixelFormat:
    """Name the pixel format of a decoded file. Raises ValueError where it contradicts the declared one."""
    if declared is None:
        if image.ndim == 3:
            return PixelFormat.BGR8
        return PixelFormat.MONO8 if image.dtype == np.uint8 else PixelFormat.MONO16
    if not declared.fits(image):
        raise ValueError(f"holds {image.shape} {image.dtype}, which is not {declared.value}")
    return PixelFormat.BGR8 if declared is PixelFormat.RGB8 else declared  # OpenCV decodes to B, G, R


class ReplayCamera:
    """The camera over files; it waits for its reader, so nothing is ever dropped."""

    live: ClassVar[bool] = False
    fires = Fires.ITSELF
    signals_pass = False

    def __init__(self, options: ReplayOptions) -> None:
        self._options = options
        self._pacer = Pacer(options.rate_fps)
        self._frames: Iterator[Frame] | None = None
        self._count = 0

    def open(self) -> CameraInfo:
        """List the files; a reopened replay goes on where it was."""
        path = Path(self._options.path)
        if path.suffix.lower() in VIDEO_SUFFIXES and is_file(path):
            if readable(str(path)) != str(path):
                raise CameraError(f"{readable(str(path.absolute()))}: a video's name must be UTF-8; rename it")
            probe = cv2.VideoCapture(str(path))
            opened = probe.isOpened()
            probe.release()
            if not opened:
                raise CameraError(f"{path.absolute()}: OpenCV cannot open this video")
            if self._options.pixel_format not in (None, PixelFormat.BGR8):
                raise CameraError(f"pixel_format: videos are decoded as BGR8, not {self._options.pixel_format}")
            if self._frames is None:
                self._frames = self._play_video(path)
            return CameraInfo(str(path), "video file", lends=NEW_IMAGES)
        files = list_images(self._options.path)
        if not files:
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise CameraError(f"{path.absolute()}: no images there (looked for {suffixes})")
        if self._frames is None:
            self._frames = self._play_files(files)
        return CameraInfo(str(path), f"{len(files)} image files", lends=NEW_IMAGES)

    def grab(self, timeout_s: float) -> list[Frame]:
        """Read the next file when it is due; a file that cannot be read is a frame with that status."""
        if self._frames is None:
            raise CameraError("the replay is not open")
        if self._options.frames is not None and self._count >= self._options.frames:
            raise EndOfStream
        if not self._pacer.wait(timeout_s):
            return []
        try:
            frame = next(self._frames)
        except StopIteration:
            raise EndOfStream from None
        self._count += 1
        return [frame]

    def ready(self, timeout_s: float) -> bool:
        """Say that files take no triggers."""
        return False

    def fire(self) -> None:
        """Do nothing: files take no triggers."""

    def signal_pass(self, until_ns: int) -> None:
        """Do nothing: there is no output line."""

    def close(self) -> None:
        """Keep the place; files need no closing."""

    def _play_files(self, files: list[tuple[str, Path]]) -> Iterator[Frame]:
        while True:
            for index, (name, path) in enumerate(files):
                yield self._read(index, name, path)
            if not self._options.loop:
                return

    def _read(self, index: int, name: str, path: Path) -> Frame:
        arrived_ns = time.monotonic_ns()
        try:
            image, pixel_format = read_image(path, self._options.pixel_format)
        except (OSError, ValueError) as error:
            return Frame(FrameStatus.UNREADABLE, name, device_id=index, detail=str(error), arrived_ns=arrived_ns)
        return Frame(
            FrameStatus.COMPLETE,
            name,
            image=image,
            pixel_format=pixel_format,
            device_id=index,
            arrived_ns=arrived_ns,
        )

    def _play_video(self, path: Path) -> Iterator[Frame]:
        while True:
            video = cv2.VideoCapture(str(path))
            try:
                index, promised = 0, int(video.get(cv2.CAP_PROP_FRAME_COUNT))
                while True:
                    arrived_ns = time.monotonic_ns()
                    timestamp_ms = video.get(cv2.CAP_PROP_POS_MSEC)
                    got, image = video.read()
                    if not got:
                        break
                    yield Frame(
                        FrameStatus.COMPLETE,
                        f"{path.name}#{index}",
                        image=image.astype(np.uint8, copy=False),
                        pixel_format=PixelFormat.BGR8,
                        device_id=index,
                        device_timestamp_ns=int(timestamp_ms * 1e6),
                        arrived_ns=arrived_ns,
                    )
                    index += 1
                if index < promised:
                    end = f"the video ends at frame {index} of {promised}: truncated or damaged"
                    yield Frame(FrameStatus.UNREADABLE, f"{path.name}#{index}", device_id=index, detail=end)
            finally:
                video.release()
            if not self._options.loop or index == 0:
                return
