"""What may change while a station runs."""

from __future__ import annotations

from daemon.config import StationConfig

_FIXED = (
    "station",
    "publish",
    "state_dir",
    "control",
    "slots",
    "on_overload",
    "journal",
    "images",
    "supervision",
    "log",
)
"""Keys that sockets, files and threads are made from."""


class ReloadRefused(Exception):
    """A reload that cannot be done; the message says why, and nothing has changed."""


def check_changes(old: StationConfig, new: StationConfig) -> None:
    """Raise ReloadRefused when a key has changed that needs a restart."""
    changed = [key for key in _FIXED if getattr(old, key) != getattr(new, key)]
    if old.security != new.security:  # the keys in the folder may change, not the folder
        changed.append("security")
    if changed:
        raise ReloadRefused(f"cannot change while running: {', '.join(changed)}; restart the daemon for that")
