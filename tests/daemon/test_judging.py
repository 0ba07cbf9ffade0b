from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import structlog

from daemon.channels import Channel, Closed, Grabbed, Probe, Swap
from daemon.judging import Judging
from daemon.ring import FrameRing
from daemon.supervision import Worker
from drivers.frame import Frame, FrameStatus, PixelFormat
from pipeline.bundle import read_bundle
from pipeline.engine import RawMaps
from pipeline.engines import frame_memory, make_engine
from pipeline.inspect import Inspector
from pipeline.plausible import PlausibleLimits
from tests.daemon.test_journal import wait_for


@pytest.mark.parametrize("late", [(), (1, 3), (0, 1, 2), (2, 3)])
def test_a_late_frame_does_not_make_the_next_one_look_frozen(tiny_bundle, rng, late):
    """The ring hands out the slot that came back last; it must not be what the next frame is compared with."""
    bundle, ring, reasons = read_bundle(tiny_bundle), FrameRing(3, frame_memory("cpu")), []
    inspector = Inspector(bundle, make_engine(bundle, "cpu").engine, limits=PlausibleLimits(frozen_frames=2))
    books = SimpleNamespace(
        settle=lambda _entry, found, **_rest: reasons.append(found.reason) or True, judged_by=None
    )
    judging = Judging(
        lambda: inspector, ring, Channel(1), books, pass_probe=None, tap=lambda *_: None, events=None, log=None
    )
    judging._now_judging(inspector)
    for number in range(6):
        slot = ring.lease(0)
        image = slot.store(rng.integers(40, 200, (96, 96, 3)).astype(np.uint8))
        frame = Frame(FrameStatus.COMPLETE, "part", image=image, pixel_format=PixelFormat.BGR8)
        entry = SimpleNamespace(frame=frame, is_late=lambda _after_ns, number=number: number in late)
        judging._begin(inspector, Grabbed(entry, slot))
        if number not in late:
            judging._finish()
    assert reasons == [None] * (6 - len(late))
    assert ring.free_slots == 2, "all but the one that the next frame is compared with"


class TwoAtOnce:
    """Notes what is asked of it; a frame's first pixel is its name."""

    device, precision, at_once = "two", "fp32", 2

    def __init__(self, said, *, stuck_in=None):
        self.said, self._stuck_in = said, stuck_in
        self.stuck, self.let_go = threading.Event(), threading.Event()

    def warm_up(self):
        pass

    def begin(self, image, fmt):
        name = int(image.flat[0])
        self.said.append(f"begin {name}")

        def finish():
            if name == self._stuck_in:
                self.stuck.set()
                self.let_go.wait(60)
            self.said.append(f"finish {name}")
            return RawMaps(np.zeros((8, 8), np.float32), np.zeros((8, 8), np.float32), 1, 2)

        return finish


class Books:
    """What the ledger would be told."""

    def __init__(self, said):
        self.said, self.judged_by = said, None

    def settle(self, entry, inspection, **_rest):
        self.said.append(f"settle {entry.sequence} {inspection.outcome.value}")
        return True


