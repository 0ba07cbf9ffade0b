"""Procedural images with procedural labels: textures drawn by random programs, with marks on top.

They teach a teacher without a single photograph (after Baradad et al., "Learning to See by Looking at
Noise", 2021, and "Procedural Image Programs for Representation Learning", 2022), and stand in for natural
images in the pretraining penalty. Everything follows from a seed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

PROGRAMS = 384
MARKS = ("blob", "hole", "line", "crack", "ring", "polygon", "frame", "glyph", "speckle", "smear")
MARK_LABELS = 2 * len(MARKS)
"""Each kind of mark, dark and bright."""

FIELDS = ("power", "band", "stripes", "grid", "cells", "facets", "leaves", "dots")
SHAPES = ("none", "abs", "threshold", "sine", "clip")
PARAMETERS = 8
_FIELD_ODDS = (0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
_SHAPE_ODDS = (0.36, 0.16, 0.16, 0.16, 0.16)
_SUBPIXEL_BITS = 4
_LOG_CONTRAST = (math.log(0.03), math.log(0.35))
_LOG_GRAIN = (math.log(0.001), math.log(0.02))

Plane = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Scene:
    """One image with what is known about every pixel."""

    image: Plane
    """(height, width, 3), channels R, G, B, 0 … 1."""
    program: NDArray[np.int64]
    """(height, width), number of the texture program that painted the ground there."""
    marks: NDArray[np.bool_]
    """(MARK_LABELS, height, width), True where a mark of that kind lies; dark ones first."""
    region: NDArray[np.int64]
    """(height, width), number of the ground's piece, 0 … 3."""
    contrast: Plane
    """(pieces,), standard deviation of each ground's shades, natural logarithm."""
    grain: float
    """Standard deviation of the noise, natural logarithm."""
    blur_px: float
    """Standard deviation of the blur, 0 where there is none."""


@dataclass(frozen=True, slots=True)
class _Program:
    """One texture: how its field is made and what is done to it."""

    number: int
    field: str
    shape: str
    angle: float
    frequency: float
    slope: float
    elongation: float
    bandwidth: float
    warp_px: float
    modulated: bool
    density_px: float


@functools.cache
def _program(number: int) -> _Program:
    rng = np.random.default_rng([7919, number])
    return _Program(
        number=number,
        field=str(rng.choice(FIELDS, p=_FIELD_ODDS)),
        shape=str(rng.choice(SHAPES, p=_SHAPE_ODDS)),
        angle=float(rng.uniform(0, math.pi)),
        frequency=float(np.exp(rng.uniform(math.log(0.05), math.log(0.33)))),
        slope=float(rng.uniform(0.2, 1.8)),
        elongation=float(np.exp(rng.uniform(0, math.log(12)))) if rng.random() < 0.6 else 1.0,
        bandwidth=float(rng.uniform(0.15, 0.7)),
        warp_px=float(rng.uniform(1, 4)) if rng.random() < 0.4 else 0.0,
        modulated=bool(rng.random() < 0.25),
        density_px=float(np.exp(rng.uniform(math.log(3.5), math.log(11)))),
    )


def scene(rng: np.random.Generator, side_px: int) -> Scene:
    """Draw one scene: one to four textured grounds under uneven light, with marks on them."""
    grounds = 1 if rng.random() < 0.6 else int(rng.integers(2, 5))
    numbers = rng.integers(PROGRAMS, size=grounds)
    region = _regions(rng, side_px, grounds)
    image = np.zeros((side_px, side_px, 3), np.float32)
    contrast = np.asarray(rng.uniform(*_LOG_CONTRAST, size=grounds), np.float32)
    for index, number in enumerate(numbers):
        here = region == index
        if here.any():
            painted = _paint(rng, texture(rng, int(number), side_px), math.exp(contrast[index]))
            image[here] = painted[here]
    marks = np.zeros((MARK_LABELS, side_px, side_px), np.bool_)
    for _ in range(int(rng.poisson(0.9 + 6 * (side_px / 160) ** 2))):
        _add_mark(rng, image, marks)
    light = 1 + rng.uniform(0, 0.25) * _power_noise(rng, side_px, 3.0)
    image *= light[..., None]
    blur_px = float(rng.uniform(0.5, 1.6)) if rng.random() < 0.3 else 0.0
    if blur_px:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), blur_px), np.float32)
    grain = float(rng.uniform(*_LOG_GRAIN))
    noise = rng.standard_normal((side_px, side_px, 1 if rng.random() < 0.5 else 3), np.float32)
    image += np.float32(math.exp(grain)) * noise
    np.clip(image, 0, 1, out=image)
    return Scene(image, numbers[region], marks, region, contrast, grain, blur_px)


