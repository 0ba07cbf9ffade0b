from __future__ import annotations

import json
import os
import queue
import shutil
import struct
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from daemon import sequence
from daemon.acquisition import CameraState
from daemon.channels import Channel, Closed
from daemon.health import Health
from daemon.messages import frame_message, map_bytes, rfc3339
from daemon.ring import FrameRing
from daemon.sequence import SequenceFile, StateError
from daemon.supervision import Failures, Worker, let_go_of_frames
from daemon.tally import STAGES, Tally, summarise
from drivers.frame import Frame, FrameStatus, PixelFormat
from pipeline.engines import frame_memory
from pipeline.inspection import Outcome, Reason

# Sequence numbers


def test_numbers_are_gapless_over_restarts(tmp_path):
    with SequenceFile(tmp_path) as numbers:
        assert [numbers.next() for _ in range(3)] == [1, 2, 3]
        numbers.mark_published(3)
    with SequenceFile(tmp_path) as numbers:
        assert list(numbers.without_verdict()) == []
        assert numbers.next() == 4


def test_numbers_survive_kill_9_and_those_without_a_verdict_are_known(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from daemon.sequence import SequenceFile\n"
        "s = SequenceFile(Path(sys.argv[1])); [s.next() for _ in range(7)]; s.mark_published(4)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    with SequenceFile(tmp_path) as numbers:
        assert list(numbers.without_verdict()) == [5, 6, 7]
        assert numbers.next() == 8


COUNT_AND_DIE = """
import os, signal, sys
from pathlib import Path
from daemon import sequence
folder, sequence._MEMORY, copied = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "copied"
numbers = sequence.SequenceFile(folder)
for _ in range(7):
    numbers.next()
numbers.mark_published(4)
with open(folder / "sequence", "rb") as file:
    while copied and sequence._read(file.fileno())[:2] != (7, 4):
        pass
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("memory", "copied", "memory_after"),
    [
        pytest.param("", "", "", id="no such filesystem"),
        pytest.param("memory", "", "memory", id="the daemon is started again"),
        pytest.param("memory", "copied", "after", id="the machine is started again"),
    ],
)
def test_numbers_are_found_again(tmp_path, monkeypatch, memory, copied, memory_after):
    for name in ("memory", "after"):
        (tmp_path / name).mkdir()
    folders = [tmp_path / "state", tmp_path / (memory or "none")]
    died = subprocess.run([sys.executable, "-c", COUNT_AND_DIE, *map(str, folders), copied], check=False)
    assert died.returncode == -9
    monkeypatch.setattr(sequence, "_MEMORY", tmp_path / (memory_after or "none"))
    with SequenceFile(tmp_path / "state") as numbers:
        assert list(numbers.without_verdict()) == [5, 6, 7]
        assert numbers.next() == 8
    left = list((tmp_path / memory_after).glob("inspectord-*")) if memory_after else []
    assert left == [], "nothing stays in memory after an orderly end"


def test_a_state_file_of_the_first_version_is_taken_over(tmp_path):
    (tmp_path / "sequence").write_bytes(b"INSPSEQ1" + struct.pack("<QQ", 12, 10))
    for given in (13, 14):
        with SequenceFile(tmp_path) as numbers:
            assert list(numbers.without_verdict()) == list(range(11, given))
            assert numbers.next() == given


def test_a_copied_state_folder_is_another_stations(tmp_path, monkeypatch):
    monkeypatch.setattr(sequence, "_MEMORY", tmp_path)
    died = subprocess.run([sys.executable, "-c", COUNT_AND_DIE, tmp_path / "a", tmp_path, ""], check=False)
    assert died.returncode == -9
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with SequenceFile(tmp_path / "b") as copied:
        copied.at_least(100)
        with SequenceFile(tmp_path / "a") as numbers:
            assert list(numbers.without_verdict()) == [5, 6, 7]
            assert numbers.next() == 8
        assert copied.next() == 101


def test_a_deleted_state_file_makes_no_number_of_another_life_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(sequence, "_MEMORY", tmp_path)
    folders = [tmp_path / "state", tmp_path]
    subprocess.run([sys.executable, "-c", COUNT_AND_DIE, *map(str, folders), "copied"], check=False)
    (tmp_path / "state" / "sequence").unlink()
    with SequenceFile(tmp_path / "state") as numbers:
        assert numbers.next() == 1


def test_numbers_do_without_memory_that_is_full(tmp_path, monkeypatch):
    write = os.pwrite

    def no_room(fd, data, offset):
        if tmp_path / "memory" in Path(f"/proc/self/fd/{fd}").readlink().parents:
            raise OSError(28, "No space left on device")
        return write(fd, data, offset)

    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(sequence, "_MEMORY", tmp_path / "memory")
    monkeypatch.setattr(os, "pwrite", no_room)
    for given in (1, 2):
        with SequenceFile(tmp_path / "state") as numbers:
            assert numbers.next() == given
            assert struct.unpack_from("<Q", (tmp_path / "state" / "sequence").read_bytes(), 8) == (given,)


def test_numbers_that_cannot_be_copied_are_told_of_once(tmp_path, monkeypatch):
    write, said, broken = os.pwrite, queue.SimpleQueue(), threading.Event()

    def failing(fd, data, offset):
        if broken.is_set():
            raise OSError(5, "Input/output error")
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with SequenceFile(tmp_path, said.put) as numbers:
        broken.set()
        numbers.next()
        assert "Input/output error" in said.get(timeout=60)
        numbers.next()
        broken.clear()
        assert said.get(timeout=60) is None
        assert numbers.next() == 3
    assert said.empty()


@pytest.fixture
def frozen(tmp_path):
    """A folder on a filesystem of its own, and what freezes it."""
    disk, folder = tmp_path / "disk", tmp_path / "mounted"
    folder.mkdir()
    with disk.open("wb") as file:
        file.truncate(32 << 20)
    for command in (["mkfs.ext4", "-q", "-F", disk], ["mount", "-o", "loop", disk, folder]):
        if shutil.which(command[0]) is None or subprocess.run(command, check=False).returncode != 0:
            pytest.skip(f"{command[0]} is not possible here: it needs root and a loop device")
    try:
        yield folder, lambda: subprocess.run(["fsfreeze", "-f", folder], check=True)
    finally:
        subprocess.run(["fsfreeze", "-u", folder], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_stands_still_delays_no_number(frozen):
    folder, freeze = frozen
    code = (
        "import sys; from pathlib import Path; from daemon.sequence import SequenceFile\n"
        "s = SequenceFile(Path(sys.argv[1])); print(s.next(), flush=True)\n"
        "for _ in sys.stdin: print(s.next(), flush=True); s.mark_published(s.grabbed)\n"
        "s.close()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as counting:
        lines = queue.SimpleQueue()
        threading.Thread(target=lambda: [lines.put(line) for line in counting.stdout], daemon=True).start()
        assert lines.get(timeout=60) == "1\n"
        freeze()
        try:
            for number in (2, 3, 4):
                counting.stdin.write("next\n")
                counting.stdin.flush()
                assert lines.get(timeout=60) == f"{number}\n"
        finally:
            subprocess.run(["fsfreeze", "-u", folder], check=True)
        counting.stdin.close()
        assert counting.wait(60) == 0


def test_the_journal_may_know_of_later_verdicts_than_the_file(tmp_path):
    with SequenceFile(tmp_path) as numbers:
        numbers.next()
        numbers.at_least(5)
        assert list(numbers.without_verdict()) == []
        assert numbers.next() == 6
        numbers.at_least(3)
        assert list(numbers.without_verdict()) == [6]


def test_one_station_has_one_daemon(tmp_path):
    with SequenceFile(tmp_path), pytest.raises(StateError, match="another inspectord runs this station"):
        SequenceFile(tmp_path)


@pytest.mark.parametrize("content", [b"x" * 24, b"short", b"INSPSEQ1" + b"\0" * 8 + b"\1" + b"\0" * 7])
def test_a_damaged_state_file_is_refused_not_reset(tmp_path, content):
    (tmp_path / "sequence").write_bytes(content)
    with pytest.raises(StateError, match="delete it to count on from the journal"):
        SequenceFile(tmp_path)


def test_an_unusable_state_folder_says_what_to_set(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="set state_dir"):
        SequenceFile(tmp_path / "file" / "below")


# Ring and channels


def test_slots_are_copied_into_reused_and_limited(rng):
    ring = FrameRing(2, frame_memory("cpu"))
    a, hung = ring.lease(0), ring.lease(0)
    assert ring.lease(0) is None
    image = rng.integers(0, 4096, (5, 7)).astype(np.uint16)
    stored = a.store(image)
    image[:] = 0
    assert stored.any()
    memory = a.memory
    ring.give_back(a)
    again = ring.lease(0)
    assert again.store(np.ones((3, 3), np.uint8)).base is not None
    assert again.memory is memory, "no new memory for a smaller frame"
    ring.give_back(again)
    ring.reserve(1000, 0)
    assert again.memory.nbytes == 1000
    ring.replace(hung)
    assert ring.free_slots == 2, "one for the slot that never comes back"
    np.testing.assert_array_equal(ring.lease(0).store(stored), stored)


class Lent(np.ndarray):
    """An image in the driver's memory."""


def lent(number):
    image = np.full((2, 3), number, np.uint8).view(Lent)
    return Frame(FrameStatus.COMPLETE, "cam", image=image), weakref.ref(image)


def test_lent_images_stay_where_they_are_and_are_let_go_of_by_the_thread_that_grabs():
    ring = FrameRing(4, None)
    ring.reserve(6, lends=2)
    slots = [ring.lease(0) for _ in range(3)]
    memory = []
    for number, slot in enumerate(slots):
        frame, driver_memory = lent(number)
        ring.keep(slot, frame)
        assert (frame.image is driver_memory()) == (number < 2), "no more are lent: copied"
        np.testing.assert_array_equal(frame.image, np.full((2, 3), number))
        frame.forget_image()
        assert (frame.image.shape, frame.image.dtype) == ((2, 3), np.uint8)
        memory.append(driver_memory)
    assert [one() is None for one in memory] == [False, False, True]
    ring.give_back(slots[0])
    assert memory[0]() is not None, "the engine's thread does not call the driver"
    ring.return_loans()
    assert [one() is None for one in memory] == [True, False, True]
    frame, driver_memory = lent(3)
    ring.keep(ring.lease(0), frame)
    assert frame.image is driver_memory(), "there is room for a loan again"


def test_what_a_hung_engine_holds_stays_while_it_holds_it():
    ring = FrameRing(2, None)
    ring.reserve(6, lends=1)
    slot = ring.lease(0)
    frame, driver_memory = lent(5)
    ring.keep(slot, frame)
    held = frame.image
    frame.forget_image()
    ring.replace(slot)
    ring.return_loans()
    assert ring.free_slots == 2
    assert driver_memory() is held
    ring.keep(ring.lease(0), lent(6)[0])
    np.testing.assert_array_equal(held, np.full((2, 3), 5))
    del held
    assert driver_memory() is None


def test_a_driver_that_does_not_answer_gets_nothing_back():
    ring = FrameRing(2, None)
    ring.reserve(6, lends=2)
    slots, memory = [ring.lease(0) for _ in range(2)], []
    for number, slot in enumerate(slots):
        frame, driver_memory = lent(number)
        ring.keep(slot, frame)
        memory.append(driver_memory)
    del frame
    ring.give_back(slots[0])
    let_go = threading.Event()
    grabber = Worker("acquisition", lambda: let_go.wait(60), lambda: None)
    grabber.start()
    grabber.holds += ring.abandon_loans()
    ring.give_back(slots[1])
    ring.return_loans()
    assert all(one() is not None for one in memory)
    let_go.set()  # it answers after all
    grabber.join(60)
    assert all(one() is None for one in memory)
    frame, driver_memory = lent(2)
    ring.keep(ring.lease(0), frame)
    assert frame.image is driver_memory(), "the next camera lends as many"


def test_memory_that_an_engine_wants_frames_in_is_copied_into():
    allocated = []
    ring = FrameRing(1, lambda size: allocated.append(size) or np.empty(size, np.uint8))
    ring.reserve(6, lends=5)
    frame, driver_memory = lent(7)
    ring.keep(ring.lease(0), frame)
    assert allocated == [6]
    assert driver_memory() is None
    np.testing.assert_array_equal(frame.image, np.full((2, 3), 7))


def test_a_full_channel_makes_its_writer_wait():
    channel = Channel(1)
    channel.put(1)
    writer = threading.Thread(target=channel.put, args=(2,))
    writer.start()
    assert channel.get() == 1
    writer.join(60)
    assert channel.get() == 2


def test_a_closed_channel_gives_back_what_nobody_took_and_refuses_the_rest():
    channel = Channel(2)
    channel.put(1)
    channel.put(2)
    refused = []

    def put():
        try:
            channel.put(3)  # waits: the channel is full
        except Closed:
            refused.append(3)

    writer = threading.Thread(target=put)
    writer.start()
    assert channel.close() == [1, 2]
    writer.join(60)
    assert refused == [3]
    for use in (lambda: channel.put(4), channel.get):
        with pytest.raises(Closed):
            use()
    assert channel.close() == []


def test_a_workers_failure_is_kept_and_wakes_the_supervisor():
    attention = threading.Event()

    def fail():
        raise RuntimeError("broken")

    worker = Worker("w", fail, attention.set)
    worker.start()
    assert attention.wait(60)
    worker.join()
    assert str(worker.failure) == "broken"


def test_a_failure_that_was_said_keeps_nothing_of_its_thread(no_collection):
    class Engine:
        """Large, on a device."""

    def work():
        engine = Engine()
        engines.append(weakref.ref(engine))
        try:
            raise ValueError("the device is lost")
        except ValueError as error:
            raise RuntimeError("three in a row") from error

    engines = []
    worker = Worker("engine", work, lambda: None)
    worker.start()
    worker.join(60)
    failure = worker.failure
    assert engines[0]() is not None
    let_go_of_frames(failure)
    assert engines[0]() is None
    assert str(failure.__cause__) == "the device is lost"


def test_an_abandoned_generation_ends_without_a_failure():
    def ended():
        raise Closed

    worker = Worker("w", ended, lambda: None)
    worker.start()
    worker.join(60)
    assert worker.failure is None


def test_pauses_double_from_50_ms_to_5_s_and_too_many_failures_end_it():
    failures = Failures()
    pauses = [failures.happened() for _ in range(8)]
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0]
    assert failures.too_many
    few = Failures()
    few.happened()
    assert not few.too_many


