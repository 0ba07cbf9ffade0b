"""Calibrate the engines' precisions: each has quantiles and a threshold of its own, and must prove itself.

A precision is trusted when no score leaves float32's by more than the tolerance, on held-out good images and on
the same images with anomalies pasted into them: integers that are cut off show on anomalies only.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from calibrate.dataset import PreparedImages
from calibrate.listener import TrainingStopped
from calibrate.normalize import choose_threshold, map_quantiles, ranges_in, score_maps
from calibrate.options import TrainOptions
from calibrate.procedural import natural_like
from pipeline.bundle import Bundle, PrecisionCalibration
from pipeline.engine import CalibratedEngine, Precision, Prepared, RawMaps
from pipeline.engine_cpu import CpuEngine, observe_ranges
from pipeline.engines import engine_of, reduced_precisions
from pipeline.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipeline.scoring import Quantiles, Scorer

T = TypeVar("T")

TOLERATED, TOLERATED_SHARE = 0.01, 0.05
"""A score may differ from float32's by this much and this share of it; 0.1 is the quantiles' distance."""
_LOOKED_AT = 24
"""Held-out images that ranges are taken from and anomalies are pasted into."""
_HEADROOM = 1.5
"""Ranges are wider than what was seen: a real anomaly may exceed it, and half a bit less costs next to nothing."""
_OBSERVED, _PROVEN = 5, 6
"""Streams of random numbers of the anomalies that ranges are taken from, and of those that prove a precision."""
_CHECKED = 8
"""Anomalies that `inspectord check` pastes."""
_SMALLEST_SHARE, _LARGEST_SHARE = 0.03, 0.3
"""Sides of a pasted anomaly, of the image's shorter side."""
_TEXTURE_PX = 128


