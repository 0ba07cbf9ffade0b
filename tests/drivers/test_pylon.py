from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from drivers.camera import CameraError, CameraLost, DriverMissing, EndOfStream, Fires
from drivers.counter import BlockIdCounter
from drivers.frame import FrameStatus, PixelFormat
from drivers.pylon import _LENT_BUFFERS, Arrivals, PylonCamera, PylonOptions, _Lent
from drivers.pylon_output import PassLine, PassOutput

pytest.importorskip("pypylon", reason="pypylon is not installed: pip install 'inspectord[pylon]'")

QUICK = {"exposure_us": 100.0, "width": 64, "height": 48, "trigger_timeout_ms": 60_000}


@pytest.fixture
def opened():
    cameras = []

    def make(**options):
        camera = PylonCamera(PylonOptions(driver="pylon", serial="0815-0000", **{**QUICK, **options}))
        cameras.append(camera)
        camera.open()
        return camera

    yield make
    for camera in cameras:
        camera.close()


def next_frames(camera):
    """The next frames, triggered as the daemon would do it."""
    if camera.fires is not Fires.ITSELF:
        assert camera.ready(5.0)
        camera.fire()
    while not (frames := camera.grab(1.0)):
        pass
    return frames


def some_frames(camera, count):
    frames = []
    while len(frames) < count:
        frames += next_frames(camera)
        for frame in frames:  # all of them would be more than the camera lends
            frame.image = None if frame.image is None else frame.image.copy()
    return frames


def test_lent_images_stay_as_they_are_while_anyone_refers_to_them(opened):
    """The emulator's picture moves by a pixel from frame to frame."""
    camera = opened(pixel_format=PixelFormat.MONO8, features={"TestImageSelector": "Testimage2"})
    lent = [next_frames(camera)[0].image for _ in range(_LENT_BUFFERS)]
    copies = [image.copy() for image in lent]
    some_frames(camera, 40)  # more than there are buffers
    for image, copy in zip(lent, copies, strict=True):
        np.testing.assert_array_equal(image, copy)
    assert any((copies[0] != other).any() for other in copies[1:]), "else nothing was shown"
    camera.close()
    lent[0], copies[0] = lent[0][1:], copies[0][1:]  # a view of it keeps it, too
    for image, copy in zip(lent, copies, strict=True):
        np.testing.assert_array_equal(image, copy, err_msg="the engine may still read")


@pytest.mark.parametrize("fmt", list(PixelFormat))
def test_every_pixel_format_of_the_emulator(opened, fmt):
    (frame,) = some_frames(opened(pixel_format=fmt, trigger="software"), 1)
    assert frame.status is FrameStatus.COMPLETE
    assert frame.pixel_format is fmt
    assert fmt.fits(frame.image)
    assert frame.image.shape[:2] == (48, 64)
    assert frame.source == "0815-0000"


def test_free_run_and_software_trigger_number_their_frames_without_gaps(opened):
    for trigger in ("free_run", "software"):
        frames = some_frames(opened(trigger=trigger), 20)[:20]
        assert [f.device_id for f in frames] == list(range(20))
        assert {f.status for f in frames} == {FrameStatus.COMPLETE}


def test_settings_reach_the_camera(opened):
    camera = opened(exposure_us=250.0, gain=6.0, offset_x=16, offset_y=8, rate_fps=50.0)
    nodes = camera._camera.GetNodeMap()
    read = {n: float(nodes.GetNode(n).ToString()) for n in ("OffsetX", "OffsetY", "Width", "Height")}
    assert read == {"OffsetX": 16, "OffsetY": 8, "Width": 64, "Height": 48}
    assert camera._camera.ExposureTimeAbs.Value == pytest.approx(250, abs=1)
    assert camera._camera.AcquisitionFrameRateAbs.Value == pytest.approx(50)
    assert camera._camera.Gain.Value == pytest.approx(6.0, abs=0.01)
    assert camera._camera.TriggerMode.Value == "Off"


def test_hardware_trigger_listens_to_its_line(opened):
    camera = opened(trigger="hardware", trigger_line="Line2", trigger_activation="FallingEdge")
    assert camera._camera.TriggerMode.Value == "On"
    assert camera._camera.TriggerSource.Value == "Line2"
    assert camera._camera.TriggerActivation.Value == "FallingEdge"
    assert camera.grab(0.05) == []  # nobody fires the line


