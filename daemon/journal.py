"""The journal: every verdict in an SQLite file before anyone sees it, and nobody waits for a slow disk.

One thread writes (WAL mode, one transaction for whatever has gathered), another flushes the write-ahead log to the
disk and checkpoints it. A commit is with the operating system, so it survives kill -9; a power cut loses at most
what was committed since the last flush.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from daemon.events import EventKind, Events

FLUSH_PERIOD_S = 0.05
_RETRY_S = 0.25
_BUSY_MS = 200
_READ_ROWS = 1000
_BATCH = 256
_WAITING = 10_000
"""Verdicts that may wait for a journal that stands still; the oldest are given up, and counted."""
_CHECKPOINT_BYTES, _LARGEST_LOG_BYTES = 8 << 20, 64 << 20
"""The write-ahead log is checkpointed beside the writer; if that never catches up with it, by the writer."""
_TRIM_PERIOD_S = 1.0
_TRIM_ROWS = 500
_CLOCK_STEPPED_NS = 3600 * 10**9
"""A wall clock that has moved this far against the time since the start says nothing about age any more."""
MOST_UNWRITTEN = _WAITING + _BATCH
"""Verdicts that are not in the file yet, and may still come into it."""
_APPLICATION_ID = 0x494E5350  # "INSP", in the file's header
_SCHEMA = """
CREATE TABLE IF NOT EXISTS station (name TEXT NOT NULL, schema INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS verdicts (
    sequence INTEGER PRIMARY KEY, time_ns INTEGER NOT NULL, boot TEXT NOT NULL,
    verdict TEXT NOT NULL, reason TEXT, score REAL, body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS verdicts_by_time ON verdicts (time_ns);
"""


class JournalError(Exception):
    """The journal cannot be read; the message names the file and says why."""


class NoJournal(JournalError):
    """There is no journal to be read."""


def _held_lock() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass(eq=False, slots=True)
class Record:
    """One verdict on its way into the journal."""

    sequence: int
    time_ns: int
    boot: str
    verdict: str
    reason: str | None
    score: float | None
    body: bytes
    """The verdict as published; replaced when it had to go out without waiting."""
    submitted_ns: int = field(default_factory=time.monotonic_ns)
    _unsettled: threading.Lock = field(default_factory=_held_lock)
    """Held until it is settled: who waits for a lock wakes sooner than who waits for an event."""
    _settled: bool = False
    _written: bool = False

    def settle(self, written: bool) -> None:
        """Say whether it is in the journal. Not for two threads at once."""
        self._written = written
        if not self._settled:
            self._settled = True
            self._unsettled.release()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is known to be in the journal; False when it is not, or not yet. For one thread."""
        return (self._settled or self._unsettled.acquire(timeout=max(0.0, timeout_s))) and self._written


@dataclass(frozen=True, slots=True)
class Retention:
    """How long verdicts are kept."""

    days: float
    largest_bytes: int


class Journal:
    """Writes verdicts; `submit` never waits, the returned record can be waited for."""

    def __init__(self, path: Path, station: str, retention: Retention, events: Events) -> None:
        self.path = path
        self._log = path.with_name(f"{path.name}-wal")
        self._station = station
        self._retention = retention
        self._events = events
        self._waiting: deque[Record] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._connection: sqlite3.Connection | None = None
        self._opened_as: tuple[int, int] | None = None
        """The file behind the connection."""
        self._log_opened_as: tuple[int, int] | None = None
        self._trimmed_s = self._shorten_s = 0.0
        self._opened_ahead_ns = _wall_clock_ahead_ns()
        self._dirty = threading.Event()
        self.lagging = False
        """It could not take a verdict in time and has not caught up: nobody should wait for it."""
        self.error: str | None = None
        self.flush_error: str | None = None
        self.written = 0
        self.given_up = 0
        """Verdicts that never came into the journal."""
        self._written_all = threading.Event()

    def open(self) -> int:
        """Open the file. Returns the last number in it; 0 when it is empty or cannot be opened."""
        try:
            self._connection = self._open()
            (last,) = self._connection.execute("SELECT coalesce(max(sequence), 0) FROM verdicts").fetchone()
        except (sqlite3.Error, OSError) as error:
            self._failed(error)
            return 0
        return int(last)

    def submit(self, record: Record) -> None:
        """Hand a verdict over."""
        with self._changed:
            if len(self._waiting) >= _WAITING:
                self._waiting.popleft().settle(False)
                self.given_up += 1
            self._waiting.append(record)
            self._changed.notify()

    def lag(self) -> None:
        """Note that a verdict went out without having been waited for."""
        if not self.lagging:
            self.lagging = True
            self._events.say(EventKind.JOURNAL, "the journal is too slow; verdicts go out unjournaled")

    def close(self) -> None:
        """Let `write` end once what waits is written, and `flush` after it."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_MS / 1000, isolation_level=None, check_same_thread=False
        )
        try:
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if application not in (0, _APPLICATION_ID) or (application == 0 and tables):
                raise sqlite3.DatabaseError("this is another program's database")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("PRAGMA wal_autocheckpoint=0")
            # A log that begins anew after a checkpoint is cut to this, or it would look too long for ever.
            connection.execute(f"PRAGMA journal_size_limit={_CHECKPOINT_BYTES}")
            connection.execute(f"PRAGMA application_id={_APPLICATION_ID}")
            connection.executescript(_SCHEMA)
            known = connection.execute("SELECT name FROM station").fetchone()
            if known is None:
                connection.execute("INSERT INTO station VALUES (?, 1)", (self._station,))
            elif known[0] != self._station:
                raise sqlite3.DatabaseError(f"it belongs to station {known[0]}")
            self._opened_as, self._log_opened_as = _identity(self.path), _identity(self._log)
        except BaseException:
            connection.close()
            raise
        return connection

    def write(self) -> None:
        """Write what is submitted until `close`; the work of one thread."""
        retry_s = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing, _TRIM_PERIOD_S)
                if self._closing and (not self._waiting or self._connection is None):
                    break
                batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
            try:
                if self._connection is None:
                    if time.monotonic() < retry_s:
                        self._keep_for_later(batch)
                        continue
                    self._connection = self._open()
                if batch and _identity(self.path) != self._opened_as:
                    self._leave_file(self._connection)
                    raise OSError("its file was deleted or replaced; it is begun anew")
                self._write(self._connection, batch)
                batch = []
                self._trim(self._connection)
                self._shorten_log(self._connection)
                self._tell_that_it_works()
            except (sqlite3.Error, OSError) as error:
                self._failed(error)
                retry_s = time.monotonic() + _RETRY_S
                self._keep_for_later(batch)
            except BaseException:
                self._keep_for_later(batch)  # for this thread's successor
                raise
        with self._changed:
            self.given_up += len(self._waiting)
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):  # the disk may be gone; what is written is written
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._connection.close()
            self._connection = None
        self._written_all.set()

    def _leave_file(self, connection: sqlite3.Connection) -> None:
        """Part with a file that was taken away: SQLite would apply its log to the one in its place."""
        with contextlib.suppress(sqlite3.Error):  # the disk may be gone
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        self._connection = None
        if self._log_opened_as is not None and _identity(self._log) == self._log_opened_as:
            for file in (self._log, self.path.with_name(f"{self.path.name}-shm")):
                file.unlink(missing_ok=True)

    def _write(self, connection: sqlite3.Connection, batch: list[Record]) -> None:
        if not batch:
            return
        connection.execute("BEGIN IMMEDIATE")  # a body may be replaced while this waits
        connection.executemany(
            # A number that repeats under another boot (after a power cut) is another part.
            "INSERT INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (sequence) DO UPDATE SET "
            "time_ns = excluded.time_ns, boot = excluded.boot, verdict = excluded.verdict, "
            "reason = excluded.reason, score = excluded.score, body = excluded.body WHERE boot != excluded.boot",
            [(r.sequence, r.time_ns, r.boot, r.verdict, r.reason, r.score, r.body) for r in batch],
        )
        connection.execute("COMMIT")
        for record in batch:
            record.settle(True)
        self.written += len(batch)
        self._dirty.set()

    def _tell_that_it_works(self) -> None:
        """Say so once what failed or lagged works again; also in an idle time."""
        with self._changed:
            caught_up = not self._waiting
        if caught_up and (self.lagging or self.error):
            self.lagging, self.error = False, None
            self._events.say(EventKind.JOURNAL, "the journal has caught up", level="info", given_up=self.given_up)

    def _keep_for_later(self, batch: list[Record]) -> None:
        """Answer who waits, and try again when the journal works."""
        for record in batch:
            record.settle(False)
        with self._changed:
            self._waiting.extendleft(reversed(batch))
            self._changed.wait_for(lambda: self._closing, FLUSH_PERIOD_S)

    def _failed(self, error: Exception) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):  # it has failed already
                connection.close()
        self.lagging = True
        if self.error != str(error):
            self.error = str(error)
            self._events.say(
                EventKind.JOURNAL,
                "the journal cannot be written; inspection goes on, verdicts go out unjournaled",
                level="error",
                path=str(self.path),
                error=str(error),
            )

    def _shorten_log(self, connection: sqlite3.Connection) -> None:
        """Checkpoint here when the log has grown all the same; without waiting for whoever reads it."""
        now_s = time.monotonic()
        if now_s < self._shorten_s or self._log_bytes() <= _LARGEST_LOG_BYTES:
            return
        connection.execute("PRAGMA busy_timeout=0")
        busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        connection.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
        self._shorten_s = now_s + (FLUSH_PERIOD_S if busy else _TRIM_PERIOD_S)

    def _trim(self, connection: sqlite3.Connection) -> None:
        """Delete what is too old or too much, a little at a time."""
        now_s = time.monotonic()
        if now_s - self._trimmed_s < _TRIM_PERIOD_S:
            return
        self._trimmed_s = now_s
        oldest_ns = time.time_ns() - int(self._retention.days * 86400e9)
        if abs(_wall_clock_ahead_ns() - self._opened_ahead_ns) > _CLOCK_STEPPED_NS:
            oldest_ns = 0  # nobody knows how old anything is
        pages, free, page_bytes = (
            connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        condition, order, values = "time_ns < ?", "time_ns", (oldest_ns,)  # both by an index
        if (pages - free) * page_bytes > self._retention.largest_bytes:
            condition, order, values = "?", "sequence", (1,)
        deleted = connection.execute(
            f"DELETE FROM verdicts WHERE sequence IN (SELECT sequence FROM verdicts WHERE {condition} "
            f"ORDER BY {order} LIMIT {_TRIM_ROWS})",
            values,
        ).rowcount
        if deleted:
            self._dirty.set()
            self._trimmed_s = 0.0  # there may be more

    def flush(self) -> None:
        """Flush to the disk what was written, every 50 ms, and checkpoint; the work of another thread."""
        while not self._written_all.is_set():
            if not self._dirty.wait(FLUSH_PERIOD_S):
                continue
            began_s = time.monotonic()
            self._dirty.clear()
            try:
                _fsync(self._log)
                if self._log_bytes() > _CHECKPOINT_BYTES:
                    self._checkpoint()
            except FileNotFoundError:
                continue  # a checkpoint at the end has removed it
            except (OSError, sqlite3.Error) as error:
                self._failed_to_flush(error)
            else:
                self.flush_error = None
            self._written_all.wait(max(0.0, FLUSH_PERIOD_S - (time.monotonic() - began_s)))

    def _failed_to_flush(self, error: Exception) -> None:
        if self.flush_error != str(error):
            self.flush_error = str(error)
            said = "the journal cannot be flushed to the disk; a power cut would lose verdicts"
            self._events.say(EventKind.JOURNAL, said, level="error", error=str(error))

    def _log_bytes(self) -> int:
        try:
            return self._log.stat().st_size
        except FileNotFoundError:
            return 0

    def _checkpoint(self) -> None:
        with contextlib.closing(sqlite3.connect(self.path, timeout=0.2, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()


def _wall_clock_ahead_ns() -> int:
    """Return how far the wall clock is ahead of the time since the start, sleep included."""
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _identity(path: Path) -> tuple[int, int] | None:
    """Tell a file from another of its name; None where there is none. Raises OSError."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Query:
    """Which verdicts of a journal are wanted."""

    first_sequence: int = 0
    last_sequence: int | None = None
    since_ns: int | None = None
    until_ns: int | None = None
    verdict: str | None = None
    reason: str | None = None
    limit: int | None = None


def _opened_to_read(path: Path) -> sqlite3.Connection:
    address = f"{path.absolute().as_uri()}?mode=ro"
    db = sqlite3.connect(address, uri=True, timeout=2)
    try:
        db.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.OperationalError as error:
        db.close()
        refused = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
        if not refused or path.with_name(f"{path.name}-wal").exists():
            raise
        # Who may not write to the folder cannot make the log that a reader wants; without one nobody writes.
        return sqlite3.connect(f"{address}&immutable=1", uri=True)
    return db


def read_journal(path: Path, query: Query) -> Iterator[tuple[int, bytes]]:
    """Yield (sequence, body) in the order of sequence, also while a daemon writes.

    Raises NoJournal where there is none, and JournalError where it cannot be read.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise NoJournal(f"{path.absolute()}: no journal there") from None
    except OSError as error:  # of a disk or a share that is not well
        raise JournalError(f"{path.absolute()}: {error.strerror}") from error
    conditions: list[str] = ["sequence >= ?"]
    values: list[int | str] = []
    named: tuple[tuple[str, int | str | None], ...] = (
        ("sequence <= ?", query.last_sequence),
        ("time_ns >= ?", query.since_ns),
        ("time_ns < ?", query.until_ns),
        ("verdict = ?", query.verdict),
        ("reason = ?", query.reason),
    )
    for condition, value in named:
        if value is not None:
            conditions.append(condition)
            values.append(value)
    statement = f"SELECT sequence, body FROM verdicts WHERE {' AND '.join(conditions)} ORDER BY sequence LIMIT ?"
    left, first = -1 if query.limit is None else query.limit, query.first_sequence
    try:
        with contextlib.closing(_opened_to_read(path)) as db:
            # A piece at a time: a reader that holds its transaction open would keep the log from being shortened.
            while left:
                rows = min(_READ_ROWS, left) if left > 0 else _READ_ROWS
                piece = db.execute(statement, (first, *values, rows)).fetchall()
                yield from piece
                if len(piece) < rows:
                    return
                first, left = piece[-1][0] + 1, left - rows if left > 0 else left
    except sqlite3.Error as error:
        raise JournalError(f"{path.absolute()}: {error}") from error
