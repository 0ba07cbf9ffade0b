"""A simulated production line: rendered parts with known defects, reproducible from a seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from drivers.bayer import mosaic
from drivers.camera import NEW_IMAGES, CameraInfo, CameraLost, EndOfStream, Fires, Options
from drivers.frame import Frame, FrameStatus, Image, PixelFormat
from drivers.pacing import Pacer

DefectKind = Literal["scratch", "stain", "missing_hole", "double_print", "extra_hole"]
DEFECT_KINDS: tuple[DefectKind, ...] = ("scratch", "stain", "missing_hole", "double_print", "extra_hole")

_LIGHT_PERIOD_FRAMES = 400
"""One slow swing of the simulated lamp."""


class SyntheticFaults(Options):
    """How often the simulated camera fails, as shares of the parts: to see what a PLC does about it."""

    incomplete: float = Field(default=0, ge=0, le=1, description="part of the buffer is missing")
    lost: float = Field(default=0, ge=0, le=1, description="the camera counts a frame that never comes")
    unplugged: float = Field(default=0, ge=0, le=1, description="the camera is gone, until it is reopened")


class SyntheticOptions(Options):
    """Options of the `synthetic` driver."""

    driver: Literal["synthetic"] = "synthetic"
    seed: int = Field(default=0, ge=0)
    width: int = Field(default=512, ge=64, le=8192)
    height: int = Field(default=512, ge=64, le=8192)
    pixel_format: PixelFormat = PixelFormat.BGR8
    rate_fps: float | None = Field(default=None, gt=0, description="None: as fast as they are taken")
    frames: int | None = Field(default=None, ge=1, description="stop after so many; None: never")
    defect_rate: float = Field(default=0.2, ge=0, le=1)
    defects: tuple[DefectKind, ...] = Field(default=DEFECT_KINDS, min_length=1)
    first_index: int = Field(default=0, ge=0, description="index of the first part")
    trigger: Literal["free_run", "command"] = Field(
        default="free_run", description="command: a part comes when somebody asks for it"
    )
    faults: SyntheticFaults = SyntheticFaults()


@dataclass(frozen=True, slots=True)
class Part:
    """One rendered part with its ground truth."""

    rgb: NDArray[np.uint8]
    """(height, width, 3), channels R, G, B."""
    kind: Literal["good"] | DefectKind
    mask: NDArray[np.bool_]
    """(height, width), True where the defect is."""
    raw: Image
    """The same picture in the camera's pixel format."""


class PartRenderer:
    """Render part number `index` of a line; the same seed and index always give the same picture."""

    def __init__(self, options: SyntheticOptions) -> None:
        self._options = options
        self._size = min(options.width, options.height)

    def kind_of(self, index: int) -> Literal["good"] | DefectKind:
        """Draw whether part `index` is good, or which defect it has."""
        rng = np.random.default_rng([self._options.seed, index, 0])
        if rng.random() >= self._options.defect_rate:
            return "good"
        return self._options.defects[int(rng.integers(len(self._options.defects)))]

    def render(self, index: int, kind: Literal["good"] | DefectKind | None = None) -> Part:
        """Render part `index`, as the line would or with a defect of one's choice."""
        options, size = self._options, self._size
        kind = kind or self.kind_of(index)
        rng = np.random.default_rng([options.seed, index, 1])
        plate = _Plate(size, rng)
        good = plate.image.copy()
        # Its own generator: with and without a defect, everything else about the part is the same.
        plate.draw_defect(kind, np.random.default_rng([options.seed, index, 2]))
        changed = np.abs(plate.image - good).max(axis=2) > 0.02

        turn_deg, shift = rng.uniform(-1.0, 1.0), rng.uniform(-0.008, 0.008, 2) * size
        pose = cv2.getRotationMatrix2D((size / 2, size / 2), float(turn_deg), 1.0)
        pose[:, 2] += shift + np.array([(options.width - size) / 2, (options.height - size) / 2])
        frame_size = (options.width, options.height)
        plate_image = cv2.warpAffine(plate.image, pose, frame_size, flags=cv2.INTER_LINEAR)
        coverage = cv2.warpAffine(plate.coverage, pose, frame_size, flags=cv2.INTER_LINEAR)[..., None]
        mask = cv2.warpAffine(changed.astype(np.uint8), pose, frame_size, flags=cv2.INTER_NEAREST) > 0

        belt = 0.13 + 0.008 * _smooth_noise(rng, options.height, options.width, 3.0)[..., None]
        scene = plate_image * coverage + belt * (1.0 - coverage)
        light = 1.0 + 0.05 * np.sin(2 * np.pi * index / _LIGHT_PERIOD_FRAMES) + rng.normal(0, 0.01)
        ramp = np.linspace(0.97, 1.03, options.width, dtype=np.float32)[None, :, None]
        noise = rng.standard_normal(scene.shape, dtype=np.float32) * 0.008
        shades = np.clip(scene * (light * ramp) + noise, 0, 1)
        rgb = np.rint(shades * 255).astype(np.uint8)
        return Part(rgb, kind, mask, _to_pixel_format(shades, options.pixel_format))


