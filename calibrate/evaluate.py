"""How well a bundle tells good from defective, on images with known truth."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from calibrate.dataset import image_digest, read_frame
from calibrate.layouts import GOOD, DatasetError, TestImage, TestSet, load_test_set, read_defects
from calibrate.listener import Listener
from calibrate.metrics import ImageMetrics, PixelMetrics, PixelTally, Rate, image_metrics, score_edges
from drivers.frame import PixelFormat
from pipeline.bundle import Bundle
from pipeline.engines import DeviceChoice, PrecisionChoice, make_engine
from pipeline.inspect import Inspector
from pipeline.inspection import Outcome
from pipeline.plausible import PlausibleLimits
from pipeline.scoring import FloatMap, Scorer


@dataclass(frozen=True, slots=True)
class ScoredImage:
    """One test image with what the bundle says of it."""

    image: TestImage
    score: float
    anomaly_map: FloatMap
    """(map_height, map_width), normalised."""
    shape: tuple[int, int]
    """(height, width) of the image, px."""
    masked: bool
    """It is defective, and masks show where."""


@dataclass(frozen=True, slots=True)
class KindResult:
    """Result for one kind of defect against all good images."""

    image: ImageMetrics
    pixel: PixelMetrics | None
    """None where no image of this kind has a mask."""
    escapes: Rate
    """Images of this kind at or below the threshold."""


@dataclass(frozen=True)
class Evaluation:
    """Result on a test set."""

    image: ImageMetrics
    pixel: PixelMetrics | None
    """Within the region of interest, ignored pixels left out; None without masks."""
    threshold: float
    false_rejects: Rate
    """Good images above the threshold."""
    escapes: Rate
    """Defective images at or below it."""
    kinds: dict[str, KindResult]
    scored: list[ScoredImage]
    test_set: TestSet
    seen: list[str]
    """Names of test images left out because the model was trained or calibrated on their content."""
    stand_ins: int
    """Good images that training held out, where there are no others."""
    without_mask: int
    """Defective images that pixel metrics leave out."""
    run: dict[str, Any] = field(default_factory=dict)
    """What was run on what."""

    def to_json(self) -> dict[str, Any]:
        """Describe the result; all metrics from 0 to 1."""
        return {
            "image": _image_json(self.image),
            "pixel": None if self.pixel is None else _pixel_json(self.pixel),
            "threshold": {
                "value": self.threshold,
                "good": self.false_rejects.of,
                "false_rejects": self.false_rejects.count,
                "false_reject_rate": self.false_rejects.rate,
                "false_reject_interval": self.false_rejects.interval,
                "defective": self.escapes.of,
                "escapes": self.escapes.count,
                "escape_rate": self.escapes.rate,
                "escape_interval": self.escapes.interval,
            },
            "kinds": {
                name: {
                    "images": kind.escapes.of,
                    **{f"image_{k}": v for k, v in _image_json(kind.image).items()},
                    **({} if kind.pixel is None else {f"pixel_{k}": v for k, v in _pixel_json(kind.pixel).items()}),
                    "escapes": kind.escapes.count,
                    "escape_rate": kind.escapes.rate,
                    "escape_interval": kind.escapes.interval,
                }
                for name, kind in self.kinds.items()
            },
            "run": {
                **self.run,
                "left_out_as_seen": self.seen,
                "stand_ins": self.stand_ins,
                "defective_without_mask": self.without_mask,
            },
        }


def evaluate(
    bundle: Bundle,
    dataset: Path,
    device: DeviceChoice = "auto",
    precision: PrecisionChoice = "auto",
    listener: Listener | None = None,
) -> Evaluation:
    """Score every test image through the daemon's own path and compare with the truth.

    Args:
        bundle: to evaluate.
        dataset: in one of the layouts of `calibrate.layouts`.
        device: that runs the networks.
        precision: of the engine.
        listener: told how many of how many images are scored.

    Raises DatasetError when the layout is not known or an image cannot be judged, EngineUnavailable, or
    TrainingStopped.
    """
    listener = listener or Listener()
    test_set = load_test_set(dataset)
    images, seen, stand_ins = _unseen(test_set.images, bundle)
    engine = make_engine(bundle, device, precision=precision)
    # A test set may hold black or repeated pictures on purpose: every image gets a score.
    limits = PlausibleLimits(black_below=0, saturated_above=1, frozen_frames=0)
    inspector = Inspector(bundle, engine.engine, limits=limits)
    pixel_format = declared_format(bundle)
    scored = []
    for index, image in enumerate(images):
        scored.append(_score(inspector, test_set, image, pixel_format))
        listener.step(index + 1, len(images), {})
        listener.go_on("while scoring; nothing was written")
    scores = np.array([s.score for s in scored])
    kinds = np.array([s.image.kind for s in scored])
    good = kinds == GOOD
    tally = _tally(bundle, test_set, scored, listener)
    names = sorted(set(kinds[~good].tolist()))
    results = {}
    for name in names:
        both = good | (kinds == name)
        here = scores[kinds == name]
        results[name] = KindResult(
            image=image_metrics(~good[both], scores[both]),
            pixel=tally.metrics((GOOD, name)),
            escapes=Rate(int((here <= inspector.threshold).sum()), len(here)),
        )
    return Evaluation(
        image=image_metrics(~good, scores),
        pixel=tally.metrics((GOOD, *names)),
        threshold=inspector.threshold,
        false_rejects=Rate(int((scores[good] > inspector.threshold).sum()), int(good.sum())),
        escapes=Rate(int((scores[~good] <= inspector.threshold).sum()), int((~good).sum())),
        kinds=results,
        scored=scored,
        test_set=test_set,
        seen=seen,
        stand_ins=stand_ins,
        without_mask=sum(s.image.kind != GOOD and not s.masked for s in scored),
        run={
            "dataset": str(dataset.absolute()),
            "layout": test_set.layout.value,
            "images": len(scored),
            "model": bundle.model_id,
            "calibration": inspector.bundle.calibration_id,
            "size": bundle.model.size,
            "image_size": [bundle.model.geometry.image_width, bundle.model.geometry.image_height],
            "teacher": dict(bundle.teacher),
            "training": {name: value for name, value in bundle.training.items() if name not in NOT_SHOWN},
            "device": engine.engine.device,
            "precision": engine.engine.precision,
            "machine": platform.machine(),
            "versions": {
                name: importlib.metadata.version(name) for name in ("inspectord", "torch", "scikit-learn")
            },
        },
    )


NOT_SHOWN = ("digests", "held_out_digests", "corrections")
"""What a bundle remembers of its training for machines only."""


def declared_format(bundle: Bundle) -> PixelFormat | None:
    """Return what training was told that the files hold, where their own type does not say it."""
    declared = bundle.training.get("pixel_format")
    return None if declared is None else PixelFormat(declared)


def read_pixels(scored: ScoredImage, bundle: Bundle, scorer: Scorer) -> tuple[FloatMap, tuple[slice, slice]]:
    """Stretch an image's map to the pixels of its region of interest.

    Returns the map, −inf where ignored, and the region's rows and columns in the image.
    """
    area = bundle.model.preprocess.area(scored.shape[1], scored.shape[0])
    stretched = scorer.stretch(scored.anomaly_map)
    ignored = np.isneginf(stretched)
    size = (area.width, area.height)
    pixels = cv2.resize(np.where(ignored, np.float32(0), stretched), size, interpolation=cv2.INTER_LINEAR)
    if ignored.any():
        pixels[cv2.resize(ignored.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0] = -np.inf
    return np.asarray(pixels, np.float32), (slice(area.y, area.y + area.height), slice(area.x, area.x + area.width))


def _unseen(images: list[TestImage], bundle: Bundle) -> tuple[list[TestImage], list[str], int]:
    """Leave out images that the model knows: they would flatter it.

    Where no other good images are there, those that training held out stand in for them: the networks have not seen
    them either, but quantiles and threshold are theirs.

    Returns the images to score, the names of those left out, and how many good ones stand in.
    """
    known = set(bundle.training.get("digests", ()))
    held_out = set(bundle.training.get("held_out_digests", ()))
    digests = []
    for image in images:
        try:
            digests.append(image_digest(image.file.path.read_bytes()) if known else "")
        except OSError as error:
            raise DatasetError(f"{image.file.path.absolute()}: {error.strerror}") from error
    pairs = list(zip(images, digests, strict=True))
    others = any(image.kind == GOOD and digest not in known for image, digest in pairs)
    kept: list[TestImage] = []
    seen: list[str] = []
    stand_ins: set[str] = set()
    for image, digest in pairs:
        if digest not in known:
            kept.append(image)
        elif not others and image.kind == GOOD and digest in held_out - stand_ins:
            stand_ins.add(digest)
            kept.append(image)
        else:
            seen.append(image.file.name)
    good = sum(image.kind == GOOD for image in kept)
    if good == 0 or good == len(kept):
        raise DatasetError(
            f"{good} good and {len(kept) - good} defective images are left after leaving out {len(seen)} that the "
            "bundle was trained on; both are needed: add photographs that training has not seen"
        )
    return kept, seen, len(stand_ins)


def _score(
    inspector: Inspector, test_set: TestSet, image: TestImage, pixel_format: PixelFormat | None
) -> ScoredImage:
    path = image.file.path.absolute()
    try:
        frame = read_frame(image.file, pixel_format)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: {error}") from error
    found = inspector.inspect(frame)
    if found.outcome is Outcome.INVALID or found.score is None or found.anomaly_map is None or frame.image is None:
        raise DatasetError(f"{path}: {found.reason}: {found.detail}")
    height, width = frame.image.shape[:2]
    defects, _ = read_defects(test_set, image, (height, width))
    return ScoredImage(image, found.score, found.anomaly_map, (height, width), masked=bool(defects))


def _tally(bundle: Bundle, test_set: TestSet, scored: list[ScoredImage], listener: Listener) -> PixelTally:
    """Count all pixels by score and truth, but for defective images without a mask."""
    scorer = Scorer(bundle.model.geometry, bundle.model.preprocess.ignored_in_roi())
    tally = PixelTally(score_edges(s.anomaly_map for s in scored))
    for one in scored:
        listener.go_on("while counting pixels; nothing was written")
        if one.image.kind != GOOD and not one.masked:
            continue
        pixels, window = read_pixels(one, bundle, scorer)
        regions, saturating = read_defects(test_set, one.image, one.shape, window)
        tally.add(one.image.kind, pixels, regions, saturating)
    return tally


def _image_json(metrics: ImageMetrics) -> dict[str, float]:
    return {"auroc": metrics.auroc, "ap": metrics.ap, "f1_max": metrics.f1_max}


def _pixel_json(metrics: PixelMetrics) -> dict[str, float]:
    values = {"auroc": metrics.auroc, "ap": metrics.ap, "aupro": metrics.aupro}
    if metrics.auspro is not None and metrics.auspro_30 is not None:
        values |= {"auspro": metrics.auspro, "auspro_30": metrics.auspro_30}
    return values
