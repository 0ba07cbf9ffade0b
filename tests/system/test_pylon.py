from __future__ import annotations

import itertools
import threading

import pytest
import yaml

from daemon.addresses import PublishConfig
from daemon.config import PlausibleConfig, StationConfig
from daemon.station import Station
from drivers.pylon import PylonCamera, PylonOptions
from pipeline.engine_cpu import CpuEngine, cpu_precisions
from pipeline.engines import EngineChoice
from tests.system.line import free_port
from tests.system.test_commands import inspectord

pytest.importorskip("pypylon", reason="pypylon is not installed: pip install 'inspectord[pylon]'")

EMULATED = {
    "driver": "pylon",
    "serial": "0815-0001",
    "width": 128,
    "height": 96,
    "exposure_us": 100.0,
    "trigger": "software",
    "trigger_timeout_ms": 60_000,
    # The emulator's test image does not change; a frozen picture is what the daemon would rightly refuse.
    "features": {"TestImageSelector": "Testimage2"},
}


def test_500_software_triggers_give_500_verdicts(line):
    bench = line({**EMULATED, "frames": 500}, plausible={"frozen_frames": 0}, on_overload="wait").start()
    code, output = bench.finish()
    assert code == 0, bench.read_log()
    assert bench.sequences() == list(range(1, 501))
    assert {v["verdict"] for v in bench.verdicts} <= {"OK", "NG"}
    assert [v["frame"]["device_id"] for v in bench.verdicts] == [str(n) for n in range(500)]
    assert {v["source"] for v in bench.verdicts} == {"0815-0001"}
    assert "500 frames:" in output


def test_incomplete_buffers_give_invalid_and_the_rest_is_judged(line):
    features = {**EMULATED["features"], "ForceFailedBufferCount": 3, "ForceFailedBuffer": True}
    camera = {**EMULATED, "frames": 10, "features": features}
    bench = line(camera, plausible={"frozen_frames": 0}, on_overload="wait").start()
    code, _ = bench.finish()
    assert code == 0
    assert bench.sequences() == list(range(1, 11))
    assert [v["reason"] for v in bench.verdicts] == ["incomplete"] * 3 + [None] * 7


def test_a_camera_that_is_too_fast_gets_invalid_overload_in_order(line):
    bench = line({**EMULATED, "frames": 80}, plausible={"frozen_frames": 0}, slots=3, threads=1).start()
    code, output = bench.finish()
    assert code == 0
    assert bench.sequences() == list(range(1, 81))
    reasons = {v["reason"] for v in bench.verdicts}
    assert reasons == {None, "overload"}, "the emulator outruns the engine; neither may starve"
    assert "overload)" in output


class PulledCable(PylonCamera):
    """A real (emulated) camera whose stream grabber fails at chosen frames, as with a pulled cable."""

    def __init__(self, options, fail_at):
        super().__init__(options)
        self.fail_at, self.grabbed, self.opened = fail_at, 0, 0

    def open(self):
        self.opened += 1
        return super().open()

    def grab(self, timeout_s):
        if self.grabbed in self.fail_at:
            self.fail_at = self.fail_at - {self.grabbed}
            node = self._camera.GetStreamGrabberNodeMap().GetNode("ImposedError")
            node.FromString("cable pulled")
        frames = super().grab(timeout_s)
        self.grabbed += len(frames)
        return frames


@pytest.mark.parametrize("trigger", ["software", "free_run"])
def test_a_pulled_cable_reopens_and_loses_no_number(tiny_bundle, tmp_path, trigger):
    import json

    import zmq

    options = PylonOptions(**{**EMULATED, "trigger": trigger, "frames": 40})
    camera = PulledCable(options, {10, 25})
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    config = StationConfig(
        station="cable",
        camera=options,
        model=tiny_bundle,
        publish=PublishConfig(verdicts=[endpoint]),
        plausible=PlausibleConfig(frozen_frames=0),
        on_overload="wait",
        state_dir=tmp_path,
    )
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.setsockopt(zmq.LINGER, 0)
        subscriber.setsockopt(zmq.RECONNECT_IVL, 10)
        subscriber.connect(endpoint)
        subscriber.subscribe(b"verdict/cable/")
        station = Station(config, camera_for=lambda _settings: camera)
        results = []
        thread = threading.Thread(target=lambda: results.append(station.run()), daemon=True)
        thread.start()
        verdicts = []
        while thread.is_alive() or subscriber.poll(100):
            if subscriber.poll(100):
                verdicts.append(json.loads(subscriber.recv_multipart()[1]))
        thread.join()
    (summary,) = results
    assert camera.opened == 3
    assert [v["sequence"] for v in verdicts] == list(range(1, summary.totals.seen + 1))
    assert summary.totals.in_flight == 0
    reasons = [v["reason"] for v in verdicts if v["verdict"] == "INVALID"]
    # A software trigger that was under way when the cable was pulled is answered for; free run has none.
    assert reasons == (["camera", "camera"] if trigger == "software" else [])
    assert summary.totals.seen == 40 + len(reasons), "triggers without a frame have their numbers too"


