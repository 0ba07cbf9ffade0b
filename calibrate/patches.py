"""What a teacher learns from: 33×33 px patches, as large as its receptive field, with labels."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from calibrate.augment import LUMA
from calibrate.layouts import DatasetError
from calibrate.procedural import MARK_LABELS, PARAMETERS, program_labels, scene
from drivers.replay import decode_image, decode_or_none, list_images
from pipeline.geometry import RECEPTIVE_FIELD_PX

SCENE_PX = 49
_NEAR_PX = 7
"""A mark counts as present up to this far around the patch's centre (side of the square)."""
_BORDER_PX = 9
_PHOTOGRAPH_PX = 32
_SHIFT_PX = 8
_GREY_PROBABILITY = 0.3
_MIDDLE = RECEPTIVE_FIELD_PX // 2

Patches = NDArray[np.float32]
"""(N, 33, 33, 3), R, G, B, 0 … 1."""


class ProceduralLabels(NamedTuple):
    """What is true of the centre of each patch."""

    field: NDArray[np.int64]
    """(N,), index into FIELDS."""
    shape: NDArray[np.int64]
    """(N,), index into SHAPES."""
    parameters: NDArray[np.float32]
    """(N, SCENE_PARAMETERS), about −1 … 1 each."""
    marks: NDArray[np.float32]
    """(N, SCENE_MARKS), 1 where such a mark, or last a border between grounds, is near."""


SCENE_PARAMETERS = PARAMETERS + 3
"""The program's, and contrast, grain and blur of the scene."""
SCENE_MARKS = MARK_LABELS + 1


@dataclass(frozen=True)
class ProceduralPatches:
    """A pool of small scenes, from which patches are cut at random."""

    images: NDArray[np.uint8]
    """(scenes, SCENE_PX, SCENE_PX, 3)"""
    near: NDArray[np.uint32]
    """(scenes, SCENE_PX, SCENE_PX), a bit for each of SCENE_MARKS."""
    program: NDArray[np.int16]
    """(scenes, SCENE_PX, SCENE_PX)"""
    contrast: NDArray[np.float32]
    """(scenes, SCENE_PX, SCENE_PX)"""
    grain_and_blur: NDArray[np.float32]
    """(scenes, 2)"""

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Patches, ProceduralLabels]:
        """Cut patches out of random scenes at random places."""
        which = rng.integers(len(self.images), size=count)
        top, left = rng.integers(SCENE_PX - RECEPTIVE_FIELD_PX + 1, size=(2, count))
        rows = top[:, None, None] + np.arange(RECEPTIVE_FIELD_PX)[:, None]
        columns = left[:, None, None] + np.arange(RECEPTIVE_FIELD_PX)
        patches = self.images[which[:, None, None], rows, columns] / np.float32(255)
        centre = which, top + _MIDDLE, left + _MIDDLE
        of_program = [program_labels(int(number)) for number in self.program[centre]]
        parameters = np.empty((count, SCENE_PARAMETERS), np.float32)
        parameters[:, :PARAMETERS] = [labels[2] for labels in of_program]
        parameters[:, PARAMETERS] = (self.contrast[centre] + 2.3) / 0.7
        parameters[:, PARAMETERS + 1] = (self.grain_and_blur[which, 0] + 5.4) / 0.9
        parameters[:, PARAMETERS + 2] = self.grain_and_blur[which, 1]
        bits = self.near[centre][:, None] >> np.arange(SCENE_MARKS, dtype=np.uint32)
        labels = ProceduralLabels(
            np.array([labels[0] for labels in of_program], np.int64),
            np.array([labels[1] for labels in of_program], np.int64),
            parameters,
            (bits & 1).astype(np.float32),
        )
        return np.asarray(patches, np.float32), labels


def draw_scenes(count: int, seed: int, on_scene: Callable[[int], None] | None = None) -> ProceduralPatches:
    """Draw a pool of scenes on all processor cores; the same count and seed give the same pool.

    Args:
        count: of scenes.
        seed: of all of them.
        on_scene: told how many are drawn; may raise to stop.
    """
    square = (count, SCENE_PX, SCENE_PX)
    pool = ProceduralPatches(
        images=np.empty((*square, 3), np.uint8),
        near=np.empty(square, np.uint32),
        program=np.empty(square, np.int16),
        contrast=np.empty(square, np.float32),
        grain_and_blur=np.empty((count, 2), np.float32),
    )
    with multiprocessing.get_context("spawn").Pool(initializer=_start_worker) as workers:
        for index, drawn in enumerate(workers.imap(_draw_scene, ((seed, i) for i in range(count)), chunksize=200)):
            pool.images[index], pool.near[index], pool.program[index] = drawn[:3]
            pool.contrast[index], pool.grain_and_blur[index] = drawn[3:]
            if on_scene is not None:
                on_scene(index + 1)
    return pool


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business; it ends the workers
    cv2.setNumThreads(1)


