"""Images on disk that can be judged again: the picture, its map, and the verdict that it had."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import cv2
import numpy as np

from drivers.frame import Frame, FrameStatus, Image, PixelFormat
from drivers.replay import IMAGE_SCHEMA, decode_or_none
from pipeline.overlay import to_bgr
from pipeline.scoring import FloatMap

ImageFormat = Literal["png", "jpeg"]
_JPEG_QUALITY = 95
_PNG_COMPRESSION = 1  # zlib's fastest: sensor noise does not compress better with more effort


def encode_image(image: Image, fmt: PixelFormat, wanted: ImageFormat) -> tuple[bytes, PixelFormat]:
    """Encode a frame's image; return the file's content and the pixel format that it now has.

    PNG keeps every sample as the camera delivered it, Bayer patterns and 16-bit words included. JPEG takes
    colours out of Bayer patterns first, and the upper eight bits of longer words.
    """
    if wanted == "jpeg":
        if fmt.bayer:
            image, fmt = to_bgr(image, fmt), PixelFormat.BGR8
        elif fmt.bits > 8:
            image, fmt = np.asarray(image >> (fmt.bits - 8), np.uint8), PixelFormat.MONO8
    pixels = image[..., ::-1] if fmt.colour_order == "RGB" else image  # OpenCV writes B, G, R
    options = [cv2.IMWRITE_PNG_COMPRESSION, _PNG_COMPRESSION]
    if wanted == "jpeg":
        options = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    done, encoded = cv2.imencode(".png" if wanted == "png" else ".jpg", np.ascontiguousarray(pixels), options)
    if not done:
        raise OSError(f"OpenCV cannot write {image.shape} as {wanted}")
    return encoded.tobytes(), fmt


@dataclass(frozen=True, slots=True)
class Picture:
    """What is written for one part."""

    image: Image
    pixel_format: PixelFormat
    anomaly_map: FloatMap | None
    verdict: dict[str, Any] | None
    """As published; None for a capture."""


def write_picture(stem: Path, picture: Picture, wanted: ImageFormat) -> tuple[list[Path], int]:
    """Write image, map (`.npy`) and description (`.json`, last); return the files and their bytes.

    Raises OSError; what was begun is removed.
    """
    encoded, fmt = encode_image(picture.image, picture.pixel_format, wanted)
    image_path = stem.with_suffix(".png" if wanted == "png" else ".jpg")
    map_path = stem.with_suffix(".npy") if picture.anomaly_map is not None else None
    described = {
        "schema": IMAGE_SCHEMA,
        "file": image_path.name,
        "pixel_format": fmt.value,
        "map": None if map_path is None else map_path.name,
        "verdict": picture.verdict,
    }
    paths = [image_path]
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        image_path.write_bytes(encoded)
        if map_path is not None and picture.anomaly_map is not None:
            paths.append(map_path)
            with map_path.open("wb") as file:
                np.save(file, picture.anomaly_map)
        paths.append(stem.with_suffix(".json"))
        paths[-1].write_text(json.dumps(described), encoding="utf-8")
        return paths, sum(path.stat().st_size for path in paths)
    except OSError:
        for path in paths:
            path.unlink(missing_ok=True)
        raise


def read_picture(description: Path) -> tuple[Frame, dict[str, Any] | None]:
    """Read a kept image as the frame that it was, and its verdict.

    Raises OSError, or KeyError, TypeError or ValueError when it is not that.
    """
    described = json.loads(description.read_text(encoding="utf-8"))
    if not isinstance(described, dict) or described.get("schema") != IMAGE_SCHEMA:
        raise ValueError(f"not a description of a kept image ({IMAGE_SCHEMA})")
    path, fmt = description.with_name(described["file"]), PixelFormat(described["pixel_format"])
    decoded = decode_or_none(path.read_bytes())
    if decoded is None or not fmt.fits(image := cast(Image, decoded)):
        raise ValueError(f"{path.name} is not a whole image in {fmt.value}")
    pixels = cast(Image, np.ascontiguousarray(image[..., ::-1])) if fmt.colour_order == "RGB" else image
    verdict = described["verdict"]
    source = path.name if verdict is None else verdict["source"]
    return Frame(FrameStatus.COMPLETE, source, image=pixels, pixel_format=fmt), verdict