@functools.cache
def program_labels(number: int) -> tuple[int, int, tuple[float, ...]]:
    """Say what program `number` does: kind of field, kind of shape, and its parameters, each about −1 … 1."""
    p = _program(number)
    steep = min(p.elongation - 1, 1.0)
    parameters = (
        math.cos(2 * p.angle) * steep,
        math.sin(2 * p.angle) * steep,
        (math.log(p.frequency) + 2.05) / 0.95,
        (math.log(p.density_px) - 1.83) / 0.6,
        p.slope - 1.0,
        math.log(p.elongation) - 1,
        p.warp_px / 2 - 0.5,
        float(p.modulated),
    )
    return FIELDS.index(p.field), SHAPES.index(p.shape), parameters


def texture(rng: np.random.Generator, number: int, side_px: int) -> Plane:
    """Draw program `number` once; (side, side), mean 0, standard deviation 1."""
    program = _program(number)
    plane = _field(rng, program, side_px)
    if program.warp_px:
        plane = _warp(rng, plane, program.warp_px)
    plane = _standardise(plane)
    if program.shape == "abs":
        plane = np.abs(plane)
    elif program.shape == "threshold":
        plane = (plane > program.slope - 1.0).astype(np.float32)
    elif program.shape == "sine":
        plane = np.sin(np.float32(2 + 2 * program.bandwidth) * plane)
    elif program.shape == "clip":
        plane = np.clip(plane, -0.5, 3)
    if program.modulated:
        plane = _standardise(plane) * (1 + _power_noise(rng, side_px, 2.0))
    return _standardise(plane)


def natural_like(rng: np.random.Generator, side_px: int) -> NDArray[np.uint8]:
    """Draw an image to stand in for a natural one; (side, side, 3) as BGR, 8 bits."""
    image = scene(rng, side_px).image
    return np.ascontiguousarray((image[..., ::-1] * 255 + 0.5).astype(np.uint8))


def _standardise(plane: Plane) -> Plane:
    spread = float(plane.std())
    return np.asarray((plane - plane.mean()) / max(spread, 1e-4), np.float32)


def _field(rng: np.random.Generator, program: _Program, side: int) -> Plane:
    if program.field in ("power", "band"):
        spectrum = _spectrum(program.number, side)
        noise = np.fft.rfft2(rng.standard_normal((side, side), np.float32))
        return np.asarray(np.fft.irfft2(noise * spectrum, s=(side, side)), np.float32)
    if program.field in ("stripes", "grid"):
        return _stripes(rng, program, side)
    if program.field in ("cells", "facets"):
        return _cells(rng, program, side)
    if program.field == "leaves":
        return _leaves(rng, program, side)
    return _dots(rng, program, side)


@functools.cache
def _spectrum(number: int, side: int) -> Plane:
    program = _program(number)
    v, u = np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij")
    cos, sin = math.cos(program.angle), math.sin(program.angle)
    along, across = u * cos + v * sin, (v * cos - u * sin) / program.elongation
    radius = np.hypot(along, across) + 1 / side
    if program.field == "power":
        return np.asarray(radius**-program.slope, np.float32)
    octaves = np.log2(radius / program.frequency) / program.bandwidth
    return np.asarray(np.exp(-0.5 * octaves**2), np.float32)


@functools.cache
def _slope_filter(slope: float, side: int) -> Plane:
    v, u = np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij")
    radius = np.hypot(u, v)
    radius[0, 0] = np.inf
    return np.asarray(radius**-slope, np.float32)


def _power_noise(rng: np.random.Generator, side: int, slope: float) -> Plane:
    """Draw smooth noise, mean 0, about within -1 … 1."""
    noise = np.fft.rfft2(rng.standard_normal((side, side), np.float32))
    plane = np.fft.irfft2(noise * _slope_filter(slope, side), s=(side, side))
    return np.asarray(np.tanh(0.6 * _standardise(np.asarray(plane, np.float32))), np.float32)


@functools.cache
def _grid(side: int) -> tuple[Plane, Plane]:
    y, x = np.mgrid[:side, :side].astype(np.float32)
    return x, y


