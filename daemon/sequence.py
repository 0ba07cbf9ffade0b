"""The station's sequence numbers: gapless, and remembered over restarts and crashes."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

_MAGIC = b"INSPSEQ1"
_LAYOUT = struct.Struct("<8sQQ")
_GRABBED_AT, _PUBLISHED_AT = 8, 16
_NUMBER = struct.Struct("<Q")


class StateError(Exception):
    """The state folder cannot be used; the message says why and what to do."""


class SequenceFile:
    """Two counters in a memory-mapped file: the last number given out, and the last one with a verdict.

    A write is a store to memory that belongs to the operating system, so it survives kill -9. It is flushed
    to the disk when the daemon ends; after a power cut numbers may repeat, under another boot id.
    """

    def __init__(self, folder: Path) -> None:
        """Open or create the file and lock it. Raises StateError."""
        path = folder / "sequence"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StateError(f"{path}: {error.strerror}; set state_dir to a writable folder") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._fd).st_size == 0:
                os.pwrite(self._fd, _LAYOUT.pack(_MAGIC, 0, 0), 0)
            self._map = mmap.mmap(self._fd, _LAYOUT.size)
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
        magic, grabbed, published = _LAYOUT.unpack_from(self._map)
        self.grabbed, self.published = int(grabbed), int(published)
        if magic != _MAGIC or self.published > self.grabbed:
            self.close()
            raise StateError(f"{path} is damaged; delete it to count on from the journal")

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
        """Flush to the disk and unlock."""
        if self._map.closed:
            return
        self._map.flush()
        self._map.close()
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
