from __future__ import annotations

import contextlib
import errno
import itertools
import json
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import structlog
import typer

from daemon.cli_errors import clear_errors
from daemon.events import EventKind, Events, Outbox
from daemon.journal import Journal, JournalError, NoJournal, Query, Record, Retention, read_journal

ROOT = Path(__file__).parents[2]
FOREVER = Retention(days=1e5, largest_bytes=1 << 40)


@pytest.fixture
def events():
    return Events("s", "b", Outbox(), structlog.ReturnLogger())


class RunningJournal(Journal):
    """A journal with its two threads, as the station runs it."""

    def start(self):
        last = self.open()
        self.threads = [threading.Thread(target=work) for work in (self.write, self.flush)]
        for thread in self.threads:
            thread.start()
        return last

    def end(self):
        self.close()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture
def journal(tmp_path, events):
    made = []

    def make(path=tmp_path / "journal.sqlite", station="s", retention=FOREVER):
        made.append(RunningJournal(path, station, retention, events))
        return made[-1]

    yield make
    for each in made:
        each.end()


def record(sequence, verdict="OK", reason=None, time_ns=None, pad=0):
    body = json.dumps({"sequence": sequence, "pad": "x" * pad}).encode()
    stamp = sequence * 1_000_000_000 if time_ns is None else time_ns
    return Record(sequence, stamp, "boot", verdict, reason, 0.5, body)


def numbers(path, **query):
    return [sequence for sequence, _ in read_journal(path, Query(**query))]


def test_a_verdict_is_with_the_operating_system_before_anyone_is_told(tmp_path):
    """A process that is killed at once after `wait` has lost nothing."""
    code = (
        "import os, signal, structlog, sys; from pathlib import Path\n"
        "from daemon.events import Events, Outbox; from daemon.journal import Journal, Record, Retention\n"
        "import threading; e = Events('s', 'b', Outbox(), structlog.get_logger())\n"
        "j = Journal(Path(sys.argv[1]), 's', Retention(1e5, 1 << 40), e)\n"
        "assert j.open() == 0; threading.Thread(target=j.write, daemon=True).start()\n"
        "for n in range(1, 51):\n"
        "    r = Record(n, n, 'b', 'OK', None, 0.5, b'{}'); j.submit(r); assert r.wait(30)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "j.sqlite"
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -signal.SIGKILL
    assert numbers(path) == list(range(1, 51))


def test_the_last_number_is_known_at_the_next_start(journal):
    first = journal()
    assert first.start() == 0
    for n in (1, 2, 3):
        first.submit(record(n))
    first.end()
    assert journal().start() == 3


def test_queries(journal, tmp_path):
    made = journal()
    made.start()
    for n in range(1, 11):
        made.submit(record(n, "NG" if n % 3 == 0 else "OK", "lost" if n == 5 else None))
    made.end()
    path = made.path
    assert numbers(path) == list(range(1, 11))
    assert numbers(path, first_sequence=4, last_sequence=6) == [4, 5, 6]
    assert numbers(path, verdict="NG") == [3, 6, 9]
    assert numbers(path, reason="lost") == [5]
    assert numbers(path, since_ns=3_000_000_000, until_ns=5_000_000_000) == [3, 4]
    assert numbers(path, limit=2) == [1, 2]
    with pytest.raises(JournalError, match="no journal there"):
        numbers(tmp_path / "nowhere.sqlite")


def test_a_journal_that_does_not_answer_makes_nobody_wait_and_catches_up(journal, events):
    made = journal()
    made.start()
    with contextlib.closing(sqlite3.connect(made.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # the write lock: our commits cannot go through
        stuck = record(1)
        made.submit(stuck)
        assert not stuck.wait(0.05)
        made.lag()
        assert made.lagging
        stuck.body = b'{"sequence": 1, "journaled": false}'
        other.execute("ROLLBACK")
    later = record(2)
    made.submit(later)
    wait_for(lambda: not made.lagging and made.written == 2)
    assert dict(read_journal(made.path, Query()))[1] == b'{"sequence": 1, "journaled": false}'
    assert numbers(made.path) == [1, 2]
    assert events.counts()[EventKind.JOURNAL] >= 2, "that it is slow, and that it has caught up"


def wait_for(condition, seconds=60):
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.01)


def test_a_full_disk_is_said_and_written_later(journal, events):
    made = journal()
    made.start()
    made.submit(record(1))
    wait_for(lambda: made.written == 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))  # every write fails with EFBIG
    try:
        refused = record(2)
        made.submit(refused)
        assert not refused.wait(30)
        wait_for(lambda: made.error is not None)
        assert made.lagging
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    wait_for(lambda: made.error is None)
    assert numbers(made.path) == [1, 2]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(b"no database at all, but long enough to look at" * 30), "not a database"),
        (lambda path: foreign(path), "another program's database"),
        (lambda path: path.mkdir(), "unable to open"),
    ],
)
def test_a_journal_that_cannot_be_used_stops_nothing_and_is_not_overwritten(journal, tmp_path, spoil, said):
    path = tmp_path / "spoilt.sqlite"
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    made = journal(path)
    assert made.start() == 0
    assert said in made.error
    unwritten = record(1)
    made.submit(unwritten)
    assert not unwritten.wait(30)
    made.end()
    assert made.given_up == 1
    assert (path.read_bytes() if path.is_file() else None) == before


