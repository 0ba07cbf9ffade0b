"""`inspectord check`: does this station work on this machine?"""

from __future__ import annotations

import time
from collections.abc import Iterator

from daemon.config import StationConfig
from drivers.camera import Camera, CameraError, EndOfStream
from drivers.catalog import make_camera
from drivers.frame import Frame
from pipeline.bundle import read_bundle
from pipeline.engines import make_engine
from pipeline.inspect import Inspector

_FIRST_FRAME_S = 10.0


class CheckFailed(Exception):
    """Everything opened, but the first frame could not be judged."""


def check_station(config: StationConfig) -> Iterator[str]:
    """Open everything, judge one frame, and say what was found, line by line.

    Raises what the parts raise: BundleError, EngineUnavailable, DriverMissing, CameraError; and CheckFailed.
    """
    yield f"configuration: station {config.station}"
    bundle = read_bundle(config.model)
    g = bundle.model.geometry
    threshold = bundle.threshold if config.threshold is None else config.threshold
    yield (
        f"bundle: {config.model}, EfficientAD {bundle.model.size}, input {g.image_width}x{g.image_height} px, "
        f"map {g.map_width}x{g.map_height}, tiles {g.tile_rows}x{g.tile_columns}, "
        f"model {bundle.model_id}, calibration {bundle.calibration_id}, threshold {threshold:.4f}"
    )
    choice = make_engine(bundle.model, config.device, config.threads)
    choice.engine.warm_up()
    yield f"engine: {choice.engine.device} ({choice.because})"
    camera = make_camera(config.camera)
    try:
        info = camera.open()
        size = f"{info.width}x{info.height} px" if info.width else "size varies"
        yield f"camera: {info.model}, {info.source}, {size}, {info.pixel_format or 'format varies'}"
        frame = _first_frame(camera)
        inspector = Inspector(bundle, choice.engine, limits=config.plausible.limits(), threshold=threshold)
        inspection = inspector.inspect(frame)
    finally:
        camera.close()
    shape = "no image" if frame.image is None else f"{frame.image.shape[1]}x{frame.image.shape[0]} px"
    yield f"frame: {frame.source}, {shape}, {frame.pixel_format or 'no format'}, {frame.status.value}"
    if inspection.reason is not None:
        raise CheckFailed(f"the frame is INVALID/{inspection.reason.value}: {inspection.detail}")
    yield (
        f"verdict: {inspection.outcome.value}, score {inspection.score:.4f}, {len(inspection.regions)} regions, "
        f"preprocess {inspection.preprocess_ns / 1e6:.1f} ms, infer {inspection.infer_ns / 1e6:.1f} ms"
    )


def _first_frame(camera: Camera) -> Frame:
    deadline_s = time.monotonic() + _FIRST_FRAME_S
    while time.monotonic() < deadline_s:
        try:
            frames = camera.grab(0.5)
        except EndOfStream:
            raise CameraError("the source ended before its first frame") from None
        if frames:
            return frames[-1]
    raise CameraError(f"no frame within {_FIRST_FRAME_S:.0f} s; is the trigger connected?")
