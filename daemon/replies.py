"""Requests and replies of the control and replay sockets, strictly validated."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

MAX_REQUEST_BYTES = 65_536

Id = Annotated[str, msgspec.Meta(max_length=128)]
Part = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,62}\Z")]
Sequence = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="command", tag=str.lower):
    id: Id = ""
    """Comes back in the reply."""


class Status(_Request, frozen=True):
    """What a health message would say now."""


class Trigger(_Request, frozen=True):
    """Expose one part now; its verdict carries `trigger` (the request's id) and `part`."""

    part: Part | None = None


class Pause(_Request, frozen=True):
    """Stop grabbing; the camera is closed."""


class Resume(_Request, frozen=True):
    """Grab again."""


class Reload(_Request, frozen=True):
    """Read the configuration, the bundle and the keys again."""


class Snapshot(_Request, frozen=True):
    """Send the next judged frame as a PNG file, in a binary part after the reply."""

    overlay: bool = False
    """In colour, with its anomaly map laid over it, instead of the camera's own samples."""


class Capture(_Request, frozen=True):
    """Keep the next good frames in a folder below the state folder."""

    count: Count = 1
    name: Name = "capture"


class Stop(_Request, frozen=True):
    """End the daemon as SIGTERM does."""


Command = Status | Trigger | Pause | Resume | Reload | Snapshot | Capture | Stop

LATER = Reload | Snapshot | Capture
"""Commands that are answered when they are done."""


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"first": "from", "last": "to"}):
    """Which verdicts to replay, both ends included; without `from` only the last one."""

    first: Sequence | None = None
    last: Sequence | None = None


class Replay(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ask for verdicts again."""

    replay: Range
    id: Id = ""


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """Answer to a command; exactly one of `result` and `error` is there."""

    id: str
    ok: bool
    result: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    error: str | msgspec.UnsetType = msgspec.UNSET


class ReplayReply(msgspec.Struct, frozen=True):
    """Head of one piece of a replay; the verdicts follow it, one message part each."""

    id: str
    ok: bool
    verdicts: int
    missing: list[list[int]]
    """Ranges [first, last] that nobody has any more."""
    more: bool
    next: int
    """First number that this piece does not cover; after the last piece, the live messages begin there."""


class BadRequest(Exception):
    """A request that cannot be understood; the message says why."""


_command: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)
_replay = msgspec.json.Decoder(Replay)


def read_command(body: bytes) -> Command:
    """Decode a command. Raises BadRequest."""
    try:
        return _command.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(str(error)) from error


def read_replay(body: bytes) -> Replay:
    """Decode a request for replay. Raises BadRequest."""
    try:
        return _replay.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(str(error)) from error


def id_of(body: bytes) -> str:
    """Return the id of a request that may be bad otherwise; empty when there is none."""
    try:
        found = msgspec.json.decode(body).get("id", "")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, AttributeError):
        return ""
    return found if isinstance(found, str) and len(found) <= 128 else ""