class AnHourEach(Judging):
    """Believes that each frame takes that long."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._took_ns.append(3600 * 10**9)

    def _finish(self):
        super()._finish()
        self._took_ns.clear()
        self._took_ns.append(3600 * 10**9)


@pytest.fixture
def begun(tiny_bundle, rng):
    """A generation with items waiting for it: frames by their names, or what else is sent."""
    bundle, said = read_bundle(tiny_bundle), []
    limits = PlausibleLimits(black_below=0, frozen_frames=0)
    made = SimpleNamespace(
        said=said, ring=FrameRing(6, frame_memory("cpu")), frames=Channel(8), due_ns={}, shapes={}
    )

    def inspector(**engine):
        made.engine = TwoAtOnce(said, **engine)
        return Inspector(bundle, made.engine, limits=limits)

    def frame(name):
        slot = made.ring.lease(0)
        image = slot.store(np.full(made.shapes.get(name, (96, 96, 3)), name, np.uint8))
        frame = Frame(FrameStatus.COMPLETE, "part", image=image, pixel_format=PixelFormat.BGR8)
        due_ns = made.due_ns.get(name)
        entry = SimpleNamespace(sequence=name, frame=frame)
        entry.is_late = lambda after_ns: due_ns is not None and time.monotonic_ns() + after_ns >= due_ns
        return Grabbed(entry, slot)

    def begin(*items, kind=Judging, **engine):
        for item in items:
            made.frames.put(frame(item) if isinstance(item, int) else item)
        made.judging = kind(
            *(lambda: inspector(**engine), made.ring, made.frames, Books(said)),
            pass_probe=lambda number: said.append(f"probe {number}"),
            tap=lambda entry, _image, _found: said.append(f"tap {entry.sequence}"),
            events=None,
            log=structlog.get_logger(),
        )
        made.worker = Worker("engine", made.judging.run, lambda: None)
        made.worker.start()
        return made

    made.inspector, made.frame, made.begin = inspector, frame, begin
    yield made
    made.engine.let_go.set()
    made.frames.close()
    made.worker.join(30)
    assert not made.worker.is_alive()


def test_a_frame_is_begun_while_the_one_before_it_is_in_the_engine(begun):
    made = begun.begin(1, 2, 3, Probe(7))
    wait_for(lambda: "probe 7" in made.said)
    assert made.said == [
        *("begin 1", "begin 2", "finish 1", "settle 1 OK", "tap 1"),
        *("begin 3", "finish 2", "settle 2 OK", "tap 2", "finish 3", "settle 3 OK", "tap 3", "probe 7"),
    ]
    assert made.judging._in_hand == []
    assert made.ring.free_slots == 5, "all but the one that the next frame is compared with"


def test_what_was_begun_is_finished_before_the_model_changes(begun):
    swap = Swap(begun.inspector())
    made = begun.begin(1, swap, 2)
    swap.done.result(30)
    assert made.said[:4] == ["begin 1", "finish 1", "settle 1 OK", "tap 1"]
    wait_for(lambda: "tap 2" in made.said)


@pytest.mark.parametrize("sent", ["probe", "swap"])
def test_what_is_no_frame_stays_for_the_next_generation_until_all_are_judged(begun, sent):
    item = Probe(7) if sent == "probe" else Swap(begun.inspector())
    made = begun.begin(1, 2, item, stuck_in=2)
    assert made.engine.stuck.wait(30)
    assert made.frames.close() == [item]


def test_what_was_begun_behind_a_frame_that_hangs_is_given_up_with_it(begun):
    made = begun.begin(1, 2, 3, stuck_in=1)
    assert made.engine.stuck.wait(30)
    assert made.judging.call.hangs(0)
    items, held = made.judging.abandon()
    assert [item.entry.sequence for item in items] == [1, 2]
    assert held == [item.slot for item in items]
    made.engine.let_go.set()
    made.worker.join(30)
    assert "finish 2" not in made.said, "an abandoned generation does nothing more when it comes back"
    assert made.worker.failure is None
    assert made.ring.free_slots == 3, "its slots are the supervisor's"


def test_a_frame_that_was_taken_while_its_generation_was_abandoned_has_its_verdict(begun):
    begun.begin(stuck_in=1)
    item = begun.frame(2)
    begun.judging.abandon()
    with pytest.raises(Closed):
        begun.judging._begin(begun.inspector(), item)
    assert begun.said == ["settle 2 INVALID"]
    assert not np.shares_memory(item.entry.frame.image, item.slot.memory)
    assert begun.ring.free_slots == 6


@pytest.mark.parametrize("which", [2, 3])
def test_a_frame_that_might_be_late_or_make_one_late_is_not_begun_behind_others(begun, which):
    begun.due_ns[which] = time.monotonic_ns() + 5400 * 10**9
    begun.begin(1, 2, 3, 4, kind=AnHourEach)
    wait_for(lambda: "tap 4" in begun.said)
    ours = [word for word in begun.said if word[:5] in ("begin", "finis")]
    if which == 2:  # neither behind the first, nor with the third behind it
        assert ours[:5] == ["begin 1", "finish 1", "begin 2", "finish 2", "begin 3"]
    else:
        assert ours[:6] == ["begin 1", "begin 2", "finish 1", "finish 2", "begin 3", "finish 3"]


def test_a_frame_that_became_late_while_others_were_judged_is_refused(begun):
    begun.due_ns[2] = time.monotonic_ns()
    begun.begin(1, 2, 3)
    wait_for(lambda: "tap 3" in begun.said)
    assert "begin 2" not in begun.said
    assert begun.said.index("tap 2") > begun.said.index("finish 1")
    assert begun.ring.free_slots == 5


def test_a_frame_of_another_kind_is_prepared_when_nobody_waits_for_it(begun):
    begun.shapes[2] = (48, 96, 3)
    begun.begin(1, 2, 3)
    wait_for(lambda: "tap 3" in begun.said)
    ours = [word for word in begun.said if word[:5] in ("begin", "finis")]
    assert ours == ["begin 1", "finish 1", "begin 2", "finish 2", "begin 3", "finish 3"]


def test_a_frame_that_will_be_late_is_not_begun_and_the_engine_is_tried_again(begun):
    begun.due_ns.update(dict.fromkeys(range(2, 7), time.monotonic_ns() + 1800 * 10**9))
    begun.begin(1, 2, 3, 4, kind=AnHourEach)
    wait_for(lambda: "tap 4" in begun.said)
    taken = [word for word in begun.said if not word.startswith("settle")]
    assert taken[:3] == ["begin 1", "finish 1", "tap 1"]
    assert taken[3:] == ["tap 2", "begin 3", "begin 4", "finish 3", "tap 3", "finish 4", "tap 4"], (
        "what 1 took is forgotten"
    )
    assert begun.ring.free_slots == 5
