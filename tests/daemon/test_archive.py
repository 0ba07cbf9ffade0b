from __future__ import annotations

import errno
import json
import resource
import threading
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import structlog

from daemon.archive import Archive, Keep, NoMap
from daemon.events import Events, Outbox
from daemon.images import Picture, encode_image, read_picture, write_picture
from daemon.ledger import Ledger, Ticket
from daemon.sequence import SequenceFile
from daemon.tally import Tally
from drivers.frame import Frame, FrameStatus, PixelFormat
from pipeline.inspection import Inspection, Outcome, Reason
from tests.daemon.test_journal import wait_for

NG = Inspection(Outcome.NG, score=3.0, anomaly_map=np.arange(6, dtype=np.float32).reshape(2, 3))
OK = Inspection(Outcome.OK, score=0.1, anomaly_map=np.zeros((2, 3), np.float32))


def picture_of(fmt, rng, size=(12, 16)):
    shape = size + ((3,) if fmt.channels == 3 else ())
    return rng.integers(0, fmt.max_value + 1, shape).astype(fmt.dtype)


@pytest.mark.parametrize("fmt", list(PixelFormat))
def test_png_brings_every_sample_of_every_format_back(fmt, rng, tmp_path):
    image = picture_of(fmt, rng)
    verdict = {"verdict": "NG", "source": "cam"}
    files, size = write_picture(tmp_path / "000001-NG", Picture(image, fmt, NG.anomaly_map, verdict), "png")
    assert size == sum(path.stat().st_size for path in files)
    frame, told = read_picture(tmp_path / "000001-NG.json")
    np.testing.assert_array_equal(frame.image, image)
    assert (frame.pixel_format, frame.source, told) == (fmt, "cam", verdict)
    np.testing.assert_array_equal(np.load(tmp_path / "000001-NG.npy"), NG.anomaly_map)


@pytest.mark.parametrize(
    ("fmt", "stored"),
    [("Mono8", "Mono8"), ("Mono12", "Mono8"), ("BayerRG8", "BGR8"), ("BayerGB12", "BGR8"), ("RGB8", "RGB8")],
)
def test_jpeg_keeps_the_colours(fmt, stored):
    fmt = PixelFormat(fmt)
    rgb = np.array([200, 120, 40])
    image = np.full((64, 64, 3), rgb, np.uint8)
    if fmt.bayer:
        from drivers.bayer import mosaic

        image = mosaic(image.astype(fmt.dtype) << (fmt.bits - 8), fmt.bayer)
    elif fmt.channels == 1:
        image = np.full((64, 64), 100 << (fmt.bits - 8), fmt.dtype)
    encoded, now = encode_image(image, fmt, "jpeg")
    assert now == stored
    decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
    wanted = [100] if fmt.channels == 1 and not fmt.bayer else rgb[::-1]
    np.testing.assert_allclose(np.atleast_1d(decoded[32, 32]), wanted, atol=4)


@pytest.fixture
def setup(tmp_path):
    with SequenceFile(tmp_path / "state") as numbers:
        ledger = Ledger(numbers, Tally(), lambda: None)
        events = Events("s", "b", Outbox(), structlog.ReturnLogger())
        started = []

        def make(station="line1", **keep):
            default = {
                "folder": tmp_path / "images",
                "outcomes": frozenset({Outcome.NG, Outcome.INVALID}),
                "every_ok": 0,
                "image_format": "png",
                "quota_bytes": 1 << 30,
                "reserve_bytes": 0,
            }
            archive = Archive(station, Keep(**{**default, **keep}), tmp_path / "captures", ledger, events)
            thread = threading.Thread(target=archive.write)
            thread.start()
            started.append((archive, thread))
            return archive

        def judge(archive, inspection, image=None, late=False):
            """One frame through ledger and archive, published as the publisher would."""
            image = np.zeros((8, 8), np.uint8) if image is None else image
            frame = Frame(FrameStatus.COMPLETE, "cam", image=image, pixel_format=PixelFormat.MONO8)
            entry = ledger.open(Ticket(), frame)
            if late:
                ledger.settle(entry, Inspection(Outcome.INVALID, Reason.DEADLINE, "no result in time"))
            if inspection is not None:
                ledger.settle(entry, inspection)
            archive.look(entry, image, inspection)
            ledger.give_up(Reason.DEADLINE, "late")
            (taken,) = ledger.take(0, 1)
            taken.body = json.dumps(
                {"verdict": taken.inspection.outcome.value, "sequence": entry.sequence}
            ).encode()
            taken.sent = True
            ledger.done(taken, None)
            return entry

        yield make, judge, tmp_path
        for archive, thread in started:
            archive.close()
            thread.join(60)
            assert not thread.is_alive()