class _Plate:
    """A brushed metal plate with four holes, a print and a bright edge, before it is placed."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size = size
        noise = rng.standard_normal((size, size), dtype=np.float32)
        brushed = np.asarray(cv2.GaussianBlur(noise, (0, 0), size / 24, sigmaY=0.7), np.float32)
        brushed /= brushed.std()
        tone = np.array([0.60, 0.62, 0.66], np.float32)
        self.image = (tone * (1.0 + 0.03 * brushed[..., None])).astype(np.float32)
        self.coverage = np.zeros((size, size), np.float32)
        low, high = self._px(0.12), self._px(0.88)
        cv2.rectangle(self.coverage, (low, low), (high, high), 1.0, -1, cv2.LINE_AA)
        cv2.rectangle(self.image, (low, low), (high, high), (0.86, 0.87, 0.88), self._px(0.012))
        self.holes = [(x, y) for x in (0.24, 0.76) for y in (0.24, 0.76)]
        self._under_holes = self.image.copy()
        for hole in self.holes:
            self._drill(hole)
        self._print((0.0, 0.0))

    def _px(self, fraction: float) -> int:
        return max(1, round(fraction * self.size))

    def _drill(self, centre: tuple[float, float]) -> None:
        at, radius = (self._px(centre[0]), self._px(centre[1])), self._px(0.042)
        cv2.circle(self.image, at, radius + self._px(0.008), (0.78, 0.79, 0.80), -1, cv2.LINE_AA)
        cv2.circle(self.image, at, radius, (0.10, 0.10, 0.11), -1, cv2.LINE_AA)

    def _print(self, offset: tuple[float, float]) -> None:
        ink, scale = np.array([0.12, 0.16, 0.42], np.float32), self.size / 420
        stencil = np.zeros((self.size, self.size), np.uint8)  # OpenCV 5 writes text on 8 bits only
        for line, y in (("INSP-7", 0.49), ("24V DC", 0.60)):
            at = (self._px(0.31 + offset[0]), self._px(y + offset[1]))
            thickness = max(1, round(2.2 * scale))
            cv2.putText(stencil, line, at, cv2.FONT_HERSHEY_SIMPLEX, scale, (255,), thickness, cv2.LINE_AA)
        share = stencil[..., None].astype(np.float32) / 255
        self.image = np.asarray(self.image * (1 - share) + ink * share, np.float32)

    def draw_defect(self, kind: str, rng: np.random.Generator) -> None:
        drawings: dict[str, Callable[[np.random.Generator], None]] = {
            "scratch": self._scratch,
            "stain": self._stain,
            "missing_hole": self._missing_hole,
            "double_print": self._double_print,
            "extra_hole": self._extra_hole,
        }
        if kind != "good":
            drawings[kind](rng)

    def _scratch(self, rng: np.random.Generator) -> None:
        start = rng.uniform(0.22, 0.6, 2)
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 0.3)
        steps = np.linspace(0, 1, 12)[:, None]
        path = start + steps * length * np.array([np.cos(angle), np.sin(angle)])
        path = np.clip(path + np.cumsum(rng.normal(0, 0.004, path.shape), axis=0), 0.15, 0.85)
        points = np.rint(path * self.size).astype(np.int32)
        bright = (0.97, 0.97, 0.97) if rng.random() < 0.5 else (0.2, 0.2, 0.2)
        cv2.polylines(self.image, [points], False, bright, max(1, self._px(0.012)), cv2.LINE_AA)

    def _stain(self, rng: np.random.Generator) -> None:
        centre, axes = rng.uniform(0.3, 0.7, 2), rng.uniform(0.03, 0.08, 2)
        blot = np.zeros((self.size, self.size), np.float32)
        at = (self._px(float(centre[0])), self._px(float(centre[1])))
        radii = (self._px(float(axes[0])), self._px(float(axes[1])))
        cv2.ellipse(blot, at, radii, float(rng.uniform(0, 180)), 0, 360, 1.0, -1)
        blot = np.asarray(cv2.GaussianBlur(blot, (0, 0), self.size / 100), np.float32)
        self.image *= 1.0 - blot[..., None] * np.array([0.35, 0.45, 0.6], np.float32)

    def _missing_hole(self, rng: np.random.Generator) -> None:
        x, y = self.holes[int(rng.integers(4))]
        disc = np.zeros((self.size, self.size), np.uint8)
        cv2.circle(disc, (self._px(x), self._px(y)), self._px(0.06), 1, -1)
        self.image[disc > 0] = self._under_holes[disc > 0]

    def _double_print(self, rng: np.random.Generator) -> None:
        shift = rng.uniform(0.02, 0.035, 2) * rng.choice([-1, 1], 2)
        self._print((float(shift[0]), float(shift[1])))

    def _extra_hole(self, rng: np.random.Generator) -> None:
        """Drill a hole that is perfect in itself; only the part's logic is broken."""
        places = ((0.5, 0.24), (0.5, 0.76), (0.24, 0.5), (0.76, 0.5))
        self._drill(places[int(rng.integers(len(places)))])


