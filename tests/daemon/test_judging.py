from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from daemon.channels import Channel, Grabbed
from daemon.judging import Judging
from daemon.ring import FrameRing
from drivers.frame import Frame, FrameStatus, PixelFormat
from pipeline.bundle import read_bundle
from pipeline.engines import frame_memory, make_engine
from pipeline.inspect import Inspector
from pipeline.plausible import PlausibleLimits


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
        entry = SimpleNamespace(frame=frame, is_late=lambda number=number: number in late)
        judging._judge(inspector, Grabbed(entry, slot))
    assert reasons == [None] * (6 - len(late))
    assert ring.free_slots == 2, "all but the one that the next frame is compared with"
