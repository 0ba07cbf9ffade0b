"""Where a data set keeps its images and masks: MVTec AD, MVTec LOCO, VisA, MTD, or plain folders."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from drivers.replay import decode_or_none, list_images, readable
from pipeline.bundle import MANIFEST, is_bundle

GOOD = "good"
VALIDATION = "validation/good/"
"""What names of a data set's own held-out images begin with."""
_MTD_GOOD = "MT_Free"
_MTD_TRAIN_SHARE = 0.7
_MTD_NAME = re.compile(r"exp(\d+)_num_(\d+)")
_MTD_NEXT_EXPOSURE = 60
"""Numbers of a tile's consecutive photographs are nearer than this."""
_VISA_SPLIT = Path("split_csv") / "1cls.csv"
REPORT_PAGE = "report.html"
REPORT_MARK = b'<meta name="generator" content="inspectord">'
_NOT_KINDS = {"train", "validation", "ground_truth"}
_NOT_GOOD = {"ground_truth", "test", "train", "masks", "anomaly", "good", "ok", "ng", "bad", "defect", "defects"}
"""Folders, in small letters, that no folder with nothing but good images holds."""


class DatasetError(Exception):
    """A data set that cannot be used; the message says what is wrong and what would be right."""


class Layout(StrEnum):
    """How a data set is laid out."""

    MVTEC_AD = "MVTec AD"
    MVTEC_LOCO = "MVTec LOCO"
    VISA = "VisA"
    MTD = "MTD"
    FOLDERS = "good and defect folders"
    IMAGES = "a folder of images"


class ImageFile(NamedTuple):
    """One file of a data set."""

    name: str
    """Relative to the data set, POSIX style."""
    path: Path
    part: str | None = None
    """Which part it shows, where the data set tells; None: one that no other file shows."""


class TestImage(NamedTuple):
    """One image of a test set with what is known of it."""

    file: ImageFile
    kind: str
    """`good`, or the kind of defect."""
    masks: tuple[Path, ...] = ()
    """Files in which the defect is not black; several in MVTec LOCO, one for each defect."""


@dataclass(frozen=True, slots=True)
class Saturation:
    """From which area on a LOCO defect counts as found (Bergmann et al. 2022, section 4)."""

    threshold: float
    relative: bool
    """The threshold is a share of the defect's area, else a number of pixels."""

    def area_px(self, defect_px: int) -> float:
        """Return the saturation area of a defect, at least one pixel, at most the whole defect."""
        area = int(self.threshold * defect_px) if self.relative else self.threshold
        return float(min(max(area, 1), defect_px))


@dataclass(frozen=True, slots=True)
class TestSet:
    """Images with known truth."""

    layout: Layout
    images: list[TestImage]
    saturation: dict[int, Saturation] = field(default_factory=dict)
    """LOCO: by the grey value of the defect in its mask."""


@dataclass(frozen=True, slots=True)
class TrainingFiles:
    """Good images to learn from."""

    layout: Layout
    good: list[ImageFile]
    validation: list[ImageFile]
    """Good images that the data set sets aside; empty: a share of `good` is held out."""


def layout_of(dataset: Path) -> Layout:
    """Recognise a data set's layout. Raises DatasetError when there is no such folder."""
    dataset = dataset.resolve()
    if not dataset.is_dir():
        raise DatasetError(f"{dataset}: no such folder")
    if (dataset / "defects_config.json").is_file():
        return Layout.MVTEC_LOCO
    if (dataset / "test").is_dir() or (dataset / "train" / GOOD).is_dir():
        return Layout.MVTEC_AD
    if (dataset.parent / _VISA_SPLIT).is_file() or (dataset / _VISA_SPLIT).is_file():
        return Layout.VISA
    if (dataset / _MTD_GOOD).is_dir():
        return Layout.MTD
    if (dataset / GOOD).is_dir():
        return Layout.FOLDERS
    _refuse_a_folder_of_data_sets(dataset)
    return Layout.IMAGES


