"""The station's configuration: what may stand in the YAML file, and what it means."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

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

from daemon.yaml_errors import ConfigError, Document, describe_problems, read_yaml
from drivers.catalog import CameraOptions
from pipeline.bundle import MANIFEST
from pipeline.inspect import Outcome
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


def _is_loopback(endpoint: str) -> bool:
    host = endpoint.removeprefix("tcp://").rpartition(":")[0]
    return endpoint.startswith("ipc://") or host in ("localhost", "[::1]") or host.startswith("127.")


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


_Loaded = TypeVar("_Loaded", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PublishConfig(_Section):
    """Where ZeroMQ subscribers find us; one endpoint or a list."""

    verdicts: Endpoints = ["tcp://127.0.0.1:5550"]
    maps: Endpoints | None = None
    replay: Endpoints | None = Field(default=None, description="None: replay.sock in the runtime folder")

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        endpoints = [*self.verdicts, *(self.maps or []), *(self.replay or [])]
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


class VerdictConfig(_Section):
    """What is promised of each verdict, and when rejects are suspicious."""

    deadline_ms: float | None = Field(
        default=None,
        gt=0,
        le=3_600_000,
        description="from trigger or grab; None: 5000, or none with on_overload: wait",
    )
    alarm_after_rejects: int | None = Field(default=10, ge=1, description="an event after so many in a row")


class JournalConfig(_Section):
    """The SQLite file that gets every verdict before it is published."""

    path: Path | None = Field(default=None, description="None: journal.sqlite in the state folder")
    keep_days: float = Field(default=400, gt=0)
    max_mib: int = Field(default=4096, ge=1)
    wait_ms: float = Field(default=50, ge=0, description="how long a verdict waits for it, deadline permitting")


class ImagesConfig(_Section):
    """Which parts' images are kept beside the journal."""

    path: Path | None = Field(default=None, description="None: images in the state folder")
    keep: frozenset[Outcome] = frozenset({Outcome.NG, Outcome.INVALID})
    every_ok: int = Field(default=0, ge=0, description="keep each n-th OK part too; 0: none")
    format: Literal["png", "jpeg"] = "png"
    quota_mib: int = Field(default=2048, ge=1)
    reserve_mib: int = Field(default=1024, ge=0, description="free space on the disk that is left to others")


class ControlConfig(_Section):
    """Where commands are taken."""

    endpoints: Endpoints | None = Field(default=None, description="None: control.sock in the runtime folder")


class SecurityConfig(_Section):
    """Who may connect over TCP."""

    keys: Path | None = Field(default=None, description="folder made by: inspectord keys create NAME")
    allow_unencrypted: bool = Field(default=False, description="without keys, TCP beyond this machine all the same")


class SupervisionConfig(_Section):
    """When something counts as hung, and how fast the camera should be."""

    hang_s: float = Field(
        default=15, gt=0, description="a call into the driver or the engine that takes longer hangs"
    )
    min_rate_fps: float | None = Field(default=None, gt=0, description="health says rate_ok: false below it")


class LogConfig(_Section):
    """What is logged, to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto: colour on a terminal, JSON lines elsewhere"
    )


class Addresses(BaseModel):
    """Where a station's own files and sockets are; all that a client needs of a configuration."""

    model_config = ConfigDict(frozen=True)

    station: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,62}$")
    publish: PublishConfig = PublishConfig()
    state_dir: Path | None = None
    journal: JournalConfig | Literal[False] = JournalConfig()
    control: ControlConfig = ControlConfig()
    security: SecurityConfig = SecurityConfig()

    def runtime_folder(self) -> Path:
        """Return the folder of this station's own sockets."""
        service = os.environ.get("RUNTIME_DIRECTORY")
        return Path(service.split(":")[0]) if service else self.state_folder()

    def control_endpoints(self) -> list[str]:
        """Return where commands are taken."""
        return self.control.endpoints or [f"ipc://{self.runtime_folder().absolute() / 'control.sock'}"]

    def replay_endpoints(self) -> list[str]:
        """Return where verdicts can be had again."""
        return self.publish.replay or [f"ipc://{self.runtime_folder().absolute() / 'replay.sock'}"]

    def journal_path(self) -> Path | None:
        """Return the journal's file; None when there is none."""
        return None if self.journal is False else self.journal.path or self.state_folder() / "journal.sqlite"

    def state_folder(self) -> Path:
        """Return the folder that keeps what must survive restarts."""
        if self.state_dir is not None:
            return self.state_dir / self.station
        service = os.environ.get("STATE_DIRECTORY")
        if service:
            return Path(service.split(":")[0]) / self.station
        home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        return Path(home) / "inspectord" / self.station


class StationConfig(Addresses):
    """One station: one camera, one model, one stream of verdicts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    camera: CameraOptions
    model: Annotated[Path, AfterValidator(_check_bundle)]
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
    verdict: VerdictConfig = VerdictConfig()
    images: ImagesConfig | Literal[False] = ImagesConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    log: LogConfig = LogConfig()


def load_config(path: Path) -> StationConfig:
    """Read and validate a configuration. Raises ConfigError that lists every problem with its line.

    Relative paths in it are relative to the working directory, as on the command line.
    """
    document, config = _load(path, StationConfig)
    contradictions = [
        f"{path}:{document.line_of(location)}: {'.'.join(location)}: {message}"
        for location, message in _contradictions(config)
    ]
    if contradictions:
        raise ConfigError("\n".join(contradictions))
    return config


def load_addresses(path: Path) -> Addresses:
    """Read a configuration just far enough to find its daemon, whatever else is wrong in it. Raises ConfigError."""
    addresses = _load(path, Addresses)[1]
    # systemd tells its folders to the service only; an operator's shell looks where the unit puts them.
    for variable, parent, service in (
        ("RUNTIME_DIRECTORY", "/run/inspectord", f"/run/inspectord/{addresses.station}"),
        ("STATE_DIRECTORY", "/var/lib/inspectord", "/var/lib/inspectord"),
    ):
        if (Path(parent) / addresses.station).is_dir():
            os.environ.setdefault(variable, service)
    return addresses


def _load(path: Path, kind: type[_Loaded]) -> tuple[Document, _Loaded]:
    document = read_yaml(path)
    if not isinstance(document.data, dict):
        raise ConfigError(f"{path}:1: expected keys and values (station, camera, model …)")
    try:
        return document, kind.model_validate(document.data)
    except ValidationError as error:
        raise ConfigError(describe_problems(document, kind, error)) from error


def _contradictions(config: StationConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Find keys that are right each by itself and not together."""
    if config.on_overload == "wait" and config.verdict.deadline_ms is not None:
        yield ("verdict", "deadline_ms"), "cannot hold with on_overload: wait, which waits for the engine"
    if config.security.keys is not None or config.security.allow_unencrypted:
        return
    publish = config.publish
    for location, endpoints in (
        (("publish", "verdicts"), publish.verdicts),
        (("publish", "maps"), publish.maps),
        (("publish", "replay"), publish.replay),
        (("control", "endpoints"), config.control.endpoints),
    ):
        for endpoint in endpoints or ():
            if not _is_loopback(endpoint):
                yield (
                    location,
                    f"{endpoint} is open to the network without keys: use 127.0.0.1, or set security.keys after "
                    "`inspectord keys create NAME`, or security.allow_unencrypted: true",
                )