def kept(folder):
    return sorted(path.stem for path in folder.rglob("*.json"))


def files_of(folder):
    """All but the mark of whose folder it is."""
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".station"]


def test_rejects_are_kept_with_map_and_verdict_and_good_parts_are_not(setup):
    make, judge, folder = setup
    archive = make()
    for inspection in (OK, NG, None, Inspection(Outcome.INVALID, Reason.IMAGE, "black")):
        judge(archive, inspection)
    wait_for(lambda: archive.kept == 3)
    assert kept(folder / "images") == ["000000000002-NG", "000000000003-INVALID", "000000000004-INVALID"]
    described = json.loads(next((folder / "images").rglob("*-NG.json")).read_text())
    assert described["verdict"] == {"verdict": "NG", "sequence": 2}
    assert described["map"] == "000000000002-NG.npy"


def test_a_good_result_that_came_too_late_belongs_to_a_reject_and_is_kept(setup):
    make, judge, folder = setup
    archive = make()
    judge(archive, OK, late=True)
    wait_for(lambda: archive.kept == 1)
    assert kept(folder / "images") == ["000000000001-INVALID"]
    assert next((folder / "images").rglob("*.npy")).is_file()


class NoRoom(np.ndarray):
    def copy(self, *_args):
        raise MemoryError


def test_an_image_that_finds_no_memory_is_counted_and_leaves_captures_and_snapshots_waiting(setup):
    make, judge, _ = setup
    archive = make()
    captured = archive.capture(1, "lamp")
    snapshot = archive.snapshot()
    judge(archive, OK, np.zeros((8, 8), np.uint8).view(NoRoom))
    assert (archive.dropped, archive.error) == (1, "no memory for a copy of the image")
    judge(archive, OK)
    assert snapshot.result(60) is not None
    wait_for(lambda: archive.capture_progress["taken"] == 1)
    assert len(list(captured.iterdir())) > 0


def test_two_stations_do_not_share_a_folder_of_images(setup):
    make, judge, folder = setup
    (folder / "images").mkdir()
    (folder / "images/.station").write_text("line2")
    archive = make()
    wait_for(lambda: archive.error is not None)
    assert "keeps the images of station line2" in archive.error
    assert archive.dropped == 0
    judge(archive, NG)
    wait_for(lambda: archive.dropped == 1)
    assert not kept(folder / "images")
    (folder / "images/.station").unlink()
    judge(archive, NG)
    wait_for(lambda: archive.kept == 1 and archive.error is None)
    assert (folder / "images/.station").read_text() == "line1"


def with_three_rejects(make, judge):
    archive = make()
    for _ in range(3):
        judge(archive, NG)
    wait_for(lambda: archive.kept == 3)
    return archive


def test_of_two_stations_that_begin_a_folder_one_keeps_it(setup):
    make, judge, folder = setup
    ours, theirs = make(), make("line2")
    for archive in (ours, theirs):
        wait_for(lambda archive=archive: archive._taken_over)
    judge(ours, NG)
    wait_for(lambda: ours.kept == 1)
    judge(theirs, NG)
    wait_for(lambda: theirs.dropped == 1)
    assert "keeps the images of station line1" in theirs.error
    assert (folder / "images/.station").read_text() == "line1"
    assert len(kept(folder / "images")) == 1


