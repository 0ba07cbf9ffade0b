"""The station's configuration: what may stand in the YAML file, and what it means."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, field_validator

from daemon.addresses import Addresses, Section, load, on_as_default
from daemon.yaml_errors import ConfigError
from drivers.catalog import CameraOptions
from drivers.paths import is_file
from pipeline.bundle import MANIFEST, Bundle
from pipeline.engines import DeviceChoice, EngineChoice, PrecisionChoice, make_engine
from pipeline.inspection import Outcome
from pipeline.plausible import PlausibleLimits


def _check_bundle(path: Path) -> Path:
    try:
        found = is_file(path / MANIFEST)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP):
            return path  # a disk that is not well is no mistake in the file: reading the bundle says it
        raise ValueError(f"{path}: {error.strerror}") from error
    if not found:
        what = f"no {MANIFEST} in it" if path.is_dir() else "no such folder"
        raise ValueError(f"{path.absolute()}: {what}; train a bundle with: inspectord train DATASET -o {path}")
    return path


_LIMITS = PlausibleLimits()
_DEFAULT_DEADLINE_MS = 5000.0
_SLOTS, _SLOTS_FOR_CUDA = 4, 6
"""One frame judged, its predecessor and two that wait; CUDA judges three at once."""


class PlausibleConfig(Section):
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


class VerdictConfig(Section):
    """What is promised of each verdict, and when rejects are suspicious."""

    deadline_ms: float | None = Field(
        default=None,
        gt=0,
        le=3_600_000,
        description="from trigger or grab; None: 5000, or none with on_overload: wait",
    )
    alarm_after_rejects: int | None = Field(default=10, ge=1, description="an event after so many in a row")


class ImagesConfig(Section):
    """Which parts' images are kept beside the journal."""

    path: Path | None = Field(default=None, description="None: images in the state folder")
    keep: frozenset[Outcome] = frozenset({Outcome.NG, Outcome.INVALID})
    every_ok: int = Field(default=0, ge=0, description="keep each n-th OK part too; 0: none")
    format: Literal["png", "jpeg"] = "png"
    quota_mib: int = Field(default=2048, ge=1)
    reserve_mib: int = Field(default=1024, ge=0, description="free space on the disk that is left to others")


class SupervisionConfig(Section):
    """When something counts as hung, and how fast the camera should be."""

    hang_s: float = Field(
        default=15, ge=0.2, le=3600, description="a call into the driver or the engine that takes longer hangs"
    )
    min_rate_fps: float | None = Field(default=None, gt=0, description="health says rate_ok: false below it")


class LogConfig(Section):
    """What is logged, to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto: colour on a terminal, JSON lines elsewhere"
    )


class StationConfig(Addresses):
    """One station: one camera, one model, one stream of verdicts."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    camera: CameraOptions
    model: Annotated[Path, AfterValidator(_check_bundle)]
    device: DeviceChoice = "auto"
    precision: PrecisionChoice = Field(
        default="auto", description="of the engine; auto: the fastest that the bundle's calibration trusts"
    )
    threads: int | None = Field(default=None, ge=1, le=256, description="of the CPU engine; None: all cores")
    pin_threads: bool = Field(default=False, description="bind each of them to a core")
    threshold: float | None = Field(default=None, description="instead of the bundle's")
    plausible: PlausibleConfig = PlausibleConfig()
    on_overload: Literal["wait", "invalid"] | None = Field(
        default=None, description="when every slot is taken; None: invalid for live cameras, else wait"
    )
    slots: int | None = Field(
        default=None,
        ge=3,
        le=256,
        description="frames in the ring, the judged one and its predecessor included; None: 4, or 6 on CUDA",
    )
    verdict: VerdictConfig = VerdictConfig()
    images: Annotated[ImagesConfig | Literal[False], BeforeValidator(on_as_default)] = ImagesConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    log: LogConfig = LogConfig()

    def waits(self, *, live: bool) -> bool:
        """Tell whether the camera waits for the engine; `live`: whether it is one that cannot be held up."""
        if self.on_overload is not None:
            return self.on_overload == "wait"
        return not live and self.verdict.deadline_ms is None

    def deadline_ms(self, *, live: bool) -> float | None:
        """Return the time from trigger or grab to verdict; None where the camera waits for the engine."""
        return None if self.waits(live=live) else self.verdict.deadline_ms or _DEFAULT_DEADLINE_MS

    def frame_slots(self, *, on_cuda: bool) -> int:
        """Return how many frames the ring has room for."""
        return self.slots or (_SLOTS_FOR_CUDA if on_cuda else _SLOTS)

    def make_engine(self, bundle: Bundle) -> EngineChoice:
        """Make the engine that this station is to judge with. Raises EngineUnavailable."""
        return make_engine(bundle, self.device, self.threads, self.precision, pin_threads=self.pin_threads)


def load_config(path: Path) -> StationConfig:
    """Read and validate a configuration. Raises ConfigError that lists every problem with its line.

    Relative paths in it are relative to the working directory, as on the command line.
    """
    document, config = load(path, StationConfig)
    contradictions = [
        f"{path}:{document.line_of(location)}: {'.'.join(location)}: {message}"
        for location, message in _contradictions(config)
    ]
    if contradictions:
        raise ConfigError("\n".join(contradictions))
    return config


def _is_loopback(endpoint: str) -> bool:
    host = endpoint.removeprefix("tcp://").rpartition(":")[0]
    return endpoint.startswith("ipc://") or host in ("localhost", "[::1]") or host.startswith("127.")


def _contradictions(config: StationConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Find keys that are right each by itself and not together."""
    if config.on_overload == "wait" and config.verdict.deadline_ms is not None:
        yield ("verdict", "deadline_ms"), "cannot hold with on_overload: wait, which waits for the engine"
    if config.on_overload == "wait" and config.camera.driver == "pylon" and config.camera.pass_output is not None:
        yield (
            ("camera", "pass_output"),
            "needs a deadline: a late pulse lets another part pass; drop on_overload: wait",
        )
    if config.camera.driver == "pylon" and config.camera.pass_output is not None:
        longest_ms = 500 * config.supervision.hang_s
        if config.camera.pass_output.pulse_ms > longest_ms:
            yield (
                ("camera", "pass_output", "pulse_ms"),
                f"at most {longest_ms:g}, half of supervision.hang_s: a longer pulse would count as a hung call",
            )
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