def test_incomplete_buffers_are_reported_not_hidden(opened):
    camera = opened(trigger="software", features={"ForceFailedBufferCount": 3, "ForceFailedBuffer": True})
    statuses = [f.status for f in some_frames(camera, 5)]
    assert statuses == ["incomplete"] * 3 + ["complete"] * 2


@pytest.mark.parametrize("trigger", ["software", "command"])
def test_a_cable_pulled_while_a_trigger_was_under_way_means_reopen(opened, trigger):
    camera = opened(trigger=trigger)
    some_frames(camera, 2)
    camera._camera.GetStreamGrabberNodeMap().GetNode("ImposedError").FromString("cable pulled")
    with pytest.raises(CameraLost, match="cable pulled"):
        next_frames(camera)
    camera.close()
    camera.open()
    assert some_frames(camera, 1)[0].status is FrameStatus.COMPLETE


def test_a_pulled_cable_in_free_run_means_reopen(opened):
    camera = opened()
    some_frames(camera, 2)
    camera._camera.GetStreamGrabberNodeMap().GetNode("ImposedError").FromString("cable pulled")

    def grab_for_ever():
        while True:
            camera.grab(1.0)

    with pytest.raises(CameraLost, match="cable pulled"):
        grab_for_ever()


def test_a_frame_that_waited_for_us_arrived_before_we_came_for_it(opened):
    camera = opened(rate_fps=50.0)
    some_frames(camera, 1)
    held_up_ns = time.monotonic_ns()
    while camera._camera.NumReadyBuffers.Value < 4:
        pass
    came_ns = time.monotonic_ns()
    waited = [frame for _ in range(3) for frame in camera.grab(1.0)]
    assert waited[0].arrived_ns <= held_up_ns < came_ns, "no later than we know"
    assert [f.arrived_ns for f in waited] == sorted(f.arrived_ns for f in waited)
    while True:
        before_ns = time.monotonic_ns()
        (fresh,) = camera.grab(1.0)
        if fresh.arrived_ns > before_ns:
            break  # it came while we waited


def test_frames_in_a_queue_arrived_after_the_last_look_without_them(monkeypatch):
    monkeypatch.setattr(time, "monotonic_ns", lambda: 0)
    arrivals = Arrivals()
    arrivals.look(0, at_ns=1)
    arrivals.look(0, at_ns=2)
    assert arrivals.take(3) == 3, "we waited for it"
    arrivals.look(2, at_ns=4)  # two more have come since 2
    assert arrivals.take(None) == 3, "not before the one that came before it"
    arrivals.look(3, at_ns=5)  # one of them is left, and two have come since 4
    assert [arrivals.take(None) for _ in range(3)] == [3, 4, 4]
    for at_ns in range(6, 100):
        arrivals.look(0, at_ns)
    assert len(arrivals._looks) == 1


def test_what_came_before_the_camera_was_lost_can_still_be_had(opened):
    camera = opened(rate_fps=100.0, features={"ForceFailedBufferCount": 10, "ForceFailedBuffer": True})
    frames = some_frames(camera, 10)
    assert [f.status for f in frames] == ["incomplete"] * 10
    while camera._camera.NumReadyBuffers.Value < 3:
        pass
    with pytest.raises(CameraLost, match="10 grabs failed in a row"):
        camera.grab(1.0)
    left = [frame for _ in range(3) for frame in camera.grab(0.0)]
    assert [f.device_id for f in left] == [10, 11, 12]
    assert {f.status for f in left} == {FrameStatus.COMPLETE}


def test_gaps_in_the_block_ids_become_lost_frames(opened):
    camera = opened(trigger="software")
    some_frames(camera, 1)
    camera._ids = BlockIdCounter(first_id=-3)  # as if ids -3, -2 and -1 and 0 had been due before
    frames = some_frames(camera, 1)
    assert [f.status for f in frames] == ["lost"] * 4 + ["complete"]