def test_a_mark_that_a_power_cut_left_empty_is_nobodys(setup):
    make, judge, folder = setup
    (folder / "images").mkdir()
    (folder / "images/.station").touch()
    archive = make()
    judge(archive, NG)
    wait_for(lambda: archive.kept == 1)
    assert (folder / "images/.station").read_text() == "line1"


def test_a_full_disk_is_made_room_on_before_its_folder_is_marked(setup, monkeypatch):
    make, judge, folder = setup
    first = with_three_rejects(make, judge)
    mark = folder / "images/.station"
    mark.unlink()
    really_mark = Archive._mark

    def full(self, folder):
        if len(kept(folder)) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        really_mark(self, folder)

    monkeypatch.setattr(Archive, "_mark", full)
    second = make(quota_bytes=first.bytes)
    judge(second, NG)
    wait_for(lambda: second.kept == 1)
    assert second.dropped == 0
    assert mark.read_text() == "line1"


def test_images_on_a_disk_that_is_ill_at_the_start_are_counted_when_it_is_well(setup, monkeypatch):
    make, judge, folder = setup
    with_three_rejects(make, judge)

    def refuse(path):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        second = make()
        wait_for(lambda: second.error is not None)
    assert second.dropped == 0
    judge(second, NG)
    wait_for(lambda: second.kept == 1 and second.error is None)
    assert second.bytes == sum(path.stat().st_size for path in files_of(folder / "images"))


def test_a_folder_of_somebody_else_on_the_same_disk_is_left_alone(setup, monkeypatch):
    make, judge, folder = setup
    with_three_rejects(make, judge)
    (folder / "images" / "lost+found").mkdir()
    look = Path.iterdir

    def for_root_only(path):
        if Path(path).name == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(Path, "iterdir", for_root_only)
    second = make()
    judge(second, NG)
    wait_for(lambda: second.kept == 1)
    assert second.error is None
    assert second.bytes == sum(path.stat().st_size for path in files_of(folder / "images"))


def test_every_nth_good_part_is_kept_where_wanted(setup):
    make, judge, folder = setup
    archive = make(every_ok=3)
    for _ in range(9):
        judge(archive, OK)
    wait_for(lambda: archive.kept == 3)
    assert kept(folder / "images") == [f"{n:012d}-OK" for n in (3, 6, 9)]


def test_the_oldest_make_room_under_the_quota_also_those_of_an_earlier_run(setup, rng):
    make, judge, folder = setup
    noise = rng.integers(0, 256, (100, 100), np.uint8)
    first = make()
    for _ in range(6):
        judge(first, NG, noise)
    wait_for(lambda: first.kept == 6)
    each = first.bytes // 6
    second = make(quota_bytes=4 * each + each // 2)
    for _ in range(2):
        judge(second, NG, noise)
    wait_for(lambda: second.kept == 2)
    wait_for(lambda: len(kept(folder / "images")) == 4)
    assert kept(folder / "images") == [f"{n:012d}-NG" for n in (5, 6, 7, 8)]
    files = files_of(folder / "images")
    assert len(files) == 12, "image, map and description go together"
    assert second.bytes == sum(path.stat().st_size for path in files)


def test_images_that_could_not_be_deleted_for_a_while_still_make_room_afterwards(setup, rng, monkeypatch):
    make, judge, folder = setup
    noise = rng.integers(0, 256, (100, 100), np.uint8)
    archive = make()
    for _ in range(3):
        judge(archive, NG, noise)
    wait_for(lambda: archive.kept == 3)
    archive._keep = replace(archive._keep, quota_bytes=archive.bytes + archive.bytes // 6)
    unlink = Path.unlink
    with monkeypatch.context() as patch:

        def refuse(path, missing_ok=False):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))

        patch.setattr(Path, "unlink", refuse)
        for _ in range(5):
            judge(archive, NG, noise)
        wait_for(lambda: archive.dropped == 5)
    assert Path.unlink is unlink
    events = [message.data for _, message in archive._events._outbox.take()]
    assert len([data for data in events if "Stale" in data.get("error", "")]) == 1, "said once"
    judge(archive, NG, noise)
    wait_for(lambda: archive.error is None and len(kept(folder / "images")) == 3)
    assert kept(folder / "images")[-1] == "000000000009-NG"
    assert archive.bytes == sum(path.stat().st_size for path in files_of(folder / "images"))