def _draw_scene(
    seed_and_index: tuple[int, int],
) -> tuple[NDArray[np.uint8], NDArray[np.uint32], NDArray[np.int16], NDArray[np.float32], NDArray[np.float32]]:
    drawn = scene(np.random.default_rng(seed_and_index), SCENE_PX)
    near = np.zeros((SCENE_PX, SCENE_PX), np.uint32)
    square = np.ones((_NEAR_PX, _NEAR_PX), np.uint8)
    for label, mark in enumerate(drawn.marks):
        if mark.any():
            near |= cv2.dilate(mark.astype(np.uint8), square).astype(np.uint32) << label
    region, around = drawn.region.astype(np.uint8), np.ones((_BORDER_PX, _BORDER_PX), np.uint8)
    border = cv2.dilate(region, around) != cv2.erode(region, around)
    near |= border.astype(np.uint32) << MARK_LABELS
    return (
        (drawn.image * 255 + 0.5).astype(np.uint8),
        near,
        drawn.program.astype(np.int16),
        drawn.contrast[drawn.region],
        np.array([drawn.grain, drawn.blur_px], np.float32),
    )


@dataclass(frozen=True)
class LabelledPhotographs:
    """Small photographs of things, with what they show."""

    images: NDArray[np.uint8]
    """(N, 32, 32, 3), R, G, B."""
    labels: NDArray[np.int64]
    """(N,)"""
    classes: int

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Patches, NDArray[np.int64]]:
        """Draw patches: shifted by up to 4 px, mirrored, grey by chance."""
        which = rng.integers(len(self.labels), size=count)
        half = _SHIFT_PX // 2
        padded = np.pad(self.images[which], ((0, 0), (half, half), (half, half), (0, 0)), mode="reflect")
        top, left = rng.integers(_PHOTOGRAPH_PX + _SHIFT_PX - RECEPTIVE_FIELD_PX + 1, size=(2, count))
        rows = top[:, None, None] + np.arange(RECEPTIVE_FIELD_PX)[:, None]
        columns = left[:, None, None] + np.arange(RECEPTIVE_FIELD_PX)
        columns = np.where(rng.random(count)[:, None, None] < 0.5, columns[:, :, ::-1], columns)
        patches = np.asarray(padded[np.arange(count)[:, None, None], rows, columns] / np.float32(255), np.float32)
        grey = rng.random(count) < _GREY_PROBABILITY
        patches[grey] = (patches[grey] @ LUMA)[..., None]
        return patches, self.labels[which]


def read_labelled(path: Path) -> LabelledPhotographs:
    """Read labelled photographs: a folder for each class, or an .npz with `jpeg`, `offsets` and `labels`.

    Larger ones are reduced to 32×32 px. Raises DatasetError.
    """
    if path.is_dir():
        folders = sorted(p for p in path.iterdir() if p.is_dir())
        found = [(label, file) for label, folder in enumerate(folders) for _, file in list_images(folder)]
        if len(folders) < 2 or not found:
            raise DatasetError(f"{path.absolute()}: no photographs in at least two folders, one for each class")
        images = [_small(_decode(file)) for _, file in found]
        return LabelledPhotographs(
            np.stack(images), np.array([label for label, _ in found], np.int64), len(folders)
        )
    try:
        with np.load(path, allow_pickle=False) as data:
            jpeg, offsets, labels = data["jpeg"], data["offsets"], data["labels"].astype(np.int64)
        ends = [int(end) for end in offsets]
        if not 0 < len(labels) == len(ends) - 1 or labels.min() < 0:
            raise ValueError(f"{len(labels)} labels from 0 on for {len(ends) - 1} images")
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{path.absolute()}: not an .npz with jpeg, offsets and labels: {error}") from error
    decoded: list[NDArray[np.uint8]] = []
    for start, end in itertools.pairwise(ends):
        image = decode_or_none(jpeg[start:end].tobytes(), cv2.IMREAD_COLOR)
        if image is None:
            raise DatasetError(f"{path.absolute()}: image {len(decoded)} cannot be decoded")
        decoded.append(_small(np.asarray(image, np.uint8)))
    return LabelledPhotographs(np.stack(decoded), labels, int(labels.max()) + 1)


def _decode(file: Path) -> NDArray[np.uint8]:
    try:
        image = decode_image(file)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{file.absolute()}: {error}") from error
    eight = np.asarray(image if image.dtype == np.uint8 else image >> 8, np.uint8)
    return np.repeat(eight[..., None], 3, 2) if eight.ndim == 2 else eight


def _small(bgr: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Turn BGR of any size into RGB of 32×32 px."""
    if bgr.shape[:2] != (_PHOTOGRAPH_PX, _PHOTOGRAPH_PX):
        bgr = np.asarray(cv2.resize(bgr, (_PHOTOGRAPH_PX, _PHOTOGRAPH_PX), interpolation=cv2.INTER_AREA), np.uint8)
    return np.ascontiguousarray(bgr[..., ::-1])


def stack_patches(pieces: Sequence[Patches]) -> Patches:
    """Put patches of several sources into one batch, (N, 3, 33, 33)."""
    return np.ascontiguousarray(np.concatenate(pieces).transpose(0, 3, 1, 2), np.float32)