def _stripes(rng: np.random.Generator, program: _Program, side: int) -> Plane:
    x, y = _grid(side)
    angle = program.angle + rng.uniform(-0.1, 0.1)
    frequency = program.frequency * rng.uniform(0.9, 1.1)

    def wave(turn: float) -> Plane:
        cos, sin = math.cos(angle + turn), math.sin(angle + turn)
        phase = np.float32(rng.uniform(0, 2 * math.pi))
        plane = np.sin(np.float32(2 * math.pi * frequency) * (np.float32(cos) * x + np.float32(sin) * y) + phase)
        return np.asarray(plane, np.float32)

    if program.field == "stripes":
        return wave(0.0)
    other = wave(math.pi / 2 if program.elongation < 2 else math.pi / 3)
    return np.maximum(wave(0.0), other) if program.bandwidth < 0.4 else wave(0.0) * other


def _cells(rng: np.random.Generator, program: _Program, side: int) -> Plane:
    count = max(4, int((side / program.density_px) ** 2))
    seeds = np.ones((side, side), np.uint8)
    seeds[rng.integers(side, size=count), rng.integers(side, size=count)] = 0
    distance, labels = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_CCOMP)
    if program.field == "cells":
        return np.asarray(distance, np.float32)
    shades = rng.standard_normal(int(labels.max()) + 1, np.float32)
    return np.asarray(shades[labels], np.float32)


def _leaves(rng: np.random.Generator, program: _Program, side: int) -> Plane:
    plane = np.zeros((side, side), np.float32)
    largest = program.density_px
    for _ in range(min(500, int(5 * (side / largest) ** 2))):
        x, y = (int(v) for v in rng.integers(side, size=2))
        size = largest * rng.uniform(0.25, 1.0)
        shade = float(rng.standard_normal())
        if program.bandwidth < 0.4:
            cv2.circle(plane, (x, y), max(1, int(size)), shade, -1)
        else:
            turn = math.degrees(program.angle) + rng.uniform(-8, 8)
            box = cv2.boxPoints(((x, y), (size * 2, size * 2 / program.elongation), turn))
            cv2.fillConvexPoly(plane, box.astype(np.int32), shade)
    return plane


def _dots(rng: np.random.Generator, program: _Program, side: int) -> Plane:
    x, y = _grid(side)
    pitch = max(5.0, program.density_px)
    cos, sin = math.cos(program.angle), math.sin(program.angle)
    shift = rng.uniform(0, pitch, 2)
    u = np.mod(np.float32(cos) * x + np.float32(sin) * y + np.float32(shift[0]), np.float32(pitch)) - pitch / 2
    v = np.mod(np.float32(cos) * y - np.float32(sin) * x + np.float32(shift[1]), np.float32(pitch)) - pitch / 2
    radius = np.float32(pitch * (0.15 + 0.35 * program.bandwidth))
    return np.asarray(1 / (1 + np.exp(np.clip(2 * (np.hypot(u, v) - radius), -20, 20))), np.float32)


def _warp(rng: np.random.Generator, plane: Plane, amount_px: float) -> Plane:
    x, y = _grid(plane.shape[0])
    dx, dy = (_power_noise(rng, plane.shape[0], 2.2) * np.float32(amount_px) for _ in range(2))
    return np.asarray(
        cv2.remap(plane, x + dx, y + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101), np.float32
    )


def _regions(rng: np.random.Generator, side: int, count: int) -> NDArray[np.int64]:
    """Divide the image into `count` pieces along straight, curved or ragged borders."""
    x, y = _grid(side)
    if count == 1:
        return np.zeros((side, side), np.int64)
    if rng.random() < 0.5:
        centres = rng.uniform(0, side, (count, 2)).astype(np.float32)
        bend = np.float32(rng.uniform(0, 25)) * _power_noise(rng, side, 2.2)
        return np.asarray(
            np.argmin([np.hypot(x - cx + bend, y - cy - bend) for cx, cy in centres], axis=0), np.int64
        )
    region = np.zeros((side, side), np.int64)
    for index in range(1, count):
        angle, offset = rng.uniform(0, 2 * math.pi), rng.uniform(-0.4, 0.4) * side
        where = math.cos(angle) * (x - side / 2) + math.sin(angle) * (y - side / 2) > offset
        region[where] = index
    return region


def _paint(rng: np.random.Generator, plane: Plane, contrast: float) -> Plane:
    """Give a texture its shades: level, contrast and, in four of ten cases, colour."""
    level = rng.uniform(0.08, 0.92)
    if rng.random() < 0.6:
        return np.repeat((np.float32(level) + np.float32(contrast) * plane)[..., None], 3, axis=2)
    base = np.clip(level + 0.2 * rng.standard_normal(3), 0.02, 0.98).astype(np.float32)
    axis = (np.float32(contrast) * (1 + 0.7 * rng.standard_normal(3))).astype(np.float32)
    return np.asarray(base + plane[..., None] * axis, np.float32)