def _refuse_a_folder_of_data_sets(folder: Path) -> None:
    """Refuse to take defects and masks for good parts. Raises DatasetError."""
    for path in sorted(folder.glob("*")) + sorted(folder.glob("*/*")):
        if path.is_dir() and (path.name.lower() in _NOT_GOOD or path.name.startswith("MT_")):
            raise DatasetError(
                f"{folder}: looks like several data sets or a part of one (it holds {path.relative_to(folder)}); "
                f"name one data set (good parts in {GOOD}/, in small letters, each kind of defect beside it), or a "
                "folder with nothing but good images"
            )


def refuse_among_images(folder: Path, files: Iterable[ImageFile]) -> None:
    """Refuse to write a bundle or a report among a data set's images: they would not be found there any more.

    Raises DatasetError.
    """
    inside = folder.resolve()
    for file in files:
        beside = file.path.parent.resolve()  # an image may be a link to one elsewhere
        if inside in (beside, *beside.parents, *file.path.resolve().parents):
            raise DatasetError(
                f"{folder.absolute()} holds images of the data set ({file.name}); write to a folder of its own"
            )


def training_files(dataset: Path) -> TrainingFiles:
    """List the good images to learn from; a plain folder of images counts as good.

    Raises DatasetError.
    """
    layout, dataset = layout_of(dataset), dataset.resolve()
    validation: list[ImageFile] = []
    if layout in (Layout.MVTEC_AD, Layout.MVTEC_LOCO):
        folder = dataset / "train" / GOOD
        if not folder.is_dir():
            raise DatasetError(f"{dataset.absolute()}: has test/ but no train/good/ with good images to learn from")
        good = _files(folder)
        if (dataset / VALIDATION).is_dir():
            validation = _files(dataset / VALIDATION, VALIDATION)
    elif layout is Layout.VISA:
        good = [ImageFile(row.name, row.image) for row in _visa_rows(dataset) if row.train]
    elif layout is Layout.MTD:
        good, _ = _mtd_good(dataset)
    else:
        good = _files(dataset / GOOD if layout is Layout.FOLDERS else dataset)
    return TrainingFiles(layout, good, validation)


def load_test_set(dataset: Path) -> TestSet:
    """List test images by kind with their masks.

    Raises DatasetError when the layout is not known, or no good or no defective image is there.
    """
    layout, dataset = layout_of(dataset), dataset.resolve()
    saturation: dict[int, Saturation] = {}
    if layout is Layout.VISA:
        images = [
            TestImage(ImageFile(r.name, r.image), r.kind, r.masks) for r in _visa_rows(dataset) if not r.train
        ]
    elif layout is Layout.MTD:
        images = _mtd_test(dataset)
    elif layout is Layout.MVTEC_LOCO:
        if not (dataset / "test").is_dir():
            raise DatasetError(f"{dataset}: has defects_config.json but no test/ with images of known truth")
        images = _tree(dataset / "test", dataset / "ground_truth")
        saturation = _read_saturation(dataset / "defects_config.json")
    else:
        inside = layout is Layout.MVTEC_AD and (dataset / "test").is_dir()
        images = _tree(dataset / "test" if inside else dataset, dataset / "ground_truth")
    good = sum(image.kind == GOOD for image in images)
    if good == 0 or good == len(images):
        raise DatasetError(
            f"{dataset.absolute()} ({layout}): {good} good and {len(images) - good} defective test images; both "
            "are needed. Known layouts: MVTec AD, MVTec LOCO, VisA, MTD, or a folder good/ beside other kinds"
        )
    return TestSet(layout, images, saturation)


@dataclass(frozen=True, slots=True)
class Defect:
    """One defect of one image, as the metrics count it."""

    mask: NDArray[np.bool_]
    """(height, width)."""
    saturation_px: float
    """From this area on it counts as found; its whole area unless the data set says less."""


