"""Find the images of a data set, split off held-out ones, and load them as the networks will see them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from drivers.frame import Frame, FrameStatus, Image, PixelFormat
from drivers.replay import decode_image, format_of, list_images
from pipeline.preprocess import Preprocessor

MAX_CORRUPT_SHARE = 0.05


class DatasetError(Exception):
    """A data set that cannot be used; the message says what is wrong and what would be right."""


class ImageFile(NamedTuple):
    """One file of a data set."""

    name: str
    """Relative to the data set, POSIX style."""
    path: Path


@dataclass(frozen=True, slots=True)
class GoodImages:
    """Good images, split into those to train on and those held out for quantiles and threshold."""

    train: list[ImageFile]
    held_out: list[ImageFile]
    corrupt: list[tuple[str, str]]
    """Names and reasons of files that were skipped."""
    fingerprint: str
    """SHA-256 over names and contents of all usable files."""
    pixel_formats: list[str]
    """Pixel formats among them."""


class TestImage(NamedTuple):
    """One image of a test set with what is known of it."""

    file: ImageFile
    kind: str
    """`good`, or the kind of defect: the folder's name."""


def good_folder(dataset: Path) -> Path:
    """Return the folder of good training images: MVTec AD's `train/good`, else the folder itself."""
    nested = dataset / "train" / "good"
    return nested if nested.is_dir() else dataset


def load_good_images(
    dataset: Path, held_out_share: float, seed: int, fit: Callable[[Image], PixelFormat] = format_of
) -> GoodImages:
    """List, verify and split the good images.

    Args:
        dataset: a folder of good images, or an MVTec-AD-style tree with `train/good`.
        held_out_share: share of the images that training never sees, at least one image.
        seed: of the shuffle.
        fit: names an image's pixel format, or raises ValueError when the image does not fit the run.

    Raises:
        DatasetError: no folder, fewer than two usable images, more than 5% unreadable files, or a readable
            image that does not fit.
    """
    folder = good_folder(dataset)
    if not folder.is_dir():
        raise DatasetError(f"{dataset.absolute()}: no such folder")
    if not (dataset / "train" / "good").is_dir() and (dataset / "test").is_dir():
        raise DatasetError(f"{dataset.absolute()}: has test/ but no train/good/ with good images to learn from")
    usable: list[ImageFile] = []
    corrupt: list[tuple[str, str]] = []
    digest = hashlib.sha256()
    formats: set[str] = set()
    for name, path in list_images(folder):
        try:
            image = decode_image(path)
            contents = path.read_bytes()
        except (OSError, ValueError) as error:
            corrupt.append((name, str(error)))
            continue
        try:
            formats.add(fit(image).value)
        except ValueError as error:
            raise DatasetError(f"{path.absolute()}: {error}") from error
        digest.update(name.encode() + b"\0" + hashlib.sha256(contents).digest())
        usable.append(ImageFile(name, path))
    if len(usable) < 2:
        raise DatasetError(
            f"{folder.absolute()}: {len(usable)} usable images ({len(corrupt)} unreadable). Training needs at "
            "least 2 good images, one of them held out for quantiles and threshold; 20 or more are advised"
        )
    if len(corrupt) > MAX_CORRUPT_SHARE * (len(usable) + len(corrupt)):
        listed = "\n".join(f"  {name}: {why}" for name, why in corrupt[:10])
        raise DatasetError(
            f"{folder.absolute()}: {len(corrupt)} of {len(usable) + len(corrupt)} files cannot be read, more "
            f"than {MAX_CORRUPT_SHARE:.0%}:\n{listed}"
        )
    order = np.random.default_rng([seed, 0]).permutation(len(usable))
    count = min(len(usable) - 1, max(1, round(held_out_share * len(usable))))
    held_out = sorted(order[:count].tolist())
    train = sorted(order[count:].tolist())
    return GoodImages(
        [usable[i] for i in train], [usable[i] for i in held_out], corrupt, digest.hexdigest(), sorted(formats)
    )


def load_test_images(dataset: Path) -> list[TestImage]:
    """List test images by kind.

    Args:
        dataset: an MVTec-AD-style tree with `test/KIND/`, or a folder with `good/` and other kinds.

    Raises DatasetError when there is no such layout, no good or no defective image.
    """
    root = dataset / "test" if (dataset / "test").is_dir() else dataset
    if not (root / "good").is_dir():
        raise DatasetError(f"{root.absolute()}: no folder `good` beside the folders of defects")
    kinds = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name not in ("train", "ground_truth"))
    images = [
        TestImage(ImageFile(f"{kind}/{name}", path), kind)
        for kind in kinds
        for name, path in list_images(root / kind)
    ]
    good = sum(image.kind == "good" for image in images)
    if good == 0 or good == len(images):
        raise DatasetError(
            f"{root.absolute()}: {good} good and {len(images) - good} defective images; both are needed"
        )
    return images


def read_frame(file: ImageFile, pixel_format: PixelFormat | None = None) -> Frame:
    """Read one file as the frame that the replay driver would deliver. Raises OSError or ValueError."""
    image = decode_image(file.path)
    return Frame(FrameStatus.COMPLETE, file.name, image=image, pixel_format=format_of(image, pixel_format))


class PreparedImages:
    """Network inputs of a list of files, each decoded once while the memory budget lasts."""

    def __init__(
        self,
        files: Sequence[ImageFile],
        preprocess: Preprocessor,
        pixel_format: PixelFormat | None,
        budget_mib: int,
    ) -> None:
        self._files = files
        self._preprocess = preprocess
        self._pixel_format = pixel_format
        self._cache: dict[int, NDArray[np.float32]] = {}
        image_bytes = 12 * preprocess.spec.width * preprocess.spec.height
        self._cacheable = budget_mib * 2**20 // image_bytes

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> NDArray[np.float32]:
        """Return (3, height, width) float32. Raises DatasetError naming the file that does not fit."""
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        file = self._files[index]
        try:
            image: Image = decode_image(file.path)
            prepared = self._preprocess(image, format_of(image, self._pixel_format))
        except (OSError, ValueError) as error:
            raise DatasetError(f"{file.path.absolute()}: {error}") from error
        if len(self._cache) < self._cacheable:
            self._cache[index] = prepared
        return prepared