def calibrate_precisions(
    bundle: Bundle,
    held_out: PreparedImages,
    maps: Sequence[RawMaps],
    scorer: Scorer,
    options: TrainOptions,
    say: Callable[[str], None] = lambda _message: None,
    go_on: Callable[[], None] = lambda: None,
) -> Bundle:
    """Return the bundle with what belongs to each precision that this machine has.

    One that cannot be calibrated is left out, which is said: a finished training must not be lost for it.

    Args:
        bundle: calibrated in float32.
        held_out: good images that training never saw.
        maps: their raw maps in float32.
        scorer: knows the ignored areas.
        options: levels of the quantiles, false-reject rate, seed.
        say: told of a precision that is left out.
        go_on: called before each image; may raise TrainingStopped to end it all.
    """

    def good(count: int) -> Iterator[Prepared]:
        for index in range(count):
            go_on()
            yield held_out[index]

    some = min(_LOOKED_AT, len(held_out))

    def anomalies(stream: int) -> Iterator[Prepared]:
        """Paste them anew for each precision, the same each time: all at once may not fit into memory."""
        for index, image in enumerate(good(some)):
            yield paste_anomaly(image, np.random.default_rng([options.seed, stream, index]))

    def attempt(otherwise: str, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except TrainingStopped:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a device throws, the bundle is there
            say(f"{otherwise}: {type(error).__name__}: {error}")
            return None

    model = bundle.model
    reduced = reduced_precisions("cpu" if options.device == "cpu" else "auto")
    if "int8" in reduced:
        # Proven on others than those that the ranges are taken from, or nothing could ever exceed these.
        seen = attempt(
            "int8 is left out",
            lambda: observe_ranges(model, itertools.chain(good(some), anomalies(_OBSERVED))),
        )
        if seen is None:
            reduced.remove("int8")
        else:
            model = replace(model, ranges={name: _HEADROOM * largest for name, largest in seen.items()})
    in_floats = attempt("precisions are not calibrated", lambda: _timed_maps(CpuEngine(model), anomalies(_PROVEN)))
    if in_floats is None:
        return bundle
    on_anomalies, infer_ms = in_floats
    wanted = score_maps([*maps, *on_anomalies], scorer, bundle.quantiles)
    found: dict[Precision, PrecisionCalibration] = {
        "fp32": PrecisionCalibration(bundle.quantiles, bundle.threshold, 0.0, infer_ms)
    }

    def judged_in(precision: Precision) -> tuple[list[RawMaps], float, Quantiles]:
        everything = itertools.chain(good(len(held_out)), anomalies(_PROVEN))
        ours, infer_ms = _timed_maps(engine_of(model, precision), everything)
        on_good = ours[: len(held_out)]
        quantiles = map_quantiles(
            on_good,
            scorer,
            options.quantile_levels,
            autoencoder=bundle.quantiles.ae_a is not None,
            ranges=ranges_in(bundle.quantiles, on_good, maps, scorer),
        )
        return ours, infer_ms, quantiles

    for precision in reduced:
        judged = attempt(f"{precision} is left out", partial(judged_in, precision))
        if judged is None:
            continue
        ours, infer_ms, quantiles = judged
        scores = score_maps(ours, scorer, quantiles)
        threshold = choose_threshold(scores[: len(held_out)], options.false_reject_rate).value
        deviation = _largest_deviation(scores, wanted)
        if not np.isfinite(deviation):
            say(f"{precision} is left out: its scores are not finite")
            continue
        found[precision] = PrecisionCalibration(quantiles, threshold, deviation, infer_ms)
    fastest_first = sorted(found.items(), key=lambda item: item[1].infer_ms)
    return replace(bundle, model=model, precisions=dict(fastest_first))


def check_precision(
    bundle: Bundle, engine: CalibratedEngine, image: Prepared, judged: float, scorer: Scorer
) -> float:
    """Compare an engine with the processor's float32, on an image with and without anomalies.

    Args:
        bundle: calibrated for the engine's precision.
        engine: to be checked.
        image: (3, height, width), a part prepared by the processor.
        judged: the engine's own score of that part, prepared by itself.
        scorer: knows the ignored areas.

    Returns:
        The largest deviation of a score, as a share of what is tolerated.
    """
    rng = np.random.default_rng(0)
    images = [image, *(paste_anomaly(image, rng) for _ in range(_CHECKED))]
    scores = []
    for side in (CpuEngine(bundle.model), engine):
        maps, _ = _timed_maps(side, images)
        scores.append(score_maps(maps, scorer, bundle.at(side.precision).quantiles))
    return _largest_deviation(np.append(scores[1], judged), np.append(scores[0], scores[0][0]))


def _largest_deviation(scores: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    return float((np.abs(scores - wanted) / (TOLERATED + TOLERATED_SHARE * np.abs(wanted))).max())


def _timed_maps(engine: CalibratedEngine, images: Iterable[Prepared]) -> tuple[list[RawMaps], float]:
    """Return the raw maps of images, and the shortest time that one took, ms: others may use the machine, too."""
    engine.warm_up()
    maps = []
    for image in images:
        began_ns = time.perf_counter_ns()
        st, ae = engine.infer(image)
        maps.append(RawMaps(st, ae, preprocess_ns=0, infer_ns=time.perf_counter_ns() - began_ns))
    return maps, min(found.infer_ns for found in maps) / 1e6


def paste_anomaly(image: Prepared, rng: np.random.Generator) -> Prepared:
    """Return a copy with a blob, a scratch or a piece of another texture in it.

    Args:
        image: (3, height, width), ImageNet-normalised.
        rng: where, how large and what.
    """
    height, width = image.shape[1:]
    shorter = min(height, width)
    side = int(shorter * rng.uniform(_SMALLEST_SHARE, _LARGEST_SHARE)) + 2
    centre = (int(rng.integers(width)), int(rng.integers(height)))
    mask = np.zeros((height, width), np.uint8)
    kind = int(rng.integers(3))
    thickness = max(1, side // 8)
    axes = (side // 2, thickness if kind == 2 else max(1, int(side // 2 * rng.uniform(0.3, 1))))
    cv2.ellipse(mask, centre, axes, rng.uniform(0, 180), 0, 360, 255, -1, cv2.LINE_AA)
    share = mask * np.float32(rng.uniform(0.3, 1) / 255)
    return np.asarray(image + share * (_filling(kind, height, width, rng) - image), np.float32)


def _filling(kind: int, height: int, width: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return what an anomaly is filled with: a colour or a texture; broadcasts to (3, height, width)."""
    if kind == 0:
        texture = natural_like(rng, _TEXTURE_PX)
        pixels = cv2.resize(texture, (width, height), interpolation=cv2.INTER_LINEAR)[..., ::-1] / 255
    else:
        pixels = np.broadcast_to(rng.choice([0.0, 1.0]), (1, 1, 3))
    return np.asarray(((pixels - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1), np.float32)