def read_defects(
    test_set: TestSet,
    image: TestImage,
    shape: tuple[int, int],
    window: tuple[slice, slice] = (slice(None), slice(None)),
) -> tuple[list[Defect], list[Defect]]:
    """Read an image's masks.

    Args:
        test_set: it belongs to.
        image: which one.
        shape: (height, width) of the image; masks of another size are refused.
        window: the rows and columns to look at.

    Returns:
        The 8-connected regions of all masks together (what PRO counts), and one defect a file with its
        saturation area (what sPRO counts; empty without saturation thresholds).

    Raises DatasetError.
    """
    union = np.zeros(shape, np.bool_)[window]
    saturating = []
    for path in image.masks:
        grey = read_labels(path)
        if grey.shape != shape:
            raise DatasetError(f"{path.absolute()}: mask is {grey.shape[::-1]} px, its image {shape[::-1]}")
        mask = np.asarray(grey > 0)[window]
        union |= mask
        if test_set.saturation and mask.any():
            value = int(grey.max())
            if value not in test_set.saturation:
                raise DatasetError(f"{path.absolute()}: grey value {value} is not in defects_config.json")
            area = test_set.saturation[value].area_px(int(mask.sum()))
            saturating.append(Defect(mask, area))
    count, labels = cv2.connectedComponents(union.astype(np.uint8), connectivity=8)
    regions = [labels == label for label in range(1, count)]
    return [Defect(region, float(region.sum())) for region in regions], saturating


def read_labels(path: Path) -> NDArray[np.uint16]:
    """Read a mask's values as they are, 8 or 16 bits, the largest of its colours; (height, width).

    Raises DatasetError.
    """
    try:  # not imread, which dies of a name that is not UTF-8
        pixels = decode_or_none(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"{path.absolute()}: {error.strerror}") from error
    if pixels is None:
        raise DatasetError(f"{path.absolute()}: not a readable image")
    if pixels.ndim == 3:
        pixels = pixels[..., :3].max(axis=2)  # a fourth channel is opacity
    return np.asarray(pixels, np.uint16)


def _files(folder: Path, prefix: str = "") -> list[ImageFile]:
    """List a folder's images, those of bundles and reports inside it left out."""
    ours = {file.parent for name in (MANIFEST, REPORT_PAGE) for file in folder.rglob(name) if _is_ours(file.parent)}
    return [
        ImageFile(prefix + name, path)
        for name, path in list_images(folder)
        if not ours or not ours & set(path.parents)
    ]


def _is_ours(folder: Path) -> bool:
    """Tell whether a folder holds a bundle or one of our reports, whose pictures are no data."""
    page = folder / REPORT_PAGE
    return is_bundle(folder) or (page.is_file() and REPORT_MARK in page.read_bytes())


def _tree(root: Path, truth: Path) -> list[TestImage]:
    """List KIND/NAME.png with masks in truth/KIND/NAME_mask.png, NAME.png, or NAME/*.png."""
    folders = (p for p in root.iterdir() if p.is_dir() and p.name not in _NOT_KINDS)
    kinds = sorted(folder for folder in folders if not (_is_ours(folder) or folder.name.startswith(".")))
    return [
        TestImage(
            file,
            readable(kind.name),
            () if kind.name == GOOD else _masks(truth / kind.name, file.path.relative_to(kind)),
        )
        for kind in kinds
        for file in _files(kind, f"{readable(kind.name)}/")
    ]


def _masks(folder: Path, name: Path) -> tuple[Path, ...]:
    stem = folder / name.with_suffix("")
    if stem.is_dir():
        return tuple(sorted(stem.glob("*.png")))
    for candidate in (stem.with_name(stem.name + "_mask.png"), stem.with_name(stem.name + ".png")):
        if candidate.is_file():
            return (candidate,)
    return ()


def _read_saturation(path: Path) -> dict[int, Saturation]:
    try:
        entries = json.loads(path.read_text())
        return {
            int(e["pixel_value"]): Saturation(float(e["saturation_threshold"]), bool(e["relative_saturation"]))
            for e in entries
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path.absolute()}: not MVTec LOCO's list of defects: {error!r}") from error


