"""The messages on the wire, as documented in docs/protocol.md. Later versions add fields and break none."""

from __future__ import annotations

import datetime
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from drivers.frame import Frame
from pipeline.inspection import Inspection
from pipeline.scoring import FloatMap

VERDICT_SCHEMA = "inspectord.verdict/1"
MAP_SCHEMA = "inspectord.map/1"
HEALTH_SCHEMA = "inspectord.health/1"
EVENT_SCHEMA = "inspectord.event/1"


class RegionMessage(msgspec.Struct, frozen=True):
    """A box in full-frame pixels."""

    x: int
    y: int
    width: int
    height: int
    area_px: int
    peak: float


class FrameMessage(msgspec.Struct, frozen=True):
    """What the camera said; the two device fields are strings because they may exceed 2^53."""

    device_id: str | None
    device_timestamp_ns: str | None
    width: int | None
    height: int | None
    pixel_format: str | None


class LatencyMessage(msgspec.Struct, frozen=True):
    """Microseconds. `grab` … `infer` follow one another; `total` ends when journal and sockets get the verdict."""

    grab: int
    queue: int
    preprocess: int
    infer: int
    total: int


class VerdictMessage(msgspec.Struct, frozen=True):
    """One part's verdict. Its identity is (station, boot, sequence)."""

    schema: str
    station: str
    boot: str
    sequence: int
    verdict: str
    reason: str | None
    score: float | None
    threshold: float
    regions: list[RegionMessage]
    source: str
    part: str | None
    trigger: str | None
    recipe: str | None
    frame: FrameMessage
    model: str
    calibration: str
    time: str
    latency_us: LatencyMessage
    journaled: bool = True


class MapMessage(msgspec.Struct, frozen=True):
    """Describes the raw array in the part that follows it."""

    schema: str
    station: str
    boot: str
    sequence: int
    dtype: str
    shape: list[int]
    geometry: dict[str, Any]
    score: float | None
    threshold: float


class EventMessage(msgspec.Struct, frozen=True):
    """Something that an operator should hear of; `event` is one of `daemon.events.EventKind`."""

    schema: str
    station: str
    boot: str
    time: str
    event: str
    level: str
    message: str
    sequence: int | None
    data: dict[str, Any]


class CameraHealth(msgspec.Struct, frozen=True):
    """State of the camera: there at all, as fast as expected, and delivering frames that can be judged."""

    connected: bool
    source: str | None
    reopened: int
    error: str | None
    alive: bool
    rate_ok: bool | None
    valid: bool | None


class JournalHealth(msgspec.Struct, frozen=True):
    """State of the journal; microseconds are what a verdict waited for its commit."""

    path: str
    written: int
    given_up: int
    lagging: bool
    error: str | None
    commit_p50_us: int | None
    commit_p99_us: int | None


class ImagesHealth(msgspec.Struct, frozen=True):
    """State of the image store."""

    path: str
    kept: int
    dropped: int
    bytes: int
    error: str | None


class HealthMessage(msgspec.Struct, frozen=True):
    """Once a second. seen = ok + ng + invalid + in_flight at any moment."""

    schema: str
    station: str
    boot: str
    time: str
    state: str
    uptime_s: float
    seen: int
    ok: int
    ng: int
    invalid: int
    in_flight: int
    invalid_reasons: dict[str, int]
    last_sequence: int
    camera: CameraHealth
    device: str | None
    precision: str
    model: str
    calibration: str
    journal: JournalHealth | None
    images: ImagesHealth | None
    events: dict[str, int]
    restarts: dict[str, int]


_encoder = msgspec.json.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """Encode a message as UTF-8 JSON."""
    return _encoder.encode(message)


def rfc3339(wall_ns: int) -> str:
    """Write a wall-clock time as RFC 3339 in UTC with microseconds."""
    seconds, ns = divmod(wall_ns, 1_000_000_000)
    return f"{_second(seconds)}.{ns // 1000:06d}Z"


@lru_cache(2)
def _second(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()[:19]


def frame_message(frame: Frame) -> FrameMessage:
    """Describe a frame for its verdict."""
    return FrameMessage(
        device_id=None if frame.device_id is None else str(frame.device_id),
        device_timestamp_ns=None if frame.device_timestamp_ns is None else str(frame.device_timestamp_ns),
        width=None if frame.image is None else frame.image.shape[1],
        height=None if frame.image is None else frame.image.shape[0],
        pixel_format=None if frame.pixel_format is None else frame.pixel_format.value,
    )


def region_messages(inspection: Inspection) -> list[RegionMessage]:
    """List an inspection's regions."""
    return [RegionMessage(r.x, r.y, r.width, r.height, r.area_px, r.peak) for r in inspection.regions]


def map_bytes(anomaly_map: FloatMap) -> bytes:
    """Lay a map out as the wire has it: little-endian float32, row by row."""
    return np.ascontiguousarray(anomaly_map, "<f4").tobytes()
