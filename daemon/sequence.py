"""The station's sequence numbers: gapless, and remembered over restarts and crashes."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import secrets
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

_MEMORY = Path("/dev/shm")
_MAGIC, _FIRST_MAGIC = b"INSPSEQ2", b"INSPSEQ1"
_LAYOUT, _FIRST_LAYOUT = struct.Struct("<8sQQQ"), struct.Struct("<8sQQ")
"""Magic, last number given out, last one with a verdict, random name of this file; at first without the name."""
_GRABBED_AT, _PUBLISHED_AT = 8, 16
_NUMBER = struct.Struct("<Q")
_COPY_PERIOD_S = 0.05


class StateError(Exception):
    """The state folder cannot be used; the message says why and what to do."""


class SequenceFile:
    """Two counters: the last number given out, and the last one with a verdict.

    A write is a store to a page of a file in memory. It survives kill -9, and no disk can delay it: a store to a
    page of a file on a disk stops the whole process while that disk's filesystem stands still. A thread copies the
    counters into the state folder, which counts after the machine has been restarted; after a power cut numbers may
    repeat, under another boot id.
    """

    def __init__(self, folder: Path, report: Callable[[str | None], None] = lambda _error: None) -> None:
        """Open or create the file and lock it.

        Args:
            folder: the station's own.
            report: told why the counters cannot be copied into the folder; None: they can again.

        Raises StateError.
        """
        path = folder / "sequence"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StateError(f"{path}: {error.strerror}; set state_dir to a writable folder") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.grabbed, self.published, self._name = _read(self._fd)
            self._copy()
            # By the folder, too: a copy of it is another station's.
            own = hashlib.blake2b(f"{self._name} {folder.resolve()}".encode(), digest_size=8).hexdigest()
            self._memory: Path | None = _MEMORY / f"inspectord-{own}"
            self._map = self._map_memory(self._memory)
        except BlockingIOError as error:
            os.close(self._fd)
            raise StateError(
                f"{path} is in use: another inspectord runs this station; stop it or choose another station"
            ) from error
        except (OSError, ValueError) as error:
            os.close(self._fd)
            raise StateError(
                f"{path}: {error}; delete it to count on from the journal (from 1 without one)"
            ) from error
        self._report = report
        self._closing = threading.Event()
        self._copier = threading.Thread(target=self._keep_copied, name="sequence", daemon=True)
        self._copier.start()

    def next(self) -> int:
        """Give out the next number; it is remembered before anyone sees it. Not for two threads at once."""
        self.grabbed += 1
        _NUMBER.pack_into(self._map, _GRABBED_AT, self.grabbed)
        return self.grabbed

    def mark_published(self, sequence: int) -> None:
        """Remember that this number, and all before it, have their verdicts. Called by one thread only."""
        self.published = sequence
        _NUMBER.pack_into(self._map, _PUBLISHED_AT, sequence)

    def at_least(self, published: int) -> None:
        """Learn from elsewhere (the journal) which number was the last with a verdict."""
        if published > self.grabbed:
            self.grabbed = published
            _NUMBER.pack_into(self._map, _GRABBED_AT, published)
        if published > self.published:
            self.mark_published(published)

    def without_verdict(self) -> range:
        """Return the numbers that were given out and have no verdict yet."""
        return range(self.published + 1, self.grabbed + 1)

    def close(self) -> None:
        """Copy, flush to the disk and unlock. Raises OSError when the disk refuses; memory then has the numbers."""
        if self._map.closed:
            return
        self._closing.set()
        self._copier.join()
        self._map.close()
        try:
            self._copy()
            os.fsync(self._fd)
            if self._memory is not None:
                self._memory.unlink(missing_ok=True)
        finally:
            os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _map_memory(self, path: Path) -> mmap.mmap:
        """Map the counters' page, and take over what an earlier run has left there.

        Where there is no such filesystem, or no room in it, the page of the state folder's own file will do.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                if os.fstat(fd).st_size:
                    grabbed, published, _ = _read(fd)
                    self.grabbed, self.published = max(self.grabbed, grabbed), max(self.published, published)
                os.pwrite(fd, self._counters(), 0)  # memory that is full is an error here, and a fatal signal later
                return mmap.mmap(fd, _LAYOUT.size)
            finally:
                os.close(fd)
        except OSError:
            self._memory = None
            self._copy()
            return mmap.mmap(self._fd, _LAYOUT.size)

    def _keep_copied(self) -> None:
        copied, failing = None, False
        while not self._closing.wait(_COPY_PERIOD_S):
            now = (self.grabbed, self.published)
            if now == copied:
                continue
            try:
                self._copy()
            except OSError as error:
                if not failing:
                    self._report(str(error))
                failing = True
                continue
            if failing:
                self._report(None)
            copied, failing = now, False

    def _copy(self) -> None:
        os.pwrite(self._fd, self._counters(), 0)

    def _counters(self) -> bytes:
        published = self.published  # first: it must not be ahead of the other
        return _LAYOUT.pack(_MAGIC, self.grabbed, published, self._name)


def _read(fd: int) -> tuple[int, int, int]:
    """Return both counters and the name. Raises OSError, or ValueError when the file is damaged."""
    data = os.pread(fd, _LAYOUT.size + 1, 0)
    name = secrets.randbits(64)
    if not data:
        return 0, 0, name
    if len(data) == _FIRST_LAYOUT.size and data.startswith(_FIRST_MAGIC):
        _, grabbed, published = _FIRST_LAYOUT.unpack(data)
    elif len(data) == _LAYOUT.size and data.startswith(_MAGIC):
        _, grabbed, published, name = _LAYOUT.unpack(data)
    else:
        raise ValueError("it is damaged")
    if published > grabbed:
        raise ValueError("it is damaged")
    return grabbed, published, name
