"""Verify good images, split off held-out ones, and load them as the networks will see them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.layouts import VALIDATION, DatasetError, ImageFile, Layout, read_labels, training_files
from drivers.frame import Frame, FrameStatus, Image, PixelFormat
from drivers.paths import may_pass
from drivers.replay import decode_contents, decode_image, described_format, format_of, read_image
from pipeline.engine import Prepared
from pipeline.preprocess import Preprocessor, check_correction, correction_for

MAX_CORRUPT_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class GoodImages:
    """Good images, split into those to train on and those held out for quantiles and threshold."""

    train: list[ImageFile]
    held_out: list[ImageFile]
    corrupt: list[tuple[str, str]]
    """Names and reasons of files that were skipped."""
    duplicates: list[list[str]]
    """Groups of files with the same content."""
    digests: list[str]
    """Of the contents of all usable files, so that an evaluation can leave them out."""
    held_out_digests: list[str]
    """Those of them that are held out."""
    left_out: int
    """Further photographs of parts that are held out."""
    fingerprint: str
    """SHA-256 over names and contents of all usable files."""
    pixel_formats: list[str]
    """Pixel formats among them."""
    sizes: list[tuple[int, int]]
    """(width, height) among them, px."""
    layout: Layout


def load_good_images(
    dataset: Path,
    held_out_share: float,
    seed: int,
    fit: Callable[[ImageFile, Image], PixelFormat] = lambda _file, image: format_of(image),
    part: re.Pattern[str] | None = None,
) -> GoodImages:
    """List, verify and split the good images.

    Images with the same content stay on one side of the split, and so do those of one part, so that nothing that
    was learnt is held out. Of each part that is held out one photograph is taken: quantiles and threshold promise
    something about parts, as long as each counts once.

    Args:
        dataset: a folder of good images, or a data set in a layout of `calibrate.layouts`.
        held_out_share: share of the images that training never sees, at least one image; a data set with
            validation images of its own holds out those instead, and leaves out other photographs of their parts.
        seed: of the shuffle.
        fit: names an image's pixel format, or raises ValueError when the image does not fit the run.
        part: its first group, in a file's name, says which part that shows; None, or where it is not found: one
            that no other file shows.

    Raises:
        DatasetError: no folder, fewer than two usable images or parts, none beside the validation images, more
            than 5% unreadable files, a readable image that does not fit, or names in which no part is found.
        OSError: a disk or a share failed, which may be well again.
    """
    found = training_files(dataset)
    corrupt: list[tuple[str, str]] = []
    formats: set[str] = set()
    sizes: set[tuple[int, int]] = set()

    def verify(files: list[ImageFile]) -> dict[str, list[ImageFile]]:
        by_content: dict[str, list[ImageFile]] = {}
        for file in files:
            try:
                contents = file.path.read_bytes()
                image = decode_contents(contents)
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and may_pass(error):
                    raise  # skipping what comes back would be another split
                corrupt.append((file.name, str(error)))
                continue
            try:
                formats.add(fit(file, image).value)
            except ValueError as error:
                raise DatasetError(f"{file.path.absolute()}: {error}") from error
            sizes.add((image.shape[1], image.shape[0]))
            by_content.setdefault(image_digest(contents), []).append(file)
        return by_content

    good, validation = verify(found.good), verify(found.validation)
    both = good.keys() & validation.keys()
    usable = {digest: files for digest, files in good.items() if digest not in both} | validation
    count = sum(len(files) for files in usable.values())
    if len(usable) < 2:
        raise DatasetError(
            f"{dataset.absolute()}: {len(usable)} different usable images ({len(corrupt)} unreadable, layout: "
            f"{found.layout}). Training needs at least 2 good images, one of them held out for quantiles and "
            "threshold; 20 or more are advised"
        )
    if len(corrupt) > MAX_CORRUPT_SHARE * (count + len(corrupt)):
        listed = "\n".join(f"  {name}: {why}" for name, why in corrupt[:10])
        raise DatasetError(
            f"{dataset.absolute()}: {len(corrupt)} of {count + len(corrupt)} files cannot be read, more "
            f"than {MAX_CORRUPT_SHARE:.0%}:\n{listed}"
        )
    parts = list(_by_part(usable, part, dataset, validation).values())
    rng = np.random.default_rng([seed, 0])
    if validation:
        chosen = {i for i, digests in enumerate(parts) if not validation.keys().isdisjoint(digests)}
        if len(chosen) == len(parts):
            same = "are all the images there are" if part is None else "show every part"
            raise DatasetError(f"{dataset.absolute()}: no image to learn from: the validation images {same}")
    else:
        take = min(len(parts) - 1, max(1, round(held_out_share * len(parts))))
        chosen = set(rng.permutation(len(parts))[:take].tolist())
    train = [digest for i, digests in enumerate(parts) if i not in chosen for digest in digests]
    held_out = []
    for i in sorted(chosen):
        photographs = [digest for digest in parts[i] if digest in validation] or parts[i]
        held_out.append(photographs[rng.integers(len(photographs))])
    left_out = len(usable) - len(train) - len(held_out)
    duplicates = [[file.name for file in files] for files in usable.values() if len(files) > 1]
    duplicates += [[file.name for file in good[digest] + validation[digest]] for digest in sorted(both)]
    return GoodImages(
        train=[file for digest in train for file in usable[digest]],
        held_out=[usable[digest][0] for digest in held_out],
        corrupt=corrupt,
        duplicates=duplicates,
        digests=sorted(usable),
        held_out_digests=sorted(held_out),
        left_out=left_out,
        fingerprint=_fingerprint(usable),
        pixel_formats=sorted(formats),
        sizes=sorted(sizes),
        layout=found.layout,
    )


def _by_part(
    usable: dict[str, list[ImageFile]],
    pattern: re.Pattern[str] | None,
    dataset: Path,
    validation: Container[str],
) -> dict[str, list[str]]:
    """Sort digests by the part that they show. Raises DatasetError."""
    parts: dict[str, list[str]] = {}
    found = {digest in validation: False for digest in usable}
    for digest, (file, *_) in usable.items():
        # As they are named in their own folders: a pattern that takes a name's beginning must fit both.
        match = None if pattern is None else pattern.search(file.name.removeprefix(VALIDATION))
        named = None if match is None else match[1]
        found[digest in validation] |= named is not None
        parts.setdefault(named or file.part or digest, []).append(digest)
    for side, is_found in found.items():
        if pattern is not None and not is_found:
            some = next(file.name for digest, (file, *_) in usable.items() if (digest in validation) is side)
            which = " of the validation images" if side else ""
            raise DatasetError(
                f"{dataset.absolute()}: --part {pattern.pattern} is found in no name{which}, such as {some}"
            )
    if len(parts) < 2:
        raise DatasetError(
            f"{dataset.absolute()}: all photographs show one part, {next(iter(parts))}; at least 2 are needed, one "
            "of them held out for quantiles and threshold"
        )
    return parts


def image_digest(contents: bytes) -> str:
    """Return what two files with the same content have in common: 16 hex digits of their SHA-256."""
    return hashlib.sha256(contents).hexdigest()[:16]


def _fingerprint(files: dict[str, list[ImageFile]]) -> str:
    lines = sorted(f"{file.name}\0{digest}" for digest, same in files.items() for file in same)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_frame(file: ImageFile, pixel_format: PixelFormat | None = None) -> Frame:
    """Read one file as the frame that the replay driver would deliver. Raises OSError or ValueError."""
    image, pixel_format = read_image(file.path, pixel_format)
    return Frame(FrameStatus.COMPLETE, file.name, image=image, pixel_format=pixel_format)


class ImageCache:
    """Prepares images for the networks; each is decoded once while the memory budget lasts."""

    def __init__(self, preprocess: Preprocessor, pixel_format: PixelFormat | None, budget_mib: int) -> None:
        self._preprocess = preprocess
        self._pixel_format = pixel_format
        self._prepared: dict[Path, Prepared] = {}
        self.room_bytes = budget_mib * 2**20
        """What is left of the budget."""

    def add(self, file: ImageFile, image: Image) -> PixelFormat:
        """Check that format, region, mask and corrections fit, and keep what comes of it while there is room.

        Raises ValueError.
        """
        pixel_format = format_of(image, self._pixel_format or described_format(file.path))
        spec = self._preprocess.spec
        if self.room_bytes >= 12 * spec.width * spec.height:
            prepared = self._preprocess(image, pixel_format)
            self._prepared[file.path] = prepared
            self.room_bytes -= prepared.nbytes
        else:
            correction_for(spec, pixel_format, spec.area(image.shape[1], image.shape[0]))
        return pixel_format

    def prepared(self, file: ImageFile) -> Prepared:
        """Return (3, height, width) float32. Raises DatasetError naming the file that does not fit."""
        known = self._prepared.get(file.path)
        if known is not None:
            return known
        try:
            return self._preprocess(*read_image(file.path, self._pixel_format))
        except (OSError, ValueError) as error:
            raise DatasetError(f"{file.path.absolute()}: {error}") from error


class PreparedImages(Sequence[Prepared]):
    """Network inputs of a list of files."""

    def __init__(self, files: Sequence[ImageFile], cache: ImageCache) -> None:
        self.files = files
        self._cache = cache

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Prepared:  # type: ignore[override]
        """Return (3, height, width) float32. Raises DatasetError naming the file that does not fit."""
        return self._cache.prepared(self.files[index])


def load_correction(path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Load a dark frame or flat field: an image or a .npy of raw values; colour becomes R, G, B.

    Raises DatasetError.
    """
    try:
        if path.suffix == ".npy":
            array = np.asarray(np.load(path, allow_pickle=False), np.float32)
        else:
            image = decode_image(path)
            array = np.ascontiguousarray(image[..., ::-1] if image.ndim == 3 else image, np.float32)
        check_correction(array)
    except (OSError, EOFError, ValueError) as error:
        raise DatasetError(f"{path.absolute()}: {error}") from error
    return array


def load_mask(path: Path) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Load an ignore mask: a grey PNG in full-frame pixels, ignored where not black. Raises DatasetError."""
    return np.asarray(read_labels(path) > 0)
