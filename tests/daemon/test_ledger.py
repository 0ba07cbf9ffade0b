from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.ledger import Ledger, Revoked, Ticket
from daemon.sequence import SequenceFile
from daemon.tally import Tally
from drivers.frame import Frame, FrameStatus
from pipeline.inspection import Inspection, Outcome, Reason

OK = Inspection(Outcome.OK, score=0.1)


@pytest.fixture
def ledger(tmp_path):
    with SequenceFile(tmp_path) as numbers:
        yield Ledger(numbers, Tally(), lambda: None)


def frame(arrived_ns=None):
    made = Frame(FrameStatus.COMPLETE, "s", image=np.zeros((2, 2), np.uint8))
    if arrived_ns is not None:
        made.arrived_ns = arrived_ns
    return made


def with_deadline(ledger, deadline_ms):
    ledger._deadline_ms = lambda: deadline_ms
    return ledger


def test_a_settled_entry_waits_for_those_before_it(ledger):
    ticket = Ticket()
    first, second = ledger.open(ticket, frame()), ledger.open(ticket, frame())
    assert (first.sequence, second.sequence) == (1, 2)
    assert ledger.settle(second, OK)
    assert ledger.take(0, 1) == [], "the first has no result yet"
    assert ledger.settle(first, OK)
    for entry in (first, second):
        assert ledger.take(0, 1) == [entry]
        ledger.done(entry, None)
    assert ledger.take(0, 1) == []


def test_an_entry_is_settled_once(ledger):
    entry = ledger.open(Ticket(), frame())
    assert ledger.settle(entry, OK)
    assert not ledger.settle(entry, Inspection(Outcome.NG, score=9.0))
    assert ledger.take(0, 1)[0].inspection is OK


def test_the_same_entry_is_handed_out_until_it_is_done(ledger):
    entry = ledger.open(Ticket(), frame())
    ledger.settle(entry, OK)
    assert ledger.take(0, 1) == [entry]
    assert ledger.take(0, 1) == [entry], "the publisher's successor goes on with it"
    ledger.done(entry, None)
    with pytest.raises(AssertionError):
        ledger.done(entry, None)


def test_an_entry_that_is_due_becomes_invalid_and_what_comes_then_is_late(ledger):
    with_deadline(ledger, 1000)
    entry = ledger.open(Ticket(), frame(time.monotonic_ns() - 2_000_000_000))
    assert entry.is_late()
    (taken,) = ledger.take(0, 1)
    assert taken is entry
    assert (taken.inspection.outcome, taken.inspection.reason) == (Outcome.INVALID, Reason.DEADLINE)
    assert not ledger.settle(entry, OK)


def test_a_taker_wakes_for_the_deadline_by_itself(ledger):
    with_deadline(ledger, 50)
    entry = ledger.open(Ticket(), frame())
    began_ns = time.monotonic_ns()
    (taken,) = ledger.take(60, 1)
    assert taken is entry
    assert taken.inspection.reason is Reason.DEADLINE
    assert time.monotonic_ns() >= entry.due_ns
    assert entry.due_ns - began_ns <= 45_000_000, "a tenth of the deadline is kept as margin"


def test_a_taker_that_sleeps_is_woken_by_a_deadline_before_its_own_time(ledger):
    with_deadline(ledger, 20)
    taken = []
    taker = threading.Thread(target=lambda: taken.extend(ledger.take(600, 1)), daemon=True)
    taker.start()
    while not ledger._publisher_wakes_ns:  # it sleeps as soon as the lock is free
        pass
    entry = ledger.open(Ticket(), frame())
    taker.join(60)
    assert taken == [entry]
    assert entry.inspection.reason is Reason.DEADLINE


def test_a_settled_entry_is_not_late_however_long_it_waits(ledger):
    with_deadline(ledger, 1)
    entry = ledger.open(Ticket(), frame())
    ledger.settle(entry, OK)
    while time.monotonic_ns() < entry.due_ns:
        pass
    assert ledger.take(0, 1)[0].inspection is OK


