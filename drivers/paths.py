"""What lies at a path; a disk that fails says so.

`Path.is_file` and its like take that for "nothing there" since Python 3.14, `glob` and `rglob` since 3.13.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_LASTING = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG),
    None,
}
"""Errors of a path that is wrong, and of what never was a system call's."""


def may_pass(error: OSError) -> bool:
    """Tell whether a disk or a share is to blame, which may be well again."""
    return error.errno not in _LASTING


def exists(path: Path) -> bool:
    """Tell whether there is anything. Raises OSError."""
    return _mode(path) != 0


def is_file(path: Path) -> bool:
    """Tell whether there is a file. Raises OSError."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Tell whether there is a folder. Raises OSError."""
    return stat.S_ISDIR(_mode(path))


def names_in(folder: Path) -> list[str]:
    """List what lies in a folder, sorted; nothing where there is no such folder. Raises OSError."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def files_below(folder: Path) -> Iterator[Path]:
    """Find all files in a folder, none where there is no such folder, and in those in it that may be read.

    Raises OSError.
    """

    def fail(error: OSError) -> None:
        is_strangers = isinstance(error, PermissionError) and error.filename != os.fspath(
            folder
        )  # as lost+found is
        if not (is_strangers or isinstance(error, FileNotFoundError)):
            raise error

    for below, _, names in os.walk(folder, onerror=fail):
        yield from (Path(below, name) for name in names)


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
