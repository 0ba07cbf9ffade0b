from __future__ import annotations

import contextlib
import datetime
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

from daemon.addresses import PublishConfig
from daemon.config import StationConfig
from daemon.station import Station, StationFailed
from drivers.camera import CameraInfo, Fires
from drivers.replay import list_images
from drivers.synthetic import SyntheticOptions
from pipeline.bundle import read_bundle
from pipeline.engine_cpu import CpuEngine
from pipeline.engines import EngineChoice, make_engine
from pipeline.inspect import Inspector
from pipeline.plausible import PlausibleLimits
from tests.conftest import SHARED_DATA
from tests.system.line import REPOSITORY, free_port

SYNTHETIC = {"driver": "synthetic", "seed": 3, "width": 96, "height": 96, "defect_rate": 0.3}
REASONS = {
    "incomplete",
    "unreadable",
    "lost",
    "timeout",
    "camera",
    "overload",
    "format",
    "image",
    "engine",
    "deadline",
    "restart",
}


def assert_well_formed(verdict, station="bench"):
    """The documented message, field by field, as a reader in another language would expect it."""
    assert list(verdict) == [
        "schema", "station", "boot", "sequence", "verdict", "reason", "score", "threshold", "regions", "source",
        "part", "trigger", "recipe", "frame", "model", "calibration", "time", "latency_us", "journaled",
    ]  # fmt: skip
    assert (verdict["schema"], verdict["station"]) == ("inspectord.verdict/1", station)
    assert len(verdict["boot"]) == 16
    assert verdict["verdict"] in ("OK", "NG", "INVALID")
    if verdict["verdict"] == "INVALID":
        assert verdict["reason"] in REASONS
        assert verdict["score"] is None
    else:
        assert verdict["reason"] is None
        assert (verdict["score"] > verdict["threshold"]) == (verdict["verdict"] == "NG")
        assert bool(verdict["regions"]) == (verdict["verdict"] == "NG")
    for region in verdict["regions"]:
        assert list(region) == ["x", "y", "width", "height", "area_px", "peak"]
    assert list(verdict["frame"]) == ["device_id", "device_timestamp_ns", "width", "height", "pixel_format"]
    assert list(verdict["latency_us"]) == ["grab", "queue", "preprocess", "infer", "total"]
    assert all(isinstance(v, int) and 0 <= v < 2**53 for v in verdict["latency_us"].values())
    assert verdict["time"].endswith("Z")
    datetime.datetime.fromisoformat(verdict["time"])
    assert (verdict["part"], verdict["trigger"], verdict["recipe"]) == (None, None, None)


def test_every_image_of_a_folder_gets_one_verdict_in_order(line, good_parts, tiny_bundle):
    bench = line({"driver": "replay", "path": str(good_parts)}).start()
    code, output = bench.finish()
    assert code == 0, bench.read_log()
    assert bench.sequences() == list(range(1, 13))
    names = [name for name, _ in list_images(good_parts)]
    assert [v["source"] for v in bench.verdicts] == names
    for verdict in bench.verdicts:
        assert_well_formed(verdict)
    assert "12 frames:" in output
    assert "p99" in output

    # The numbers on the wire are those of the pipeline on the same files.
    bundle = read_bundle(tiny_bundle)
    from calibrate.dataset import read_frame
    from calibrate.layouts import ImageFile

    inspector = Inspector(bundle, make_engine(bundle, "cpu").engine, limits=PlausibleLimits())
    for verdict, (name, path) in zip(bench.verdicts, list_images(good_parts), strict=True):
        wanted = inspector.inspect(read_frame(ImageFile(name, path)))
        assert verdict["score"] == pytest.approx(wanted.score, rel=1e-4)
        for sent in (m for m in bench.maps if m["sequence"] == verdict["sequence"]):  # maps may be dropped
            np.testing.assert_allclose(sent["values"], wanted.anomaly_map, rtol=1e-3, atol=1e-4)
    assert bench.maps[0]["schema"] == "inspectord.map/1", "at least one came"
    assert bench.maps[0]["geometry"]["padding_cells"] == 4
    assert bench.maps[0]["shape"] == [8, 8]


@pytest.mark.skipif(not (SHARED_DATA / "mtd").is_dir(), reason="shared/data/mtd is not here")
def test_real_photographs_of_many_sizes(line):
    bench = line({"driver": "replay", "path": str(SHARED_DATA / "mtd" / "test" / "break")}).start()
    code, _ = bench.finish()
    assert code == 0
    assert bench.sequences() == list(range(1, 86))
    assert len({v["source"] for v in bench.verdicts}) == 85
    assert len({(v["frame"]["width"], v["frame"]["height"]) for v in bench.verdicts}) > 10