def test_the_daemon_lives_while_the_camera_is_away_and_says_so(line):
    bench = line({**EMULATED, "serial": "not-connected"}).start()
    bench.receive_until(lambda: bench.health and bench.health[-1]["camera"]["error"])
    last = bench.health[-1]
    assert last["state"] == "no_camera"
    assert not last["camera"]["connected"]
    assert "no camera with serial 'not-connected'" in last["camera"]["error"]
    code, _ = bench.stop()
    assert code == 0


@pytest.mark.parametrize("threshold", [1e9, -1.0])
def test_only_ok_parts_get_a_pass_pulse(tiny_bundle, tmp_path, threshold):
    pulses = []

    class Spied(PylonCamera):
        def signal_pass(self, until_ns):
            super().signal_pass(until_ns)
            pulses.append(self)

    options = PylonOptions(**{**EMULATED, "frames": 8, "pass_output": {"line": "Line3", "pulse_ms": 1}})
    config = StationConfig(
        station="gate",
        camera=options,
        model=tiny_bundle,
        publish=PublishConfig(verdicts=[f"tcp://127.0.0.1:{free_port()}"]),
        plausible=PlausibleConfig(frozen_frames=0),
        on_overload="wait",
        threshold=threshold,
        state_dir=tmp_path,
    )
    station = Station(config, camera_for=lambda _settings: Spied(options))
    summary = station.run()
    assert summary.totals.seen == 8
    missed = station.events.counts().get("camera", 0)  # the stream's end may close the camera before the last pulse
    assert len(pulses) + missed == summary.totals.ok
    assert (len(pulses) > 0) == (threshold > 0)


def test_an_engine_that_fails_now_and_then_does_not_keep_the_cameras_buffers(tiny_bundle, tmp_path, no_collection):
    judged = itertools.count(1)

    class Faulty(CpuEngine):
        def begin(self, image, fmt):
            if image.any() and next(judged) % 4 == 0:  # never three in a row, which would build it anew
                raise RuntimeError("now and then")
            return super().begin(image, fmt)

    config = StationConfig(
        station="now-and-then",
        camera=PylonOptions(**{**EMULATED, "frames": 100}),
        model=tiny_bundle,
        publish=PublishConfig(verdicts=[f"tcp://127.0.0.1:{free_port()}"]),
        plausible=PlausibleConfig(frozen_frames=0),
        on_overload="wait",
        state_dir=tmp_path,
    )
    station = Station(config, engine_for=lambda _config, bundle: EngineChoice(Faulty(bundle.model, 1), "test"))
    summary = station.run()
    assert (summary.totals.seen, summary.totals.invalid) == (100, 25)
    assert "camera" not in station.events.counts(), "it was never opened anew"


def test_check_judges_the_frame_after_the_camera_is_closed(tmp_path, tiny_bundle):
    """The driver's memory is gone by then; small frames would hide it."""
    config = {
        "station": "checked",
        "camera": {**EMULATED, "trigger": "free_run", "width": 2448, "height": 2048},
        "model": str(tiny_bundle),
        "precision": cpu_precisions()[-1],
        "state_dir": str(tmp_path),
    }
    path = tmp_path / "station.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    done = inspectord("check", "-c", path)
    assert done.returncode in (0, 1), done.stderr
    assert "2448x2048 px, Mono8, complete" in done.stdout
    said = "scores" if cpu_precisions() != ["fp32"] else "verdict"
    assert said in done.stdout + done.stderr
