"""From a frame's pixels to the tensor that the networks read: one specification, here in OpenCV/NumPy.

The steps, in this order, the same in training and in every engine:

1. crop the raw pixels to the region of interest (a Bayer pattern shifts with an odd offset);
2. dark frame and flat field: (raw − dark) × gain, rounded back to the format's integers;
3. paint ignored pixels with one middle grey, so that what lies there cannot matter;
4. demosaic bilinearly, with rounding, the outermost pixels copied from their inner neighbours;
5. resize with antialiasing (`pipeline.resample`) and divide by the format's largest value;
6. subtract the ImageNet mean and divide by the ImageNet standard deviation; channels are R, G, B.

`pipeline.preprocess_cuda` computes the same numbers in one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from drivers.frame import BayerPattern, Image, PixelFormat
from pipeline.resample import resize
from pipeline.scoring import BoolMap, FrameArea

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IGNORED_SHADE = 0.449
"""Share of the format's range painted over ignored pixels: the mean of IMAGENET_MEAN."""
MAX_FLAT_FIELD_GAIN = 16.0

_DEMOSAIC: dict[BayerPattern, int] = {
    "RGGB": cv2.COLOR_BayerRGGB2RGB,
    "GRBG": cv2.COLOR_BayerGRBG2RGB,
    "GBRG": cv2.COLOR_BayerGBRG2RGB,
    "BGGR": cv2.COLOR_BayerBGGR2RGB,
}
_SWAP_COLUMNS: dict[BayerPattern, BayerPattern] = {
    "RGGB": "GRBG",
    "GRBG": "RGGB",
    "GBRG": "BGGR",
    "BGGR": "GBRG",
}
_SWAP_ROWS: dict[BayerPattern, BayerPattern] = {
    "RGGB": "GBRG",
    "GBRG": "RGGB",
    "GRBG": "BGGR",
    "BGGR": "GRBG",
}


class FormatMismatch(ValueError):
    """A frame's size or pixel format does not fit the region of interest, mask or correction frames."""


@dataclass(frozen=True)
class PreprocessSpec:
    """What the bundle says about preprocessing. All arrays are in full-frame pixels."""

    width: int
    """Columns of the network's input."""
    height: int
    """Rows of the network's input."""
    roi: FrameArea | None = None
    """Region of interest; None for the whole frame."""
    dark: NDArray[np.float32] | None = field(default=None, repr=False)
    """(height, width) or (height, width, 3 as R, G, B): raw values without light."""
    flat: NDArray[np.float32] | None = field(default=None, repr=False)
    """The same of an even, bright target."""
    ignore: BoolMap | None = field(default=None, repr=False)
    """(height, width), True where nothing counts."""

    def area(self, frame_width: int, frame_height: int) -> FrameArea:
        """Return the region of interest in a frame of this size. Raises FormatMismatch."""
        for name, array in (
            ("dark frame", self.dark),
            ("flat field", self.flat),
            ("ignore mask", self.ignore),
        ):
            if array is not None and array.shape[:2] != (frame_height, frame_width):
                raise FormatMismatch(
                    f"the frame is {frame_width}×{frame_height} px, "
                    f"but the {name} is {array.shape[1]}×{array.shape[0]} px"
                )
        if self.roi is None:
            return FrameArea(0, 0, frame_width, frame_height)
        if self.roi.x + self.roi.width > frame_width or self.roi.y + self.roi.height > frame_height:
            raise FormatMismatch(f"{self.roi} reaches beyond the frame of {frame_width}×{frame_height} px")
        return self.roi

    def ignored_in_roi(self) -> BoolMap | None:
        """Return the ignore mask cut to the region of interest. Raises FormatMismatch where it lies beyond it."""
        if self.ignore is None or self.roi is None:
            return self.ignore
        height, width = self.ignore.shape
        r = self.area(width, height)
        return self.ignore[r.y : r.y + r.height, r.x : r.x + r.width]


def shifted_pattern(pattern: BayerPattern, x: int, y: int) -> BayerPattern:
    """Return the pattern seen by a crop that starts at column x and row y."""
    if x % 2:
        pattern = _SWAP_COLUMNS[pattern]
    if y % 2:
        pattern = _SWAP_ROWS[pattern]
    return pattern


def demosaic(raw: Image, pattern: BayerPattern) -> Image:
    """Interpolate a Bayer mosaic bilinearly.

    Args:
        raw: (height, width)
        pattern: colours of the top-left 2×2 pixels, row by row.

    Returns:
        (height, width, 3), channels R, G, B.
    """
    return cast(Image, cv2.demosaicing(raw, _DEMOSAIC[pattern]))