def foreign(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE recipes (name)")
        connection.commit()


def test_two_stations_do_not_share_a_journal(journal, tmp_path):
    first = journal()
    first.start()
    first.end()
    second = journal(station="other")
    second.start()
    assert "it belongs to station s" in second.error


def test_old_verdicts_are_deleted_by_age(journal):
    made = journal(retention=Retention(days=1, largest_bytes=1 << 40))
    made.start()
    now_ns = time.time_ns()
    for n in range(1, 2001):
        made.submit(record(n, time_ns=now_ns - (2 * 86400 * 10**9 if n <= 1500 else 0)))
    wait_for(lambda: made.written == 2000)
    wait_for(lambda: numbers(made.path)[0] == 1501)
    assert numbers(made.path) == list(range(1501, 2001))


def test_a_step_of_the_clock_makes_no_verdict_old(journal, monkeypatch):
    """A clock without a battery stands in the past until somebody sets it."""
    true_ns = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: true_ns() - 4 * 86400 * 10**9)
    made = journal(retention=Retention(days=1, largest_bytes=1 << 40))
    made.start()
    for n in range(1, 1001):
        made.submit(record(n, time_ns=time.time_ns()))
    wait_for(lambda: made.written == 1000)
    monkeypatch.setattr(time, "time_ns", true_ns)
    with contextlib.closing(sqlite3.connect(made.path)) as connection:
        made._trimmed_s = -1e9
        made._trim(connection)
        connection.commit()
    assert numbers(made.path) == list(range(1, 1001))


def test_old_verdicts_are_deleted_by_size(journal):
    made = journal(retention=Retention(days=1e5, largest_bytes=4 << 20))
    made.start()
    for n in range(1, 3001):
        made.submit(record(n, pad=3000))
    wait_for(lambda: made.written == 3000)
    wait_for(lambda: numbers(made.path)[0] > 500)
    assert numbers(made.path)[-1] == 3000, "the newest stay"


def test_the_write_ahead_log_does_not_grow_for_ever(journal):
    made = journal()
    made.start()
    wal = made.path.with_name(made.path.name + "-wal")
    for n in range(1, 20_001):
        r = record(n, pad=6000)
        made.submit(r)
        if n % 200 == 0:
            assert r.wait(60)
    wait_for(lambda: made.written == 20_000)
    wait_for(lambda: wal.stat().st_size < 80 << 20)  # 120 MB of verdicts went through it