# Counts and messages


def test_seen_is_ok_plus_ng_plus_invalid_plus_in_flight():
    tally = Tally()
    for _ in range(5):
        tally.saw()
    tally.published(1, Outcome.OK, None, (1000, 2000, 3000, 4000, 10000))
    tally.published(2, Outcome.NG, None, (3000, 2000, 3000, 4000, 12000))
    tally.published(3, Outcome.INVALID, Reason.LOST, None)
    totals = tally.totals()
    assert (totals.ok, totals.ng, totals.invalid, totals.in_flight, totals.last_sequence) == (1, 1, 1, 2, 3)
    summary = summarise(tally, 2.0)
    assert summary.percentiles_ms["grab"] == pytest.approx((2, 2.9, 2.98, 3))
    assert set(summary.percentiles_ms) == set(STAGES)
    tally.committed(1500)
    assert summarise(tally, 2.0).percentiles_ms["journal"] == pytest.approx((1.5, 1.5, 1.5, 1.5))
    assert "5 frames: 1 OK, 1 NG, 1 INVALID (1 lost)" in str(summary)


def test_latency_memory_does_not_grow():
    tally = Tally()
    memory = tally._latency_us
    for number in range(70_000):
        tally.published(number, Outcome.OK, None, (1, 2, 3, 4, 5))
    assert tally._latency_us is memory
    assert len(tally.latencies_us()) == 65536