class _VisaRow(NamedTuple):
    name: str
    image: Path
    kind: str
    train: bool
    masks: tuple[Path, ...]


def _visa_rows(dataset: Path) -> Iterable[_VisaRow]:
    """Read split_csv/1cls.csv (object,split,label,image,mask) for the object that `dataset` names."""
    root = dataset.parent if (dataset.parent / _VISA_SPLIT).is_file() else dataset
    path = root / _VISA_SPLIT
    rows = _read_csv(path, ("object", "split", "label", "image", "mask"))
    objects = sorted({row["object"] for row in rows})
    wanted = dataset.name
    if root == dataset:
        if len(objects) != 1:
            raise DatasetError(f"{dataset.absolute()}: name one of its objects, as {dataset / objects[0]}")
        wanted = objects[0]
    if wanted not in objects:
        raise DatasetError(f"{path.absolute()}: no object {wanted!r}; it lists {', '.join(objects)}")
    kinds = {}
    annotation = root / wanted / "image_anno.csv"
    if annotation.is_file():
        kinds = {row["image"]: row["label"] for row in _read_csv(annotation, ("image", "label"))}
    for row in rows:
        if row["object"] == wanted:
            kind = GOOD if row["label"] == "normal" else kinds.get(row["image"], "anomaly")
            masks = (root / row["mask"],) if row["mask"] and kind != GOOD else ()
            yield _VisaRow(row["image"], root / row["image"], kind, row["split"] == "train", masks)


def _read_csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise DatasetError(f"{path.absolute()}: not a readable CSV file: {error}") from error
    if not rows:
        raise DatasetError(f"{path.absolute()}: no rows")
    for number, row in enumerate(rows, start=2):
        missing = [name for name in columns if row.get(name) is None]
        if missing:
            raise DatasetError(f"{path.absolute()}: row {number} has no {', '.join(missing)}")
    return rows


def _mtd_files(dataset: Path, kind: str) -> list[ImageFile]:
    """List MT_KIND/Imgs/*.jpg; a PNG of the same name is the mask, not an image."""
    folder = dataset / kind / "Imgs"
    if not folder.is_dir():
        raise DatasetError(f"{folder.absolute()}: no such folder; MTD keeps its images there")
    return [ImageFile(f"{kind}/{name}", path) for name, path in list_images(folder) if path.suffix != ".png"]


def _mtd_good(dataset: Path) -> tuple[list[ImageFile], list[ImageFile]]:
    """Split MTD's good images, for it has no split of its own: those of 70% of the tiles are for training.

    A tile was photographed at up to six exposures, one soon after the other: expEXPOSURE_num_NUMBER.jpg.
    """
    named = [(_MTD_NAME.fullmatch(file.path.stem), file) for file in _mtd_files(dataset, _MTD_GOOD)]
    numbered = sorted((int(name[2]), int(name[1]), file) for name, file in named if name is not None)
    tiles = [[file] for name, file in named if name is None]
    seen: set[int] = set()
    last = -math.inf
    for number, exposure, file in numbered:
        if exposure in seen or number - last > _MTD_NEXT_EXPOSURE:
            tiles.append([])
            seen = set()
        tiles[-1].append(file)
        seen.add(exposure)
        last = number
    sides: tuple[list[ImageFile], list[ImageFile]] = ([], [])
    for tile in tiles:
        first = hashlib.sha256(tile[0].path.name.encode()).digest()[0]
        sides[first >= _MTD_TRAIN_SHARE * 256].extend(file._replace(part=tile[0].name) for file in tile)
    return sides


def _mtd_test(dataset: Path) -> list[TestImage]:
    images = [TestImage(file, GOOD) for file in _mtd_good(dataset)[1]]
    for folder in sorted(dataset.glob("MT_*")):
        if folder.is_dir() and folder.name != _MTD_GOOD:
            kind = folder.name.removeprefix("MT_").lower()
            for file in _mtd_files(dataset, folder.name):
                mask = file.path.with_suffix(".png")
                images.append(TestImage(file, kind, (mask,) if mask.is_file() else ()))
    return images
