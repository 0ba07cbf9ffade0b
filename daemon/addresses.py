"""Where a station's files and sockets are: the part of its configuration that clients need, quick to import."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from daemon.yaml_errors import ConfigError, Document, describe_problems, read_yaml

_LONGEST_PATH = 107
"""Bytes in the name of a socket of this machine."""


def _check_endpoint(endpoint: str) -> str:
    tcp = re.fullmatch(r"tcp://(\*|[\w.\-]+|\[[0-9a-fA-F:.]+\]):(\d+)", endpoint)
    if tcp and 0 < int(tcp.group(2)) < 65536:
        return endpoint
    if re.fullmatch(r"ipc://.+", endpoint) and len(os.fsencode(endpoint)) <= _LONGEST_PATH + len("ipc://"):
        return endpoint
    raise ValueError(
        f"{endpoint!r} is not an endpoint; write tcp://127.0.0.1:5550 or ipc:///run/inspectord/line1/verdicts.sock"
    )


def _check_apart(endpoints: list[str]) -> None:
    """Refuse endpoints that cannot be bound beside one another. Raises ValueError."""
    for one, other in itertools.combinations(endpoints, 2):
        if one == other:
            raise ValueError(f"{one} is given twice; each endpoint serves one socket")
        port = one.rpartition(":")[2]
        if f"tcp://*:{port}" in (one, other) and other.endswith(f":{port}") and "[" not in one + other:
            raise ValueError(f"{one} and {other} meet (* is every address); give each a port of its own")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def on_as_default(value: Any) -> Any:
    """Take `on` for a section with all its defaults, as `off` stands for none."""
    return {} if value is True else value


Endpoint = Annotated[str, AfterValidator(_check_endpoint)]
Endpoints = Annotated[list[Endpoint], BeforeValidator(_as_list), Field(min_length=1)]


Loaded = TypeVar("Loaded", bound=BaseModel)


class Section(BaseModel):
    """A part of the configuration; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PublishConfig(Section):
    """Where ZeroMQ subscribers find us; one endpoint or a list."""

    verdicts: Endpoints = ["tcp://127.0.0.1:5550"]
    maps: Endpoints | None = None
    replay: Endpoints | None = Field(default=None, description="None: replay.sock in the runtime folder")

    def given(self) -> list[str]:
        """Return all endpoints that the configuration names here."""
        return [*self.verdicts, *(self.maps or []), *(self.replay or [])]

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        _check_apart(self.given())
        return self


class JournalConfig(Section):
    """The SQLite file that gets every verdict before it is published."""

    path: Path | None = Field(default=None, description="None: journal.sqlite in the state folder")
    keep_days: float = Field(default=400, gt=0, le=36_500)
    max_mib: int = Field(default=4096, ge=1)
    wait_ms: float = Field(
        default=50, ge=0, le=60_000, description="how long a verdict waits for it, deadline permitting"
    )


class ControlConfig(Section):
    """Where commands are taken."""

    endpoints: Endpoints | None = Field(default=None, description="None: control.sock in the runtime folder")


class SecurityConfig(Section):
    """Who may connect over TCP."""

    keys: Path | None = Field(default=None, description="folder made by: inspectord keys create NAME")
    allow_unencrypted: bool = Field(default=False, description="without keys, TCP beyond this machine all the same")


class Addresses(BaseModel):
    """Where a station's own files and sockets are; all that a client needs of a configuration."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    station: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,62}$")
    publish: PublishConfig = PublishConfig()
    state_dir: Path | None = None
    journal: Annotated[JournalConfig | Literal[False], BeforeValidator(on_as_default)] = JournalConfig()
    control: ControlConfig = ControlConfig()
    security: SecurityConfig = SecurityConfig()

    @field_validator("control")
    @classmethod
    def _beside_what_is_published(cls, control: ControlConfig, known: ValidationInfo) -> ControlConfig:
        publish: PublishConfig | None = known.data.get("publish")  # None: something is wrong there
        _check_apart([*([] if publish is None else publish.given()), *(control.endpoints or [])])
        return control

    def runtime_folder(self) -> Path:
        """Return the folder of this station's own sockets."""
        service = os.environ.get("RUNTIME_DIRECTORY")
        return Path(service.split(":")[0]) if service else self.state_folder()

    def control_endpoints(self) -> list[str]:
        """Return where commands are taken."""
        return self.control.endpoints or [f"ipc://{self.runtime_folder().absolute() / 'control.sock'}"]

    def control_address(self, *, with_keys: bool) -> str:
        """Return where a client on this machine connects to give commands; local sockets need no keys."""
        endpoints = sorted(self.control_endpoints(), key=lambda each: each.startswith("ipc://") == with_keys)
        return endpoints[0].replace("tcp://*:", "tcp://127.0.0.1:")

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


def load_addresses(path: Path) -> Addresses:
    """Read a configuration just far enough to find its daemon, whatever else is wrong in it. Raises ConfigError."""
    addresses = load(path, Addresses)[1]
    # systemd tells its folders to the service only; an operator's shell looks where the unit puts them.
    for variable, parent, service in (
        ("RUNTIME_DIRECTORY", "/run/inspectord", f"/run/inspectord/{addresses.station}"),
        ("STATE_DIRECTORY", "/var/lib/inspectord", "/var/lib/inspectord"),
    ):
        if (Path(parent) / addresses.station).is_dir():
            os.environ.setdefault(variable, service)
    return addresses


def load(path: Path, kind: type[Loaded]) -> tuple[Document, Loaded]:
    """Read and validate a file as a model. Raises ConfigError that lists every problem with its line."""
    document = read_yaml(path)
    if not isinstance(document.data, dict):
        raise ConfigError(f"{path}:1: expected keys and values (station, camera, model …)")
    try:
        config = kind.model_validate(document.data)
    except ValidationError as error:
        raise ConfigError(describe_problems(document, kind, error)) from error
    misread = [
        f"{path}:{document.line_of(location)}: {'.'.join(location)}: input should be a number (given: "
        f"{'yes, on or true' if value else 'no, off or false'})"
        for location, value in _truths_for_numbers(document.data, config)
    ]
    if misread:
        raise ConfigError("\n".join(misread))
    return document, config


def _truths_for_numbers(data: Mapping[Any, Any], config: BaseModel) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Find where yes or no was taken for 1 or 0, with the path to it."""
    for name, value in data.items():
        taken = getattr(config, name, None) if isinstance(name, str) else None
        if isinstance(value, bool) and isinstance(taken, int | float) and not isinstance(taken, bool):
            yield (name,), value
        elif isinstance(value, Mapping) and isinstance(taken, BaseModel):
            yield from (((name, *below), truth) for below, truth in _truths_for_numbers(value, taken))
