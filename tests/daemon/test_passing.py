from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import structlog

from daemon.events import Events, Outbox
from daemon.passing import Passing
from drivers.camera import CameraLost
from tests.daemon.test_journal import wait_for


@pytest.fixture
def line():
    """Make the thread that gives pulses; what it says is read from the outbox."""
    outbox, running = Outbox(), []

    def make(pulse):
        passing = Passing(pulse, Events("line", "boot", outbox, structlog.get_logger()))
        running.append((passing, threading.Thread(target=passing.run, daemon=True)))
        running[-1][1].start()
        return passing

    yield make, lambda: [(m.sequence, m.data["error"]) for _, m in outbox.take()]
    for passing, thread in running:
        passing.end()
        thread.join(60)
        assert not thread.is_alive()


def test_a_part_whose_pulse_would_meet_the_one_before_it_gets_none_and_that_is_said(line):
    make, said = line
    begun, may_end, given = threading.Semaphore(0), threading.Semaphore(0), []

    def pulse(until_ns):
        begun.release()
        assert may_end.acquire(timeout=60)
        given.append(len(given))

    passing = make(pulse)
    passing.passed(1, None)
    assert begun.acquire(timeout=60)
    passing.passed(2, None)
    passing.passed(3, time.monotonic_ns() - 1)
    assert said() == [(2, "the pulse before it is not over"), (3, "the verdict was late")]
    may_end.release()
    wait_for(lambda: not passing._busy)
    passing.passed(4, None)
    may_end.release()
    wait_for(lambda: not passing._busy)
    assert len(given) == 2, "parts 1 and 4"
    passing.end()
    passing.passed(5, None)
    assert said() == [(5, "the daemon is ending")]


def test_a_pulse_that_the_camera_refuses_is_said_and_the_next_is_given(line):
    make, said = line
    answers = [CameraLost("away"), None]

    def pulse(until_ns):
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    passing = make(pulse)
    for number in (1, 2):
        passing.passed(number, None)
        wait_for(lambda: not passing._busy)
    assert said() == [(1, "away")]
    assert answers == []


def test_a_pulse_begins_within_the_deadline_and_within_a_tenth_of_a_second(line, monkeypatch):
    make, said = line
    monkeypatch.setattr("daemon.passing.time", SimpleNamespace(monotonic_ns=lambda: 1000, sleep=time.sleep))
    asked = []
    passing = make(asked.append)
    for number, due_ns in enumerate((None, 10**12, 5000, 1000, 999)):
        passing.passed(number, due_ns)
        wait_for(lambda: not passing._busy)
    assert asked == [100_001_000, 100_001_000, 5000, 1000]
    assert said() == [(4, "the verdict was late")]