def test_bad_files_are_invalid_and_the_line_goes_on(line, good_parts, tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    whole = (good_parts / "good_0.png").read_bytes()
    (folder / "1.png").write_bytes(whole)
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])
    (folder / "3.png").write_bytes(b"")
    cv2.imwrite(str(folder / "4.png"), np.zeros((96, 96, 3), np.uint8))
    cv2.imwrite(str(folder / "5.png"), np.full((96, 96, 3), 255, np.uint8))
    (folder / "6.png").write_bytes((good_parts / "good_1.png").read_bytes())
    bench = line({"driver": "replay", "path": str(folder)}).start()
    code, output = bench.finish()
    assert code == 0
    reasons = [v["reason"] for v in bench.verdicts]
    assert reasons == [None, "unreadable", "unreadable", "image", "image", None]
    assert "4 INVALID (2 image, 2 unreadable)" in output
    logged = [e for e in bench.log_events() if e["event"] == "invalid"]
    assert [(e["station"], e["sequence"]) for e in logged] == [("bench", n) for n in (2, 3, 4, 5)]
    for verdict in bench.verdicts:
        assert_well_formed(verdict)


def test_a_frozen_camera_is_invalid_from_the_third_identical_frame(line, good_parts, tmp_path):
    folder = tmp_path / "frozen"
    folder.mkdir()
    for index in range(5):
        (folder / f"{index}.png").write_bytes((good_parts / "good_0.png").read_bytes())
    bench = line({"driver": "replay", "path": str(folder)}, slots=3).start()
    bench.finish()
    assert [v["reason"] for v in bench.verdicts] == [None, None, "image", "image", "image"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_is_in_flight_and_exits_0(line, number):
    bench = line(SYNTHETIC).start()
    bench.receive_until(lambda: len(bench.verdicts) >= 5)
    code, output = bench.stop(number)
    assert code == 0, bench.read_log()
    sequences = bench.sequences()
    assert sequences == list(range(1, len(sequences) + 1))
    assert f"{len(sequences)} frames:" in output, "everything that was numbered was published"


def test_sequence_goes_on_over_restarts_under_a_new_boot(line):
    bench = line({**SYNTHETIC, "frames": 4}).start()
    bench.finish()
    bench.start().finish()
    assert bench.sequences() == list(range(1, 9))
    assert len({v["boot"] for v in bench.verdicts}) == 2


def test_kill_9_loses_no_number_the_unjudged_ones_become_invalid_restart(line):
    bench = line({**SYNTHETIC, "frames": None}).start()
    bench.receive_until(lambda: len(bench.verdicts) >= 6)
    bench.process.kill()
    bench.finish()
    before = bench.sequences()
    bench.start()
    bench.receive_until(lambda: len(bench.verdicts) >= len(before) + 6)
    bench.stop()
    seen = set(bench.sequences())
    # What the socket held when the process died may not have reached us; every later number is there.
    assert set(range(1, max(seen) + 1)) - seen <= set(range(before[-1] + 1, before[-1] + 33))
    later = bench.verdicts[len(before) :]
    restarted = [v for v in later if v["reason"] == "restart"]
    assert all(v["verdict"] == "INVALID" for v in restarted)
    assert [v["sequence"] for v in later] == list(range(later[0]["sequence"], later[-1]["sequence"] + 1))
    for verdict in later:
        assert_well_formed(verdict)


def test_health_every_second_with_an_arithmetic_that_holds(line):
    bench = line(SYNTHETIC).start()
    bench.receive_until(lambda: len(bench.health) >= 3)
    bench.stop()
    for message in bench.health:
        assert message["schema"] == "inspectord.health/1"
        assert message["seen"] == message["ok"] + message["ng"] + message["invalid"] + message["in_flight"]
        assert message["camera"]["reopened"] == 0
    assert bench.health[2]["camera"]["connected"]
    assert bench.health[2]["state"] == "running"


def test_the_daemon_waits_for_no_subscriber_and_a_stalled_one_does_not_stop_it(line):
    bench = line({**SYNTHETIC, "frames": 60}).start()
    bench.process.wait(120)  # nobody reads a single message meanwhile
    assert bench.process.returncode == 0


def test_garbage_on_every_socket_does_not_disturb_the_line(line, rng):
    bench = line(SYNTHETIC).start()
    bench.receive_until(lambda: bench.verdicts)
    connections = []
    for endpoint in (bench.verdict_endpoint, bench.map_endpoint):
        address = ("127.0.0.1", int(endpoint.rsplit(":", 1)[1]))
        for blob in (b"GET / HTTP/1.1\r\n\r\n", rng.bytes(100_000), b"\xff" + b"\0" * 8 + b"\x7f\x03\x01", b""):
            connection = socket.create_connection(address)
            connections.append(connection)  # half of them stay open, in the middle of a handshake
            with contextlib.suppress(OSError):  # libzmq may hang up before it has read it all
                connection.sendall(blob)
            if len(connections) % 2:
                connection.close()
    before = len(bench.verdicts)
    bench.receive_until(lambda: len(bench.verdicts) > before + 20)
    code, _ = bench.stop()
    for connection in connections:
        connection.close()
    assert code == 0, bench.read_log()
    assert bench.sequences() == list(range(1, len(bench.verdicts) + 1))


def test_an_address_in_use_is_said(line):
    bench = line(SYNTHETIC)
    port = int(bench.verdict_endpoint.rsplit(":", 1)[1])
    with socket.create_server(("127.0.0.1", port)):
        bench.start()
        assert bench.process.wait(60) == 1
    assert f"cannot bind {bench.verdict_endpoint}: Address already in use" in bench.read_log()


def test_an_empty_folder_is_said_and_not_tried_for_ever(line, tmp_path):
    (tmp_path / "empty").mkdir()
    bench = line({"driver": "replay", "path": str(tmp_path / "empty")}).start()
    assert bench.process.wait(60) == 1
    assert "no images there" in bench.read_log()


def test_a_log_and_a_notify_socket_that_are_gone_do_not_stop_the_line(line):
    bench = line({**SYNTHETIC, "frames": 20})
    bench.environment = {"NOTIFY_SOCKET": "/nowhere/notify"}
    bench.start()
    assert bench.finish()[0] == 0
    assert bench.sequences() == list(range(1, 21))
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a log disk without space
        done = subprocess.run(
            [sys.executable, "-m", "daemon.cli", "run", "-c", str(bench.path)],
            cwd=REPOSITORY, stderr=full, stdout=subprocess.PIPE, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert done.returncode == 0
    assert "20 frames:" in done.stdout


def test_a_second_signal_ends_at_once_whichever_came_first(line):
    bench = line({**SYNTHETIC, "width": 2500, "height": 2500}).start()  # each part takes seconds to render
    bench.receive_until(lambda: bench.health)
    bench.process.send_signal(signal.SIGTERM)
    bench.process.send_signal(signal.SIGINT)
    # Sent so close together, either may be handled as the second one.
    assert bench.process.wait(60) in (128 + signal.SIGINT, 128 + signal.SIGTERM)


class HungCamera:
    """A camera whose driver call never returns, as after a pulled cable on some hosts."""

    live = True
    fires = Fires.ITSELF
    signals_pass = False

    def __init__(self):
        self.grabbing, self.let_go = threading.Event(), threading.Event()

    def open(self):
        return CameraInfo("hung", "hung")

    def grab(self, timeout_s):
        self.grabbing.set()
        self.let_go.wait(120)
        return []

    def close(self):
        pass


def test_a_driver_call_that_never_returns_is_abandoned_when_stopping(tiny_bundle, tmp_path):
    config = StationConfig(
        station="hung",
        camera=SyntheticOptions(),
        model=tiny_bundle,
        publish=PublishConfig(verdicts=[f"tcp://127.0.0.1:{free_port()}"]),
        state_dir=tmp_path,
    )
    camera, failures = HungCamera(), []
    station = Station(config, camera_for=lambda _settings: camera)

    def run():
        try:
            station.run()
        except StationFailed as error:
            failures.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert camera.grabbing.wait(60)
    station.stop()
    thread.join(60)
    camera.let_go.set()
    assert failures == ["the camera's driver did not return; it was abandoned with its device"]


def test_two_daemons_cannot_run_one_station(line):
    bench = line(SYNTHETIC).start()
    bench.receive_until(lambda: bench.verdicts)
    second = line(SYNTHETIC, state_dir=bench.config["state_dir"]).start()
    assert second.process.wait(60) == 1
    assert "another inspectord runs this station" in second.read_log()
    bench.stop()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
def test_broken_bundles_are_refused_at_start_with_exit_code_2(line, tiny_bundle, tmp_path, damage):
    import shutil

    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    weights, manifest = copy / "weights.safetensors", copy / "bundle.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "flipped":
        blob = bytearray(weights.read_bytes())
        blob[-5] ^= 255
        weights.write_bytes(blob)
    else:
        manifest.write_text('{"format": "somebody.else/3"}')
    bench = line(SYNTHETIC, model=str(copy)).start()
    assert bench.process.wait(60) == 2
    wanted = {"truncated": "truncated?", "flipped": "SHA-256 does not fit", "foreign": "somebody.else/3"}
    assert wanted[damage] in bench.read_log()
    assert "Traceback" not in bench.read_log()


def test_an_engine_fault_is_invalid_and_the_daemon_goes_on(tiny_bundle, tmp_path, monkeypatch):
    """In process, because no real CPU engine fails on demand: FaultyEngine stands for a device that does."""

    class FaultyEngine(CpuEngine):
        calls = 0

        def begin(self, image, fmt):
            self.calls += bool(image.any())  # not the blank one of the warm-up
            if self.calls in (3, 4):
                raise RuntimeError("an illegal memory access was encountered")
            return super().begin(image, fmt)

    config = StationConfig(
        station="faulty",
        camera=SyntheticOptions(width=96, height=96, frames=8),
        model=tiny_bundle,
        publish=PublishConfig(verdicts=[f"tcp://127.0.0.1:{free_port()}"]),
        state_dir=tmp_path,
    )
    station = Station(config, engine_for=lambda _config, bundle: EngineChoice(FaultyEngine(bundle.model), "test"))
    results = []
    thread = threading.Thread(target=lambda: results.append(station.run()), daemon=True)
    thread.start()
    thread.join(60)
    (summary,) = results
    assert summary.totals.seen == 8
    assert summary.totals.reasons == {"engine": 2}
    assert summary.totals.in_flight == 0
