"""What an inspection says; quick to import, for those who only read verdicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from traceback import TracebackException

from pipeline.scoring import FloatMap, Region


class Outcome(StrEnum):
    """The three words of a verdict; a PLC passes a part on OK only."""

    OK = "OK"
    NG = "NG"
    INVALID = "INVALID"


class Reason(StrEnum):
    """Why a part is INVALID."""

    INCOMPLETE = "incomplete"
    UNREADABLE = "unreadable"
    LOST = "lost"
    TIMEOUT = "timeout"
    CAMERA = "camera"
    OVERLOAD = "overload"
    FORMAT = "format"
    """Size, pixel format or bit depth do not fit the bundle's region, mask, corrections or training."""
    IMAGE = "image"
    """Black, saturated or frozen."""
    ENGINE = "engine"
    """The engine failed, or a value was not finite."""
    DEADLINE = "deadline"
    """No result when the verdict was due."""
    RESTART = "restart"
    """Numbered by an earlier run of the daemon, which ended before it could judge."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found on one frame."""

    outcome: Outcome
    reason: Reason | None = None
    detail: str = ""
    score: float | None = None
    anomaly_map: FloatMap | None = None
    """(map_height, map_width) float32: the grid of the networks' output, normalised, not yet padded."""
    regions: list[Region] = field(default_factory=list)
    preprocess_ns: int = 0
    infer_ns: int = 0
    error: TracebackException | None = None
    """What failed behind INVALID/engine, for the log. Not the exception, whose frames hold the image: it would stay
    with the camera's buffer that it lies in."""