def _smooth_noise(rng: np.random.Generator, height: int, width: int, sigma_px: float) -> NDArray[np.float32]:
    noise = cv2.GaussianBlur(rng.standard_normal((height, width), dtype=np.float32), (0, 0), sigma_px)
    return np.asarray(noise / noise.std(), np.float32)


def _to_pixel_format(shades: NDArray[np.float32], fmt: PixelFormat) -> Image:
    rgb = _quantise(shades, fmt)
    if fmt.colour_order:
        ordered: Image = rgb if fmt.colour_order == "RGB" else rgb[..., ::-1].copy()
        return ordered
    if fmt.bayer:
        return mosaic(rgb, fmt.bayer)
    return _quantise(shades @ np.array([0.299, 0.587, 0.114], np.float32), fmt)


def _quantise(shades: NDArray[np.float32], fmt: PixelFormat) -> Image:
    levels = np.rint(shades * fmt.max_value)
    return levels.astype(np.uint8) if fmt.bits == 8 else levels.astype(np.uint16)


class SyntheticCamera:
    """The camera over the simulated line; `source` is KIND/INDEX, so the truth travels with the frame."""

    live: ClassVar[bool] = False
    signals_pass = False

    def __init__(self, options: SyntheticOptions) -> None:
        self._options = options
        self.fires = Fires.ON_COMMAND if options.trigger == "command" else Fires.ITSELF
        self._renderer = PartRenderer(options)
        self._pacer = Pacer(options.rate_fps)
        self._count = 0
        self._unplugged_at = -1

    def open(self) -> CameraInfo:
        """Start the line where it stopped."""
        o = self._options
        return CameraInfo(f"seed {o.seed}", "simulated line", o.width, o.height, o.pixel_format, NEW_IMAGES)

    def ready(self, timeout_s: float) -> bool:
        """Wait until the next part may come."""
        self._check_end()
        return self._pacer.wait(timeout_s)

    def fire(self) -> None:
        """Do nothing: the part is there when it is grabbed."""

    def grab(self, timeout_s: float) -> list[Frame]:
        """Render the next part when it is due; faults come as often as the options say, the same for a seed."""
        self._check_end()
        if self.fires is Fires.ITSELF and not self._pacer.wait(timeout_s):
            return []
        arrived_ns, index = time.monotonic_ns(), self._options.first_index + self._count
        part = self._renderer.render(index)
        source, faults = f"{part.kind}/{index:06d}", self._options.faults
        chance = np.random.default_rng([self._options.seed, index, 1]).random(3)
        if chance[0] < faults.unplugged and self._unplugged_at != index:
            self._unplugged_at = index  # once for each part
            raise CameraLost("the simulated camera was unplugged")
        self._count += 1
        if chance[1] < faults.lost:
            return [Frame(FrameStatus.LOST, source, device_id=index, detail="the simulated camera lost a frame")]
        if chance[2] < faults.incomplete:
            return [Frame(FrameStatus.INCOMPLETE, source, device_id=index, detail="half a simulated buffer")]
        return [
            Frame(
                FrameStatus.COMPLETE,
                source=source,
                image=part.raw,
                pixel_format=self._options.pixel_format,
                device_id=index,
                device_timestamp_ns=arrived_ns,
                arrived_ns=arrived_ns,
            )
        ]

    def signal_pass(self, until_ns: int) -> None:
        """Do nothing: there is no output line."""

    def close(self) -> None:
        """Stop the line; nothing to disconnect."""

    def _check_end(self) -> None:
        if self._options.frames is not None and self._count >= self._options.frames:
            raise EndOfStream