def test_a_trigger_without_a_frame_is_a_timeout(opened):
    camera = opened(trigger="software", trigger_timeout_ms=50)
    camera._camera.TriggerSelector.Value = "FrameBurstStart"  # the trigger goes where nothing waits for it
    (frame,) = some_frames(camera, 1)
    assert frame.status is FrameStatus.TIMEOUT
    camera._camera.TriggerSelector.Value = "FrameStart"
    camera._options = camera._options.model_copy(update={"trigger_timeout_ms": 60_000})
    (frame,) = some_frames(camera, 1)
    assert frame.status is FrameStatus.COMPLETE


class LateResults:
    """The real grabber, except that one result comes only after its trigger was given up."""

    def __init__(self, camera, late):
        self._camera, self._late, self._calls = camera, late, 0

    def __getattr__(self, name):
        return getattr(self._camera, name)

    def ExecuteSoftwareTrigger(self):
        self._calls += 1
        self._camera.ExecuteSoftwareTrigger()

    def RetrieveResult(self, timeout_ms, handling):
        if self._calls == self._late:
            return self._camera.RetrieveResult(0, handling) if timeout_ms < 0 else _Nothing()
        return self._camera.RetrieveResult(timeout_ms, handling)


class _Nothing:
    def IsValid(self):
        return False


def test_a_late_frame_is_neither_the_next_triggers_nor_a_second_report(opened):
    camera = opened(trigger="software", trigger_timeout_ms=3000, features={"TestImageSelector": "Testimage2"})
    camera._camera = LateResults(camera._camera, late=2)
    frames = some_frames(camera, 5)
    assert [f.status for f in frames] == ["complete", "timeout", "complete", "complete", "complete"]
    assert [f.device_id for f in frames] == [0, None, 0, 1, 2], "the acquisition began anew"


def test_image_folders_are_played_with_their_colours(opened, tmp_path):
    for index, (r, g, b) in enumerate([(200, 30, 60), (20, 180, 90)]):
        cv2.imwrite(str(tmp_path / f"{index}.png"), np.full((48, 64, 3), (b, g, r), np.uint8))
    for fmt in (PixelFormat.RGB8, PixelFormat.BGR8):
        camera = opened(
            pixel_format=fmt,
            trigger="software",
            features={"TestImageSelector": "Off", "ImageFilename": str(tmp_path), "ImageFileMode": "On"},
        )
        frames = [f.image[5, 5].tolist() for f in (some_frames(camera, 1)[0] for _ in range(2))]
        wanted = [[200, 30, 60], [20, 180, 90]]
        assert frames == (wanted if fmt is PixelFormat.RGB8 else [c[::-1] for c in wanted])
        camera.close()


def test_off_and_on_are_words_to_a_camera_and_truths_to_yaml(opened):
    camera = opened(features={"TestImageSelector": False, "ImageFileMode": True})
    assert (camera._camera.TestImageSelector.Value, camera._camera.ImageFileMode.Value) == ("Off", "On")


def test_frames_limit_ends_the_stream(opened):
    camera = opened(trigger="software", frames=3)
    some_frames(camera, 3)
    with pytest.raises(EndOfStream):
        camera.ready(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"serial": "42"}, "no camera with serial '42'; connected: .*0815-0000"),
        ({}, "several cameras are connected; choose one by serial"),
        ({"serial": "0815-0000", "features": {"Warp": 1}}, r"features\.Warp: this camera has no feature Warp"),
        ({"serial": "0815-0000", "features": {"Width": "two"}}, r"features\.Width: 'two' was refused by Width"),
        (
            {"serial": "0815-0000", "features": {"Width": 100.9}},
            r"features\.Width: 100\.9 .* it wants a whole number",
        ),
        ({"serial": "0815-0000", "features": {"Width": True}}, r"features\.Width: True .* it wants a number"),
        (
            {"serial": "0815-0000", "features": {"ReverseX": "maybe"}},
            "'maybe' was refused .* it wants true or false",
        ),
        ({"serial": "0815-0000", "exposure_us": 1e12}, "exposure_us: .* was refused by ExposureTime"),
    ],
)
def test_what_the_camera_refuses_is_said_with_its_option(options, message):
    camera = PylonCamera(PylonOptions(driver="pylon", **options))
    with pytest.raises(CameraError, match=message):
        camera.open()
    camera.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"serial": "1", "ip": "10.0.0.1"}, "one of serial, user_name or ip"),
        ({"trigger_rate_hz": 5}, "needs trigger: software"),
        ({"trigger": "hardware", "rate_fps": 5}, "free_run"),
    ],
)
def test_options_that_contradict_one_another(options, message):
    with pytest.raises(ValueError, match=message):
        PylonOptions(driver="pylon", **options)


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pypylon", None)
    with pytest.raises(DriverMissing, match=r"pip install 'inspectord\[pylon\]'"):
        PylonCamera(PylonOptions(driver="pylon"))


