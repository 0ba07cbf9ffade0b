"""How well a bundle tells good from defective, on images with known truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from calibrate.dataset import DatasetError, load_test_images, read_frame
from drivers.frame import PixelFormat
from pipeline.bundle import Bundle
from pipeline.engines import DeviceChoice, make_engine
from pipeline.inspect import Inspector, Outcome
from pipeline.plausible import PlausibleLimits


@dataclass(frozen=True, slots=True)
class KindResult:
    """Result for one kind of defect against all good images."""

    images: int
    auroc: float
    found: int
    """Images above the threshold."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result on a test set."""

    auroc: float
    """Image AU-ROC, 0 … 1."""
    good_images: int
    false_rejects: int
    """Good images above the threshold."""
    threshold: float
    kinds: dict[str, KindResult]


def evaluate(
    bundle: Bundle,
    dataset: Path,
    device: DeviceChoice = "auto",
    on_image: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score every test image through the daemon's own path.

    Raises DatasetError when the layout is not known or an image cannot be judged, EngineUnavailable.
    """
    images = load_test_images(dataset)
    engine = make_engine(bundle.model, device).engine
    # A test set may hold black or repeated pictures on purpose: every image gets a score.
    limits = PlausibleLimits(black_below=0, saturated_above=1, frozen_frames=0)
    inspector = Inspector(bundle, engine, limits=limits)
    declared = bundle.training.get("pixel_format")
    pixel_format = None if declared is None else PixelFormat(declared)
    scores = []
    for index, (file, _kind) in enumerate(images):
        try:
            frame = read_frame(file, pixel_format)
        except (OSError, ValueError) as error:
            raise DatasetError(f"{file.path.absolute()}: {error}") from error
        inspection = inspector.inspect(frame)
        if inspection.outcome is Outcome.INVALID or inspection.score is None:
            raise DatasetError(f"{file.path.absolute()}: {inspection.reason}: {inspection.detail}")
        scores.append(inspection.score)
        if on_image is not None:
            on_image(index + 1, len(images))
    values, kinds = np.array(scores), np.array([kind for _file, kind in images])
    good = kinds == "good"
    results = {}
    for kind in sorted(set(kinds[~good].tolist())):
        here = kinds == kind
        both = good | here
        auroc = float(roc_auc_score(here[both], values[both]))
        found = int((values[here] > inspector.threshold).sum())
        results[kind] = KindResult(int(here.sum()), auroc, found)
    return Evaluation(
        auroc=float(roc_auc_score(~good, values)),
        good_images=int(good.sum()),
        false_rejects=int((values[good] > inspector.threshold).sum()),
        threshold=inspector.threshold,
        kinds=results,
    )