def test_a_disk_below_its_reserve_keeps_nothing_new_and_says_so(setup):
    make, judge, folder = setup
    archive = make(reserve_bytes=1 << 60)
    judge(archive, NG)
    wait_for(lambda: archive.dropped == 1 and archive.error is not None)
    assert "free on the disk" in archive.error
    assert kept(folder / "images") == []


def test_a_full_disk_drops_the_image_leaves_nothing_half_written_and_recovers(setup, rng):
    make, judge, folder = setup
    archive = make()
    noise = rng.integers(0, 256, (100, 100), np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # a write beyond it fails with EFBIG
    try:
        judge(archive, NG, noise)
        wait_for(lambda: archive.dropped == 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not files_of(folder / "images")
    judge(archive, NG, noise)
    wait_for(lambda: archive.kept == 1 and archive.error is None)


def test_a_snapshot_is_the_next_judged_frame(setup, rng):
    make, judge, _ = setup
    archive = make()
    future = archive.snapshot()
    image = rng.integers(0, 256, (10, 12), np.uint8)
    entry = judge(archive, OK, image)
    png, sequence, _ = future.result(60)
    assert sequence == entry.sequence
    np.testing.assert_array_equal(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED), image)


def test_a_snapshot_with_its_map_needs_a_part_that_was_judged(setup, rng):
    make, judge, _ = setup
    archive = make()
    future = archive.snapshot(overlay=True)
    judge(archive, None)
    with pytest.raises(NoMap, match="part 1 is INVALID and has no anomaly map"):
        future.result(60)


def test_snapshots_that_nobody_waits_for_any_more_are_forgotten(setup):
    make, judge, _ = setup
    archive = make()
    for _ in range(1000):
        archive.snapshot().cancel()
    future = archive.snapshot()
    assert len(archive._snapshots) <= 2
    judge(archive, OK)
    assert future.result(60)[1] == 1


def test_an_image_that_a_power_cut_left_empty_is_said_to_be_none(rng, tmp_path):
    image = picture_of(PixelFormat.MONO8, rng)
    write_picture(tmp_path / "1-NG", Picture(image, PixelFormat.MONO8, None, None), "png")
    (tmp_path / "1-NG.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1-NG\.png is not a whole image in Mono8"):
        read_picture(tmp_path / "1-NG.json")


def test_a_capture_takes_the_next_good_frames_only(setup):
    make, judge, folder = setup
    archive = make()
    target = archive.capture(2, "lamp2")
    assert target == folder / "captures" / "lamp2"
    for inspection in (NG, OK, OK, OK):
        judge(archive, inspection)
    wait_for(lambda: len(kept(target)) == 2)
    assert archive.capture_progress == {"folder": str(target), "wanted": 2, "taken": 2}
    assert kept(target) == ["000000000002", "000000000003"]
    with pytest.raises(FileExistsError):
        archive.capture(2, "lamp2")


def test_a_capture_counts_what_was_written(setup, monkeypatch):
    make, judge, _ = setup
    archive, free = make(), [0, 0, 1 << 40]
    monkeypatch.setattr("daemon.archive._free_bytes", lambda _folder: free[0] if len(free) == 1 else free.pop(0))
    target = archive.capture(2, "lamp3")
    for dropped in (1, 2):
        judge(archive, OK)
        wait_for(lambda dropped=dropped: archive.dropped == dropped)
    assert archive.capture_progress["taken"] == 0
    for taken in (1, 2):
        judge(archive, OK)
        wait_for(lambda taken=taken: archive.capture_progress["taken"] == taken)
    assert kept(target) == ["000000000003", "000000000004"]