def test_a_trigger_is_filled_with_its_frame_unless_its_verdict_is_out(ledger):
    ticket = Ticket()
    entry = ledger.open(ticket, Frame(FrameStatus.PENDING, "s"), trigger="t1", part="p1")
    came = frame()
    assert ledger.fill(entry, came)
    assert entry.frame is came
    with_deadline(ledger, 1)
    late = ledger.open(ticket, Frame(FrameStatus.PENDING, "s", arrived_ns=0))
    ledger.settle(entry, OK)
    ledger.done(*ledger.take(0, 1), None)
    assert ledger.take(0, 1) == [late]
    assert not ledger.fill(late, frame())


def test_an_abandoned_generation_numbers_nothing_and_what_it_has_numbered_stays_open(ledger):
    ticket = Ticket()
    judged = ledger.open(ticket, frame())
    ledger.revoke(ticket)
    with pytest.raises(Revoked):
        ledger.open(ticket, frame())
    assert judged.inspection is None, "the engine has its image and will judge it"
    assert ledger.open(Ticket(), frame()).sequence == 2


def test_what_an_earlier_run_left_has_a_deadline_too(ledger):
    with_deadline(ledger, 60_000).restore(7)
    (restored,) = ledger.take(0, 1)
    assert restored.due_ns > time.monotonic_ns(), "or its commit would hold up the first parts"


def test_what_an_earlier_run_left_is_restored_and_giving_up_leaves_nothing_open(ledger):
    ledger.restore(7)
    waiting = ledger.open(Ticket(), frame())
    ledger.give_up(Reason.ENGINE, "ending")
    assert waiting.inspection.reason is Reason.ENGINE
    found = []
    for entry in ledger.take(0, 10):
        found.append((entry.sequence, entry.inspection.reason))
        ledger.done(entry, None)
    assert found == [(7, Reason.RESTART), (waiting.sequence, Reason.ENGINE)]
    assert ledger.over


def test_the_arithmetic_holds_at_any_moment(ledger):
    """Writers, an engine and a publisher at work; someone else looks all the time."""
    ticket, entries, wrong, total = Ticket(), [], [], 3000

    def open_all():
        for _ in range(total):
            entries.append(ledger.open(ticket, frame()))
        ledger.end()

    def settle_all():
        for index in range(total):
            while len(entries) <= index:
                pass
            ledger.settle(entries[index], OK)

    def publish_all():
        while not ledger.over:
            for entry in ledger.take(0.05, 3):
                ledger.done(entry, None)

    threads = [threading.Thread(target=work) for work in (open_all, settle_all, publish_all)]
    for thread in threads:
        thread.start()
    while not ledger.over:
        totals, open_numbers = ledger.audit()
        if totals.seen != totals.ok + totals.ng + totals.invalid + open_numbers:
            wrong.append((totals, open_numbers))
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert ledger.audit()[0].ok == total


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_the_order_of_events_each_number_comes_out_once_and_in_order(tmp_path_factory, data):
    with SequenceFile(tmp_path_factory.mktemp("state")) as numbers:
        now = {"deadline_ms": None}
        ledger = Ledger(numbers, Tally(), lambda: now["deadline_ms"])
        ticket, waiting, out = Ticket(), [], []
        for step in data.draw(st.lists(st.sampled_from(["open", "settle", "late", "take", "revoke"]), max_size=40)):
            if step == "open":
                waiting.append(ledger.open(ticket, frame()))
            elif step == "late":  # its deadline has passed before it was numbered
                now["deadline_ms"] = 1
                waiting.append(ledger.open(ticket, frame(0)))
                now["deadline_ms"] = None
            elif step == "settle" and waiting:
                ledger.settle(waiting.pop(data.draw(st.integers(0, len(waiting) - 1))), OK)
            elif step == "revoke":
                ledger.revoke(ticket)
                ticket = Ticket()
            elif step == "take":
                for entry in ledger.take(0, data.draw(st.integers(1, 5))):
                    assert entry.is_late(), "what is taken cannot be settled any more"
                    ledger.done(entry, None)
                    out.append(entry.sequence)
        ledger.give_up(Reason.ENGINE, "ending")
        for entry in ledger.take(0, 1000):
            ledger.done(entry, None)
            out.append(entry.sequence)
        totals, open_numbers = ledger.audit()
        assert out == list(range(1, totals.seen + 1))
        assert open_numbers == 0
        assert numbers.published == totals.seen