def _add_mark(rng: np.random.Generator, image: Plane, marks: NDArray[np.bool_]) -> None:
    """Draw one mark into the image and its place into the labels."""
    side = image.shape[0]
    kind = int(rng.integers(len(MARKS)))
    cover = _mark_cover(rng, MARKS[kind], side)
    strength = math.exp(rng.uniform(math.log(0.12), math.log(0.95)))
    bright = rng.random() < 0.5
    tint = np.ones(3, np.float32)
    if rng.random() < 0.3:
        tint = np.clip(1 + 0.5 * rng.standard_normal(3), 0, 2).astype(np.float32)
    weight = cover[..., None] * np.float32(strength)
    goal = tint if bright else 1 - tint
    image += weight * (goal - image)
    marks[kind + (len(MARKS) if bright else 0)] |= cover > 0.35


def _mark_cover(rng: np.random.Generator, kind: str, side: int) -> Plane:
    """Return how much of each pixel the mark covers, 0 … 1."""
    canvas = np.zeros((side, side), np.uint8)
    centre = rng.uniform(0, side, 2)
    size = math.exp(rng.uniform(math.log(1.5), math.log(18)))
    angle = rng.uniform(0, 2 * math.pi)
    scale = 1 << _SUBPIXEL_BITS
    thickness = int(rng.integers(1, 4))

    def points(values: NDArray[np.float64]) -> NDArray[np.int32]:
        return np.round(values * scale).astype(np.int32)

    soft = 0.0
    if kind in ("blob", "smear"):
        x, y = _grid(side)
        long = size * (rng.uniform(2, 5) if kind == "smear" else rng.uniform(1, 1.6))
        dx, dy = x - np.float32(centre[0]), y - np.float32(centre[1])
        along = (math.cos(angle) * dx + math.sin(angle) * dy) / long
        across = (math.cos(angle) * dy - math.sin(angle) * dx) / size
        return np.asarray(np.exp(-0.5 * np.minimum(along**2 + across**2, 40)), np.float32)
    if kind in ("hole", "ring"):
        axes = points(np.array([size * rng.uniform(1, 1.5), size]))
        at, width = points(centre), -1 if kind == "hole" else thickness
        cv2.ellipse(
            canvas, at.tolist(), axes.tolist(), math.degrees(angle), 0, 360, 255, width, cv2.LINE_AA, _SUBPIXEL_BITS
        )
        soft = rng.uniform(0, 1.2) if kind == "hole" else 0.0
    elif kind == "line":
        reach = rng.uniform(8, 0.7 * side) * np.array([math.cos(angle), math.sin(angle)])
        start, end = points(centre - reach), points(centre + reach)
        cv2.line(canvas, start.tolist(), end.tolist(), 255, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
    elif kind == "crack":
        steps = int(rng.integers(6, 40))
        turns = angle + np.cumsum(rng.normal(0, rng.uniform(0.1, 0.6), steps))
        walk = centre + np.cumsum(rng.uniform(2, 5) * np.stack([np.cos(turns), np.sin(turns)], 1), axis=0)
        cv2.polylines(canvas, [points(walk)], False, 255, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
    elif kind in ("polygon", "frame"):
        corners = int(rng.integers(3, 7))
        around = angle + np.sort(rng.uniform(0, 2 * math.pi, corners))
        outline = points(centre + 1.5 * size * np.stack([np.cos(around), np.sin(around)], 1))
        if kind == "polygon":
            cv2.fillPoly(canvas, [outline], 255, cv2.LINE_AA, _SUBPIXEL_BITS)
        else:
            cv2.polylines(canvas, [outline], True, 255, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
    elif kind == "glyph":
        text = "".join(chr(int(c)) for c in rng.integers(48, 91, int(rng.integers(1, 5))))
        place = (int(centre[0]), int(centre[1]))
        cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.25 + size / 20, 255, thickness, cv2.LINE_AA)
    else:
        spots = centre + size * 1.5 * rng.standard_normal((int(rng.integers(4, 25)), 2))
        for spot in points(spots):
            cv2.circle(
                canvas, spot.tolist(), int(scale * rng.uniform(0.5, 1.6)), 255, -1, cv2.LINE_AA, _SUBPIXEL_BITS
            )
    if soft:
        canvas = np.asarray(cv2.GaussianBlur(canvas, (0, 0), 0.3 + soft), np.uint8)
    return np.asarray(canvas / np.float32(255), np.float32)