def flat_field_gain(
    flat: NDArray[np.float32], dark: NDArray[np.float32] | float, *, is_bayer: bool
) -> NDArray[np.float32]:
    """Return the gain that makes an even target even, leaving each colour's mean as it was.

    Args:
        flat: (height, width) or (height, width, 3), raw values.
        dark: the same shape, or 0.
        is_bayer: level each of the four positions of the 2×2 pattern by itself.

    Returns:
        Gains, limited to MAX_FLAT_FIELD_GAIN; 1 where the flat field is no brighter than the dark frame.
    """
    signal = np.asarray(flat - dark, np.float32)
    gain = np.ones_like(signal)
    planes = [(slice(i, None, 2), slice(j, None, 2)) for i in (0, 1) for j in (0, 1)]
    for plane in planes if is_bayer else [(slice(None), slice(None))]:
        part = signal[plane]
        mean = part.mean(axis=(0, 1), dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = np.where(part > 0, mean / part, 1.0)
        gain[plane] = np.clip(wanted, 0.0, MAX_FLAT_FIELD_GAIN)
    return gain


def check_correction(array: NDArray[np.float32]) -> None:
    """Check a dark frame or flat field: (height, width) or (height, width, 3), finite. Raises ValueError."""
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        raise ValueError(f"a dark frame or flat field of shape {array.shape}; it must be grey or R, G, B")
    if not np.isfinite(array).all():
        raise ValueError("a dark frame or flat field holds values that are not finite")


@dataclass(frozen=True)
class Correction:
    """Dark frame and gain of one pixel format, cut to the region of interest."""

    dark: NDArray[np.float32]
    gain: NDArray[np.float32]


def correction_for(spec: PreprocessSpec, fmt: PixelFormat, area: FrameArea) -> Correction | None:
    """Prepare dark frame and gain for a pixel format; None when the spec has neither.

    Raises FormatMismatch when a colour correction meets a format with one sample per pixel.
    """
    if spec.dark is None and spec.flat is None:
        return None
    given = [array for array in (spec.dark, spec.flat) if array is not None]
    if len({array.shape for array in given}) > 1:
        raise FormatMismatch("dark frame and flat field must both be grey or both in colour")
    shape = given[0].shape
    dark = np.zeros(shape, np.float32) if spec.dark is None else spec.dark
    if spec.flat is None:
        gain = np.ones(shape, np.float32)
    else:
        gain = flat_field_gain(spec.flat, dark, is_bayer=fmt.bayer is not None)
    window = (slice(area.y, area.y + area.height), slice(area.x, area.x + area.width))
    planes = []
    for array in (dark, gain):
        cut = array[window]
        if cut.ndim == 3 and fmt.channels == 1:
            raise FormatMismatch(f"dark frame or flat field is in colour, the camera delivers {fmt.value}")
        if fmt.channels == 3:
            cut = np.broadcast_to(cut[..., None], (*cut.shape, 3)) if cut.ndim == 2 else cut
            cut = cut[..., ::-1] if fmt.colour_order == "BGR" else cut
        planes.append(np.ascontiguousarray(cut, np.float32))
    return Correction(*planes)


class Preprocessor:
    """Turn frames into network inputs on the CPU; keeps corrections per pixel format."""

    def __init__(self, spec: PreprocessSpec) -> None:
        self.spec = spec
        self._corrections: dict[tuple[PixelFormat, FrameArea], Correction | None] = {}
        scale = np.array(IMAGENET_STD, np.float32)
        self._scale = (1.0 / scale).astype(np.float32)
        self._offset = (np.array(IMAGENET_MEAN, np.float32) / scale).astype(np.float32)

    def __call__(self, image: Image, fmt: PixelFormat) -> NDArray[np.float32]:
        """Return the network's input.

        Args:
            image: (height, width) or (height, width, 3), in `fmt`.
            fmt: its pixel format.

        Returns:
            (3, height, width) float32, R, G, B, ImageNet-normalised, contiguous.

        Raises:
            FormatMismatch: size or format do not fit the specification.
        """
        if not fmt.fits(image):
            raise FormatMismatch(f"{image.shape} {image.dtype} is not {fmt.value}")
        area = self.spec.area(image.shape[1], image.shape[0])
        raw = image[area.y : area.y + area.height, area.x : area.x + area.width]
        key = (fmt, area)
        if key not in self._corrections:
            self._corrections[key] = correction_for(self.spec, fmt, area)
        correction = self._corrections[key]
        if correction is not None:
            corrected = (raw.astype(np.float32) - correction.dark) * correction.gain
            raw = np.clip(np.rint(corrected), 0, fmt.max_value).astype(fmt.dtype)
        ignored = self.spec.ignored_in_roi()
        if ignored is not None:
            raw = raw.copy() if correction is None else raw
            raw[ignored] = ignored_value(fmt)
        pixels: NDArray[Any] = raw
        if fmt.bayer:
            pixels = demosaic(raw, shifted_pattern(fmt.bayer, area.x, area.y))
        small = resize(pixels, self.spec.width, self.spec.height) * np.float32(1.0 / fmt.max_value)
        if small.ndim == 2:
            small = small[..., None]
        elif fmt.colour_order == "BGR":
            small = small[..., ::-1]
        normalised = small * self._scale - self._offset
        return np.ascontiguousarray(normalised.transpose(2, 0, 1))


def ignored_value(fmt: PixelFormat) -> int:
    """Return the raw value painted over ignored pixels."""
    return round(IGNORED_SHADE * fmt.max_value)