def soon_ns(s=60):
    return time.monotonic_ns() + int(s * 1e9)


def test_the_output_line_is_energised_for_one_pulse_and_never_latched(opened):
    camera = opened(pass_output={"line": "Line3", "user_output": "UserOutput2", "pulse_ms": 30})
    device, seen = camera._camera, []
    assert (device.LineSelector.Value, device.LineMode.Value) == ("Line3", "Output")
    assert device.LineSource.Value == "UserOutput2"
    assert device.UserOutputValue.Value is False, "off until a part is OK"
    camera._pass_line._options = PassOutput(pulse_ms=2000)
    signal = threading.Thread(target=camera.signal_pass, args=(soon_ns(),))
    signal.start()
    while signal.is_alive():
        seen.append(device.UserOutputValue.Value)
    assert True in seen
    assert device.UserOutputValue.Value is False
    camera.close()
    with pytest.raises(CameraLost, match="away"):
        camera.signal_pass(soon_ns())


def test_closing_ends_a_pulse_and_nothing_touches_the_device_after_it(opened, monkeypatch):
    camera = opened(pass_output={"line": "Line3", "pulse_ms": 2000})
    device, line, switched, lost = camera._camera, camera._pass_line, [], []
    switch = PassLine._set
    monkeypatch.setattr(PassLine, "_set", lambda self, on: (switch(self, on), switched.append(on)))

    def pulse():
        try:
            camera.signal_pass(soon_ns())
        except CameraLost as error:
            lost.append(str(error))

    signal = threading.Thread(target=pulse)
    signal.start()
    while signal.is_alive() and not device.UserOutputValue.Value:
        pass
    camera.close()
    assert switched == [True, False], "switched off before the device went"
    signal.join()
    assert lost == ["the camera was closed"]
    with pytest.raises(CameraLost, match="closed"):
        line.pulse(soon_ns())  # asked for just before the camera went
    assert switched == [True, False]


def test_a_pulse_behind_a_hung_one_is_not_given_late(opened, monkeypatch):
    camera, switched, lost = opened(pass_output={"line": "Line3", "pulse_ms": 1}), [], []
    switch, hangs, let_go = PassLine._set, threading.Event(), threading.Event()

    def hang(self, on):
        switched.append(on)
        if not hangs.is_set():
            hangs.set()
            assert let_go.wait(60)
        switch(self, on)

    def pulse():
        with pytest.raises(CameraLost) as caught:
            camera.signal_pass(soon_ns(0.5))
        lost.append(str(caught.value))

    monkeypatch.setattr(PassLine, "_set", hang)
    signal = threading.Thread(target=pulse)
    signal.start()
    assert hangs.wait(60)
    with pytest.raises(CameraLost, match="does not answer"):
        camera.signal_pass(soon_ns(0.5))  # by then the other's time is over, too
    let_go.set()
    signal.join()
    assert lost == ["the output line answered too late"]
    assert switched == [True, False], "switched off at once, and by nobody else"
    assert camera._camera.UserOutputValue.Value is False


@pytest.fixture
def refusing(monkeypatch):
    """Orders to the output line whose answers are lost, so many of each, though the camera obeys or stays on."""
    from pypylon import genicam

    left, switch = {True: 0, False: 0}, PassLine._set

    def refuse(self, on):
        switch(self, on or left[on] > 0)
        if left[on] > 0:
            left[on] -= 1
            raise genicam.GenericException("no answer")

    monkeypatch.setattr(PassLine, "_set", refuse)
    return left


def test_a_line_that_is_not_switched_off_at_once_is_told_so_until_it_is(opened, refusing):
    camera = opened(pass_output={"line": "Line3", "pulse_ms": 1})
    refusing[False] = 3
    camera.signal_pass(soon_ns())
    assert refusing[False] == 0
    assert camera._camera.UserOutputValue.Value is False
    refusing[True] = 1
    with pytest.raises(CameraLost, match="no answer"):
        camera.signal_pass(soon_ns())
    assert camera._camera.UserOutputValue.Value is False, "it had been switched on all the same"
    assert camera.grab(10), "the camera is not lost"


