"""`inspectord check`: does this station work on this machine?"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import cast

from daemon.config import StationConfig
from daemon.ledger import margin_before_ns
from daemon.photographs import next_frame
from drivers.camera import CameraError, EndOfStream
from drivers.catalog import make_camera
from drivers.frame import Frame
from pipeline.bundle import Bundle, read_bundle
from pipeline.engine import CalibratedEngine, Engine
from pipeline.inspect import Inspector
from pipeline.inspection import Inspection
from pipeline.preprocess import Preprocessor
from pipeline.scoring import Scorer

_FIRST_FRAME_S = 10.0
_TIMED = 5


class CheckFailed(Exception):
    """Everything opened, but the first frame could not be judged, or not as it should be."""


def check_station(config: StationConfig) -> Iterator[str]:
    """Open everything, judge one frame, and say what was found, line by line.

    Raises what the parts raise: BundleError, EngineUnavailable, DriverMissing, CameraError; and CheckFailed.
    """
    yield f"configuration: station {config.station}"
    bundle = read_bundle(config.model)
    g = bundle.model.geometry
    yield (
        f"bundle: {config.model}, EfficientAD {bundle.model.size}, input {g.image_width}x{g.image_height} px, "
        f"map {g.map_width}x{g.map_height}, tiles {g.tile_rows}x{g.tile_columns}, "
        f"model {bundle.model_id}"
    )
    choice = config.make_engine(bundle)
    engine = choice.engine
    inspector = Inspector(bundle, engine, limits=config.plausible.limits(), threshold=config.threshold)
    inspector.warm_up()
    yield f"engine: {engine.device}, {engine.precision} ({choice.because})"
    camera = make_camera(config.camera)
    try:
        info = camera.open()
        size = f"{info.width}x{info.height} px" if info.width else "size varies"
        yield f"camera: {info.model}, {info.source}, {size}, {info.pixel_format or 'format varies'}"
        try:
            frame = next_frame(camera, _FIRST_FRAME_S)
        except EndOfStream:
            raise CameraError("the source ended before its first frame") from None
        inspection = inspector.inspect(frame)
    finally:
        camera.close()
    shape = "no image" if frame.image is None else f"{frame.image.shape[1]}x{frame.image.shape[0]} px"
    yield f"frame: {frame.source}, {shape}, {frame.pixel_format or 'no format'}, {frame.status.value}"
    if inspection.reason is not None:
        raise CheckFailed(f"the frame is INVALID/{inspection.reason.value}: {inspection.detail}")
    if (engine.device, engine.precision) != ("cpu", "fp32"):
        yield _check_precision(bundle, engine, frame, inspection)
    yield _check_speed(config, engine, frame, live=camera.live)
    judged_by = inspector.bundle
    yield f"threshold: {inspector.threshold:.4f}, calibration {judged_by.calibration_id}"
    yield (
        f"verdict: {inspection.outcome.value}, score {inspection.score:.4f}, {len(inspection.regions)} regions, "
        f"preprocess {inspection.preprocess_ns / 1e6:.1f} ms, infer {inspection.infer_ns / 1e6:.1f} ms"
    )


def _check_speed(config: StationConfig, engine: Engine, frame: Frame, *, live: bool) -> str:
    """Hold the time that a part takes against the deadline and what counts as hung. Raises CheckFailed."""
    assert frame.image is not None
    assert frame.pixel_format is not None
    maps = [engine.begin(frame.image, frame.pixel_format)() for _ in range(_TIMED)]
    times_ns = [found.preprocess_ns + found.infer_ns for found in maps]
    took_ns = min(times_ns)  # others may use the machine, too
    deadline_ms, hang_s = config.deadline_ms(live=live), config.supervision.hang_s
    deadline_ns = None if deadline_ms is None else int(deadline_ms * 1e6)
    too_short = None
    if deadline_ns is not None and took_ns >= deadline_ns - margin_before_ns(deadline_ns):
        too_short = f"verdict.deadline_ms is {deadline_ms:g}: every part would be INVALID/deadline; raise that"
    elif took_ns >= hang_s * 1e9:
        too_short = f"supervision.hang_s is {hang_s:g}: every part would count as hung; raise that"
    if too_short is not None:
        raise CheckFailed(
            f"a part takes the engine {took_ns / 1e6:.1f} ms, and {too_short}, or train with --size small, a "
            "smaller --image-size, or on this machine, for the precisions that it has"
        )
    deadline = "no deadline" if deadline_ms is None else f"deadline {deadline_ms:g} ms"
    typical_ms = statistics.median(times_ns) / 1e6
    return f"speed: {typical_ms:.1f} ms a part, up to {1000 / typical_ms:.1f} parts a second; {deadline}"


def _check_precision(bundle: Bundle, engine: Engine, frame: Frame, inspection: Inspection) -> str:
    """Hold the engine against float32 on this machine's processor. Raises CheckFailed."""
    from calibrate.precision import check_precision

    assert frame.image is not None
    assert frame.pixel_format is not None
    assert inspection.score is not None
    model = bundle.model
    prepared = Preprocessor(model.preprocess)(frame.image, frame.pixel_format)
    scorer = Scorer(model.geometry, model.preprocess.ignored_in_roi())
    # All that a configuration can name take prepared images, too.
    deviation = check_precision(bundle, cast(CalibratedEngine, engine), prepared, inspection.score, scorer)
    if not deviation <= 1:  # NaN is no agreement
        instead = "device: cpu" if engine.precision == "fp32" else "precision: fp32"
        raise CheckFailed(
            f"precision {engine.precision}: scores differ from float32's by {deviation:.0%} of what is tolerated; "
            f"set {instead}"
        )
    return f"precision: {engine.precision}, scores deviate by up to {deviation:.0%} of what is tolerated"
