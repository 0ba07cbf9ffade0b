from __future__ import annotations

import time

from drivers.frame import Frame, FrameStatus


def test_a_frame_that_waited_has_the_wall_clock_of_its_arrival(monkeypatch):
    monkeypatch.setattr(time, "monotonic_ns", lambda: 400)
    monkeypatch.setattr(time, "time_ns", lambda: 1_000)
    assert Frame(FrameStatus.COMPLETE, "camera", arrived_ns=100).wall_ns == 700
    assert Frame(FrameStatus.COMPLETE, "camera", arrived_ns=100, wall_ns=5).wall_ns == 5