def test_a_line_that_stays_on_costs_the_camera(opened, refusing):
    """It passes whatever comes."""
    camera, lost = opened(pass_output={"line": "Line3", "pulse_ms": 1}), []
    refusing[False] = 1 << 60

    def pulse():
        try:
            camera.signal_pass(soon_ns())
        except CameraLost as error:
            lost.append(str(error))

    signal = threading.Thread(target=pulse)
    signal.start()
    while camera._pass_line.stuck is None:
        assert signal.is_alive()
    with pytest.raises(CameraLost, match="could not be switched off: no answer"):
        camera.grab(10)
    with pytest.raises(CameraLost, match="cannot be switched off"):
        camera.signal_pass(soon_ns())
    camera.close()
    signal.join(60)
    assert lost == ["the camera was closed"]
    refusing[False] = 0
    camera.open()
    assert camera._camera.UserOutputValue.Value is False
    assert camera.grab(10)
    camera.signal_pass(soon_ns())


def test_no_pulse_is_begun_after_its_time(opened, monkeypatch):
    camera, switched = opened(pass_output={"line": "Line3", "pulse_ms": 1}), []
    monkeypatch.setattr(PassLine, "_set", lambda _self, on: switched.append(on))
    with pytest.raises(CameraLost, match="too late"):
        camera.signal_pass(time.monotonic_ns() - 1)
    assert switched == []


class Timed:
    """A camera whose own timer ends the pulse, as the emulated one has none."""

    def __init__(self, camera, *, inverted=False):
        self.camera, self.asked = camera, 0
        self.LineInverter = SimpleNamespace(Value=inverted)
        self.SoftwareSignalPulse = SimpleNamespace(Execute=self.execute)
        self.TimerDelay = SimpleNamespace(Value=5.0)
        for name in ("LineSelector", "LineMode", "LineSource", "TimerSelector", "TimerTriggerSource"):
            setattr(self, name, SimpleNamespace(Value=None))
        self.TimerDuration = self.SoftwareSignalSelector = SimpleNamespace(Value=None)

    def GetNodeMap(self):
        return SimpleNamespace(GetNode=lambda name: self.camera.GetNodeMap().GetNode("Width") if name else None)

    def execute(self):
        self.asked += 1
        while time.monotonic_ns() <= self.until_ns:  # an answer that had to be sent again
            pass


def test_a_timers_pulse_is_waited_for_though_its_answer_came_late(opened):
    timed = Timed(opened()._camera)
    line = PassLine(timed, PassOutput(pulse_ms=100), inverter_configured=False)
    assert timed.TimerDelay.Value == 0
    timed.until_ns = soon_ns(1)
    with pytest.raises(CameraLost, match="too late"):
        line.pulse(timed.until_ns)
    assert timed.asked == 1
    assert time.monotonic_ns() - timed.until_ns > 100_000_000, "the next may not run into it"


def test_an_inverted_line_is_refused_unless_it_is_wired_so(opened):
    timed = Timed(opened()._camera, inverted=True)
    with pytest.raises(CameraError, match=r"inverts Line2.*LineInverter: false"):
        PassLine(timed, PassOutput(), inverter_configured=False)
    PassLine(timed, PassOutput(), inverter_configured=True)


@pytest.mark.parametrize(
    ("features", "configured"),
    [
        ({}, False),
        ({"LineSelector": "Line3", "LineInverter": True}, False),  # a strobe's
        ({"LineInverter": True}, False),
        ({"LineSelector": "Line2", "LineInverter": True}, True),
    ],
)
def test_the_inverter_of_another_line_says_nothing_of_the_pass_output(features, configured):
    options = PylonOptions(driver="pylon", pass_output=PassOutput(line="Line2"), features=features)
    assert options.inverter_configured is configured


def test_chunk_data_behind_the_image_is_no_part_of_it():
    payload = np.arange(20, dtype=np.uint8)
    result = SimpleNamespace(
        GetMemoryView=lambda: memoryview(payload), GetImageMemoryView=lambda: memoryview(payload)[:12]
    )
    assert np.asarray(_Lent(result, PixelFormat.MONO8)).tolist() == list(range(12))
