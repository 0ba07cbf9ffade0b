from __future__ import annotations

import queue
import shutil
import socket
import subprocess
import threading
import time
from typing import ClassVar

import pytest

from tests.system.line import REPOSITORY, Line
from tests.system.test_run import SYNTHETIC


@pytest.fixture
def notify_socket(tmp_path):
    """What systemd is told, and where; it is always read, for its queue holds ten messages on some machines."""
    heard = queue.SimpleQueue()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "notify"))

        def read():
            while (message := server.recv(256)) != b"the test is over":
                heard.put(message.decode())

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        yield heard, str(tmp_path / "notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"the test is over", str(tmp_path / "notify"))
        reader.join(60)


def start_with_watchdog(bench: Line, address, watchdog_us=800_000):
    bench.environment = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": str(watchdog_us)}
    return bench.start()


def states_until(heard, wanted, count=1):
    seen = []
    while seen.count(wanted) < count:
        seen.append(heard.get(timeout=60))
    return seen


def test_systemd_hears_ready_watchdog_and_stopping(line, notify_socket):
    heard, address = notify_socket
    bench = start_with_watchdog(line(SYNTHETIC), address)
    seen = states_until(heard, "WATCHDOG=1", 3)
    assert seen[0] == "READY=1"
    bench.process.terminate()
    states_until(heard, "STOPPING=1")
    assert bench.finish()[0] == 0
    assert "raise WatchdogSec or lower hang_s" in bench.read_log()  # 0.8 s here, and hang_s is 15


def test_an_idle_line_is_healthy(line, notify_socket):
    heard, address = notify_socket
    camera = {"driver": "pylon", "serial": "0815-0000", "trigger": "hardware", "width": 64, "height": 64}
    pytest.importorskip("pypylon", reason="pypylon is not installed")
    bench = start_with_watchdog(line(camera), address)  # a trigger line that nobody fires
    states_until(heard, "WATCHDOG=1", 4)
    assert bench.verdicts == []
    bench.stop()


def test_ready_comes_without_a_camera_and_a_missing_camera_is_no_reason_for_a_restart(line, notify_socket):
    pytest.importorskip("pypylon", reason="pypylon is not installed")
    heard, address = notify_socket
    bench = start_with_watchdog(line({"driver": "pylon", "serial": "gone"}), address)
    seen = states_until(heard, "WATCHDOG=1", 4)
    assert seen[0] == "READY=1"
    bench.stop()


class StuckEngine:
    """An engine that hangs in its third frame until it is let go, as a driver call may."""

    device, precision, at_once = "stuck", "fp32", 1

    def __init__(self, engine):
        self._engine, self._calls, self.let_go, self.stuck = engine, 0, threading.Event(), threading.Event()

    def warm_up(self):
        self._engine.warm_up()

    def begin(self, image, fmt):
        self._calls += bool(image.any())  # not the blank one of the warm-up
        if self._calls == 3:
            self.stuck.set()
            self.let_go.wait(60)
        return self._engine.begin(image, fmt)


def test_a_stuck_engine_stops_the_watchdog(tiny_bundle, tmp_path, notify_socket, monkeypatch):
    from daemon.addresses import PublishConfig
    from daemon.config import StationConfig
    from daemon.station import Station
    from drivers.synthetic import SyntheticOptions
    from pipeline.bundle import read_bundle
    from pipeline.engine_cpu import CpuEngine
    from pipeline.engines import EngineChoice
    from tests.system.line import free_port

    heard, address = notify_socket
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    engine = StuckEngine(CpuEngine(read_bundle(tiny_bundle).model))
    config = StationConfig(
        station="stuck",
        camera=SyntheticOptions(width=96, height=96),
        model=tiny_bundle,
        publish=PublishConfig(verdicts=[f"tcp://127.0.0.1:{free_port()}"]),
        state_dir=tmp_path / "state",
    )
    station = Station(config, engine_for=lambda _config, _bundle: EngineChoice(engine, "test"))
    thread = threading.Thread(target=station.run, daemon=True)
    thread.start()
    assert engine.stuck.wait(60)
    # What was under way may still be told; then there must be silence for many watchdog periods.
    deadline_s, silent = time.monotonic() + 30, False
    while not silent and time.monotonic() < deadline_s:
        try:
            heard.get(timeout=1.5)
        except queue.Empty:
            silent = True
    assert silent, "the watchdog went on although the engine was stuck"
    engine.let_go.set()
    states_until(heard, "WATCHDOG=1")
    station.stop()
    thread.join(60)
    assert not thread.is_alive()


def test_what_is_given_up_and_begun_anew_is_no_reason_to_kill_the_process(
    tiny_bundle, tmp_path, notify_socket, monkeypatch
):
    """Five hangs in a row end it in good order; the watchdog must not come before."""
    from daemon.config import SupervisionConfig
    from daemon.station import Station, StationFailed
    from tests.system.test_faults import DeafCamera, configured

    class Deaf(DeafCamera):
        opened: ClassVar[list[object]] = []

    heard, address = notify_socket
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    config = configured("deaf", tiny_bundle, tmp_path, supervision=SupervisionConfig(hang_s=0.3))
    with pytest.raises(StationFailed, match="5 times without work in between"):
        Station(config, camera_for=lambda _settings: Deaf()).run()
    for camera in Deaf.opened:
        camera.let_go.set()
    seen = states_until(heard, "STOPPING=1")
    assert seen.count("WATCHDOG=1") >= 4, "one for each that was begun anew"


@pytest.fixture
def unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    text = (REPOSITORY / "systemd" / "inspectord@.service").read_text()
    path = tmp_path / "inspectord@line1.service"
    path.write_text(text.replace("/opt/inspectord/bin/inspectord", "/bin/true"))  # verify wants it to exist
    return path


def test_the_unit_is_valid(unit):
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_unit_is_confined(unit):
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=25", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_example_configuration_is_valid(tiny_bundle, tmp_path):
    from daemon.config import load_config

    text = (REPOSITORY / "systemd" / "example-station.yaml").read_text()
    path = tmp_path / "line1.yaml"
    path.write_text(text.replace("/var/lib/inspectord/models/line1", str(tiny_bundle)))
    assert load_config(path).station == "line1"
