"""The station's configuration: what may stand in the YAML file, and what it means."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from daemon.yaml_errors import ConfigError, describe_problems, read_yaml
from drivers.catalog import CameraOptions
from pipeline.bundle import MANIFEST
from pipeline.plausible import PlausibleLimits


def _check_endpoint(endpoint: str) -> str:
    tcp = re.fullmatch(r"tcp://(\*|[\w.\-]+|\[[0-9a-fA-F:.]+\]):(\d+)", endpoint)
    if tcp and 0 < int(tcp.group(2)) < 65536:
        return endpoint
    if re.fullmatch(r"ipc://.+", endpoint) and len(endpoint) <= 107 + len("ipc://"):
        return endpoint
    raise ValueError(
        f"{endpoint!r} is not an endpoint; write tcp://127.0.0.1:5550 or ipc:///run/inspectord/line1/verdicts.sock"
    )


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _check_bundle(path: Path) -> Path:
    try:
        found = (path / MANIFEST).is_file()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if not found:
        what = f"no {MANIFEST} in it" if path.is_dir() else "no such folder"
        raise ValueError(f"{path.absolute()}: {what}; train a bundle with: inspectord train DATASET -o {path}")
    return path


_LIMITS = PlausibleLimits()
Endpoint = Annotated[str, AfterValidator(_check_endpoint)]
Endpoints = Annotated[list[Endpoint], BeforeValidator(_as_list), Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PublishConfig(_Section):
    """Where ZeroMQ subscribers find us; one endpoint or a list."""

    verdicts: Endpoints = ["tcp://127.0.0.1:5550"]
    maps: Endpoints | None = None

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        endpoints = [*self.verdicts, *(self.maps or [])]
        for endpoint in endpoints:
            if endpoints.count(endpoint) > 1:
                raise ValueError(f"{endpoint} is given twice; each endpoint serves one socket")
        return self


class PlausibleConfig(_Section):
    """Limits of a plausible image, as `pipeline.plausible` defines them."""

    black_below: float = Field(default=_LIMITS.black_below, ge=0, le=1)
    saturated_above: float = Field(default=_LIMITS.saturated_above, ge=0, le=1)
    frozen_frames: int = Field(default=_LIMITS.frozen_frames, ge=0)

    @field_validator("frozen_frames")
    @classmethod
    def _off_or_a_repetition(cls, frames: int) -> int:
        if frames == 1:
            raise ValueError("0 (off) or at least 2: every frame is identical to itself")
        return frames

    def limits(self) -> PlausibleLimits:
        """Hand the limits to the pipeline."""
        return PlausibleLimits(**self.model_dump())


class LogConfig(_Section):
    """What is logged, to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto: colour on a terminal, JSON lines elsewhere"
    )


class StationConfig(_Section):
    """One station: one camera, one model, one stream of verdicts."""

    station: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,62}$")
    camera: CameraOptions
    model: Annotated[Path, AfterValidator(_check_bundle)]
    publish: PublishConfig = PublishConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1, le=256, description="of the CPU engine; None: all cores")
    threshold: float | None = Field(default=None, allow_inf_nan=False, description="instead of the bundle's")
    plausible: PlausibleConfig = PlausibleConfig()
    on_overload: Literal["wait", "invalid"] | None = Field(
        default=None, description="when every slot is taken; None: invalid for live cameras, else wait"
    )
    slots: int = Field(
        default=4, ge=3, le=256, description="frames in the ring, the judged one and its predecessor included"
    )
    state_dir: Path | None = None
    log: LogConfig = LogConfig()

    def state_folder(self) -> Path:
        """Return the folder that keeps this station's sequence number over restarts."""
        if self.state_dir is not None:
            return self.state_dir / self.station
        service = os.environ.get("STATE_DIRECTORY")
        if service:
            return Path(service.split(":")[0]) / self.station
        home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        return Path(home) / "inspectord" / self.station


def load_config(path: Path) -> StationConfig:
    """Read and validate a configuration. Raises ConfigError that lists every problem with its line.

    Relative paths in it are relative to the working directory, as on the command line.
    """
    document = read_yaml(path)
    if not isinstance(document.data, dict):
        raise ConfigError(f"{path}:1: expected keys and values (station, camera, model …)")
    try:
        return StationConfig.model_validate(document.data)
    except ValidationError as error:
        raise ConfigError(describe_problems(document, StationConfig, error)) from error