def test_times_are_rfc_3339_in_utc_with_microseconds():
    assert rfc3339(1_700_000_000_123_456_789) == "2023-11-14T22:13:20.123456Z"


def test_device_counters_travel_as_strings_because_they_may_exceed_2_to_the_53():
    frame = Frame(FrameStatus.LOST, "s", device_id=2**64 - 2, device_timestamp_ns=2**60)
    message = frame_message(frame)
    assert message.device_id == str(2**64 - 2)
    assert int(message.device_timestamp_ns) > 2**53
    assert (message.width, message.height, message.pixel_format) == (None, None, None)
    image = np.zeros((4, 6), np.uint8)
    message = frame_message(Frame(FrameStatus.COMPLETE, "s", image=image, pixel_format=PixelFormat.MONO8))
    assert (message.width, message.height, message.pixel_format) == (6, 4, "Mono8")


def test_maps_are_little_endian_float32_row_by_row(rng):
    values = rng.random((3, 4)).astype(">f8")
    read = np.frombuffer(map_bytes(values.T), "<f4").reshape(4, 3)
    np.testing.assert_allclose(read, values.T, rtol=1e-6)


def test_log_lines_are_json_where_there_is_no_terminal():
    code = (
        "import structlog; from daemon.log import configure_logging; configure_logging()\n"
        "structlog.get_logger().bind(station='s').info('hello', sequence=3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line = json.loads(done.stderr)
    assert (line["station"], line["sequence"], line["event"], line["level"]) == ("s", 3, "hello", "info")


def test_a_log_that_nobody_reads_stops_nobody_and_says_what_was_dropped():
    code = (
        "import sys, threading, structlog; from daemon.log import configure_logging; configure_logging()\n"
        "log = structlog.get_logger()\n"
        "for number in range(5000): log.info('x' * 200, number=number)\n"  # far more than a pipe takes
        "print('through', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "through\n"
        said = process.stderr.read().splitlines()
        assert process.wait(60) == 0
    numbers = [json.loads(line)["number"] for line in said if line.startswith("{")]
    assert numbers[0] == 0
    dropped = [int(line.split()[0]) for line in said if "entries of the log were dropped" in line]
    assert len(said) == len(numbers) + len(dropped), "each on a line of its own"
    assert sum(dropped) == 5000 - len(numbers) > 0


def test_a_daemon_whose_log_nobody_reads_can_end_with_an_error():
    code = (
        "import structlog; from daemon.log import configure_logging; configure_logging()\n"
        "from daemon.cli_errors import clear_errors, leaving_at_the_end\n"
        "from daemon.client import RequestFailed\n"
        "for number in range(1000): structlog.get_logger().info('x' * 200)\n"
        "with leaving_at_the_end(), clear_errors(): raise RequestFailed('the last words')\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as process:
        assert process.wait(60) == 1, "with its standard error full"
    done = subprocess.run(
        [sys.executable, "-c", code.replace("1000", "3")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "inspectord: the last words" in done.stderr.splitlines()


def test_a_sign_that_the_terminal_does_not_know_ends_no_command():
    code = "from daemon import cli; cli.app = lambda **_: print('0.5 –'); cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b"0.5 \\u2013\n")


def test_a_slow_line_does_not_seem_to_stand_still_between_two_parts(monkeypatch):
    now_s = 1000.0
    monkeypatch.setattr("daemon.health.time.monotonic", lambda: now_s)
    line = SimpleNamespace(state=CameraState(connected=True), paused=threading.Event())
    config = SimpleNamespace(station="s", supervision=SimpleNamespace(min_rate_fps=0.1))
    health = Health(config, "b", Tally(), line, SimpleNamespace(last_outcome=None), None, None, None)

    def rate_ok(at_s, seen):
        nonlocal now_s
        now_s = 1000.0 + at_s
        return health._camera(SimpleNamespace(seen=seen)).rate_ok

    a_part_in_8_s = [rate_ok(second, second // 8) for second in range(1, 200)]
    assert set(a_part_in_8_s[20:]) == {True}
    assert rate_ok(239, 25) is False, "nothing came for 40 s"