def test_a_log_that_was_long_once_is_not_checkpointed_at_every_flush_from_then_on(journal, monkeypatch):
    made, checkpoint, checkpoints = journal(), Journal._checkpoint, []

    def counting(self):
        checkpoint(self)
        checkpoints.append(self._log_bytes())

    monkeypatch.setattr(Journal, "_checkpoint", counting)
    made.start()

    def write(first, last, pad):
        for n in range(first, last):
            made.submit(it := record(n, pad=pad))
            assert it.wait(60)

    write(1, 1300, 8000)  # more than 8 MiB
    wait_for(lambda: checkpoints)
    numbers = itertools.count(1300)

    def write_some():  # once nothing is written beside a checkpoint, the log begins anew and is cut
        write(n := next(numbers), n + 1, 10)
        return made._log_bytes() <= 8 << 20

    wait_for(write_some)
    before = len(checkpoints)
    for _ in range(10):
        write_some()
        wait_for(lambda: not made._dirty.is_set())
    assert len(checkpoints) <= before + 1, "the one that was under way"


def test_it_can_be_read_while_it_is_written(journal):
    made = journal()
    made.start()
    for n in range(1, 301):
        r = record(n)
        made.submit(r)
        assert r.wait(30)
        if n % 50 == 0:
            assert numbers(made.path) == list(range(1, n + 1))


def test_a_journal_that_is_deleted_is_said_and_begun_anew(journal, events):
    made = journal()
    made.start()
    first, second = record(1), record(2)
    made.submit(first)
    assert first.wait(30)
    for file in made.path.parent.glob(f"{made.path.name}*"):
        file.unlink()
    made.submit(second)
    assert not second.wait(30), "nobody could read it there"
    wait_for(lambda: made.written == 2 and made.error is None)
    assert numbers(made.path) == [2]


def test_a_journal_that_is_replaced_does_not_get_the_log_of_the_one_before(journal, events, tmp_path):
    other = journal(tmp_path / "backup.sqlite")
    other.start()
    for number in range(1, 301):
        other.submit(last := record(number))
    assert last.wait(30)
    other.end()
    made = journal()
    made.start()
    for number in range(1001, 1101):
        made.submit(last := record(number))
    assert last.wait(30)
    other.path.replace(made.path)
    made.submit(record(1101))
    wait_for(lambda: made.written == 101 and made.error is None)
    assert numbers(made.path) == [*range(1, 301), 1101]
    with contextlib.closing(sqlite3.connect(made.path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_who_may_only_read_the_folder_reads_a_journal_that_nobody_writes(journal):
    """As the service's group does while the daemon is stopped."""
    with tempfile.TemporaryDirectory() as folder:
        made = journal(Path(folder) / "journal.sqlite")
        made.start()
        last = record(1)
        made.submit(last)
        assert last.wait(30)
        made.end()
        made.path.chmod(0o444)
        Path(folder).chmod(0o555)
        code = (
            "import os, sys, pathlib, urllib.parse; from daemon.journal import Query, read_journal\n"
            "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "print(list(read_journal(pathlib.Path(sys.argv[1]), Query())))"
        )
        command = [sys.executable, "-c", code, made.path]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        Path(folder).chmod(0o755)
    assert "[(1, b'" in said.stdout, said.stderr


def test_a_journal_that_somebody_holds_is_worth_another_try(tmp_path):
    path = tmp_path / "journal.sqlite"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as held:
        held.execute("CREATE TABLE verdicts (sequence INTEGER)")
        held.execute("BEGIN EXCLUSIVE")
        with pytest.raises(typer.Exit) as ending, clear_errors():
            list(read_journal(path, Query()))
    assert ending.value.exit_code == 1


def test_a_journal_on_a_disk_that_is_not_well_is_an_error_of_the_journal(tmp_path, monkeypatch):
    def refuse(path, **_):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    with pytest.raises(NoJournal, match="no journal there"):
        list(read_journal(tmp_path / "journal.sqlite", Query()))
    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(JournalError, match=r"journal\.sqlite: Stale file handle") as caught:
        list(read_journal(tmp_path / "journal.sqlite", Query()))
    assert not isinstance(caught.value, NoJournal)
