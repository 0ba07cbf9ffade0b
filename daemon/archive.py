"""What is kept of judged frames beside their verdicts: images of rejects, captures, snapshots.

The engine's thread copies an image that is wanted; another thread writes it, under a quota.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from daemon.events import EventKind, Events
from daemon.images import ImageFormat, Picture, encode_image, write_picture
from daemon.ledger import Entry, Ledger
from drivers.frame import Image, PixelFormat
from drivers.paths import names_in
from pipeline.bundle import write_atomically
from pipeline.inspection import Inspection, Outcome
from pipeline.overlay import overlay_of

_WAITING_BYTES = 256 << 20
"""Copies that may wait for a slow disk; beyond that images are dropped, which is counted."""
_VERDICT_WITHIN_S = 10.0
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
_OURS = re.compile(r"\d{12}-(OK|NG|INVALID)\.(png|jpg|npy|json)")

_OWNER = ".station"
_TRIES = 32
"""Old images that are tried in turn where the disk does not let one go."""


class Taken(NamedTuple):
    """A snapshot."""

    png: bytes
    """The file's content; its samples are the camera's, a Bayer pattern included."""
    sequence: int
    pixel_format: PixelFormat


@dataclass(frozen=True, slots=True)
class Keep:
    """Which images are kept, and how much room they may take."""

    folder: Path
    outcomes: frozenset[Outcome]
    every_ok: int
    """Keep each n-th OK part too; 0: none."""
    image_format: ImageFormat
    quota_bytes: int
    reserve_bytes: int
    """Free space on the disk that is left to others."""


class NoMap(Exception):
    """The part of a snapshot was not judged, so there is nothing to lay over it."""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    overlay: bool
    taken: Future[Taken] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class _Copied:
    entry: Entry
    inspection: Inspection | None
    image: Image
    capture: _Capture | None
    kept: bool
    snapshots: list[_Snapshot]


@dataclass(slots=True)
class _Capture:
    folder: Path
    wanted: int
    begun: int = 0
    """Frames on their way to the disk, those that are there included."""
    taken: int = 0


class Archive:
    """Keeps images; inspection never waits for it."""

    def __init__(self, station: str, keep: Keep | None, captures: Path, ledger: Ledger, events: Events) -> None:
        """Prepare.

        Args:
            station: whose images they are.
            keep: which images are kept by themselves; None: none.
            captures: folder in which captures get theirs.
            ledger: knows when a verdict was published.
            events: told when images cannot be kept.
        """
        self._station = station
        self._keep = keep
        self._taken_over = self._marked = False
        """The folder is this station's and what it keeps is known; two would delete each other's images."""
        self._captures = captures
        self._ledger = ledger
        self._events = events
        self._changed = threading.Condition()
        self._waiting: deque[_Copied] = deque()
        self._waiting_bytes = 0
        self._capture: _Capture | None = None
        self._snapshots: list[_Snapshot] = []
        self._ok_seen = 0
        self._kept: deque[tuple[list[Path], int]] = deque()
        self._closing = False
        self.kept = 0
        self.dropped = 0
        self.bytes = 0
        self.error: str | None = None

    @property
    def folder(self) -> Path | None:
        """Where images are kept by themselves; None: nowhere."""
        return None if self._keep is None else self._keep.folder

    def close(self) -> None:
        """Let `write` end once what waits is written."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def refuse_snapshots(self) -> None:
        """Tell who still waits for a frame that none will come."""
        with self._changed:
            for snapshot in self._snapshots:
                snapshot.taken.cancel()

    def look(self, entry: Entry, image: Image, inspection: Inspection | None) -> None:
        """Copy an image if anyone wants it; called by the engine's thread for every frame."""
        # What counts is the verdict: a good result that came too late belongs to a part that was rejected.
        outcome = Outcome.INVALID if entry.inspection is None else entry.inspection.outcome
        with self._changed:
            capture = self._capture if outcome is Outcome.OK else None
            if capture is not None and capture.begun >= capture.wanted:
                capture = None
            kept = self._is_kept(outcome)
            snapshots = self._snapshots
            if capture is None and not kept and not snapshots:
                return
            if self._waiting and self._waiting_bytes + image.nbytes > _WAITING_BYTES:
                self._failed("the disk is too slow for the images")
                return
            try:
                copy = image.copy()
            except MemoryError:
                self._failed("no memory for a copy of the image")
                return
            self._snapshots = []
            if capture is not None:
                capture.begun += 1
            self._waiting.append(_Copied(entry, inspection, copy, capture, kept, snapshots))
            self._waiting_bytes += image.nbytes
            self._changed.notify()

    def snapshot(self, *, overlay: bool = False) -> Future[Taken]:
        """Ask for the next judged frame, as it is or in colour with its anomaly map laid over it."""
        wanted = _Snapshot(overlay)
        with self._changed:
            self._snapshots = [s for s in self._snapshots if not s.taken.cancelled()]
            self._snapshots.append(wanted)
        return wanted.taken

    def capture(self, count: int, name: str) -> Path:
        """Keep the next good frames in a folder of their own; a capture that was under way ends.

        Raises FileExistsError or OSError.
        """
        folder = self._captures / name
        folder.mkdir(parents=True)
        with self._changed:
            self._capture = _Capture(folder, count)
        return folder

    @property
    def capture_progress(self) -> dict[str, object] | None:
        """Folder, wanted and taken of the last capture."""
        capture = self._capture
        if capture is None:
            return None
        return {"folder": str(capture.folder), "wanted": capture.wanted, "taken": capture.taken}

    def _is_kept(self, outcome: Outcome) -> bool:
        keep = self._keep
        if keep is None:
            return False
        if outcome is Outcome.OK and keep.every_ok:
            self._ok_seen += 1
            return self._ok_seen % keep.every_ok == 0
        return outcome in keep.outcomes

    def write(self) -> None:
        """Write what is wanted until `close`; the work of one thread."""
        if self._keep is not None and not self._taken_over:
            try:
                self._take_over(self._keep.folder)
            except OSError as error:  # tried again with each image
                self._tell(str(error))
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                copied = self._waiting.popleft()
                self._waiting_bytes -= copied.image.nbytes
            try:
                self._write(copied)
            except Exception as error:  # noqa: BLE001 - OpenCV, memory, disk: the picture is lost, and that is said
                self._failed(f"{type(error).__name__}: {error}")

    def _write(self, copied: _Copied) -> None:
        entry, keep = copied.entry, self._keep
        fmt = entry.frame.pixel_format
        if fmt is None:
            raise AssertionError("a judged frame has a pixel format")
        for snapshot in copied.snapshots:
            if snapshot.taken.set_running_or_notify_cancel():
                try:
                    snapshot.taken.set_result(_take(copied, fmt, overlay=snapshot.overlay))
                except Exception as error:  # noqa: BLE001 - becomes the reply
                    snapshot.taken.set_exception(error)
        if copied.capture is not None:
            self._write_captured(copied.capture, entry, Picture(copied.image, fmt, None, None))
        if not copied.kept or keep is None:
            return
        self._ledger.wait_sent(entry, _VERDICT_WITHIN_S)
        verdict = None if entry.body is None else json.loads(entry.body)
        outcome = Outcome.INVALID.value if verdict is None else verdict["verdict"]
        day = datetime.fromtimestamp(entry.frame.wall_ns / 1e9, UTC).strftime("%Y-%m-%d")
        if not self._taken_over:
            self._take_over(keep.folder)
        elif not self._marked:  # another station may have come first
            self._check_owner(keep.folder)
        self._make_room(keep, copied.image.nbytes)
        if not self._marked:  # not before there is room, which only deleting may make
            self._mark(keep.folder)
        anomaly_map = None if copied.inspection is None else copied.inspection.anomaly_map
        files, size = write_picture(
            keep.folder / day / f"{entry.sequence:012d}-{outcome}",
            Picture(copied.image, fmt, anomaly_map, verdict),
            keep.image_format,
        )
        self._kept.append((files, size))
        self.bytes += size
        self.kept += 1
        self._make_room(keep, 0)
        if self.error is not None:
            self.error = None
            self._events.say(EventKind.IMAGES, "images are kept again", level="info", dropped=self.dropped)

    def _write_captured(self, capture: _Capture, entry: Entry, picture: Picture) -> None:
        try:
            self._check_reserve(capture.folder, picture.image.nbytes)
            write_picture(capture.folder / f"{entry.sequence:012d}", picture, "png")
        except BaseException:
            with self._changed:
                capture.begun -= 1  # the next good frame takes its place
            raise
        capture.taken += 1

    def _take_over(self, folder: Path) -> None:
        """Look what a folder keeps. Raises OSError where it is another station's, or cannot be read."""
        owner = self._check_owner(folder)
        groups: dict[Path, list[Path]] = {}
        for day in filter(_DAY.fullmatch, names_in(folder)):  # whatever else lies there is not ours
            for path in (folder / day / name for name in names_in(folder / day) if _OURS.fullmatch(name)):
                groups.setdefault(path.with_suffix(""), []).append(path)
        found = [(paths, sum(path.stat().st_size for path in paths)) for paths in groups.values()]
        self._kept.extend(found)
        self.bytes += sum(size for _, size in found)
        self._taken_over, self._marked = True, owner == self._station

    def _check_owner(self, folder: Path) -> str:
        """Return whose folder it is, "" for nobody's. Raises OSError where it is another station's."""
        try:
            owner = (folder / _OWNER).read_text(errors="replace").strip()
        except FileNotFoundError:
            return ""
        if owner not in ("", self._station):
            raise OSError(f"{folder} keeps the images of station {owner}: give this one an images.path of its own")
        return owner

    def _mark(self, folder: Path) -> None:
        """Make a folder this station's. Raises OSError, also where another one was faster."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with (folder / _OWNER).open("x") as mark:
                mark.write(self._station)
        except FileExistsError:
            if not self._check_owner(folder):  # a full disk or a power cut left it empty
                write_atomically(folder / _OWNER, self._station.encode())
        self._marked = True

    def _make_room(self, keep: Keep, bytes_needed: int) -> None:
        """Delete the oldest images until quota and reserve hold. Raises OSError when that is not enough."""
        while self._kept and (
            self.bytes + bytes_needed > keep.quota_bytes
            or _free_bytes(keep.folder) < keep.reserve_bytes + bytes_needed
        ):
            self._delete_oldest()
        self._check_reserve(keep.folder, bytes_needed)

    def _delete_oldest(self) -> None:
        """Delete the oldest image that the disk lets go of. Raises OSError when it is none of the oldest."""
        refused: OSError | None = None
        for _ in range(min(len(self._kept), _TRIES)):
            paths, size = self._kept[0]
            try:
                for path in paths:
                    path.unlink(missing_ok=True)
            except OSError as error:
                refused = error
                self._kept.rotate(-1)  # it stays counted, and has its turn again
                continue
            self._kept.popleft()
            self.bytes -= size
            with contextlib.suppress(OSError):  # other images are still in it, or somebody has tidied up
                paths[0].parent.rmdir()
            return
        if refused is not None:
            raise OSError(f"old images cannot be deleted: {refused.strerror}") from refused

    def _check_reserve(self, folder: Path, bytes_needed: int) -> None:
        """Raise OSError when the disk has less room than what is left to others."""
        reserve_bytes = 0 if self._keep is None else self._keep.reserve_bytes
        if _free_bytes(folder) - reserve_bytes < bytes_needed:
            raise OSError(f"{folder}: less than {reserve_bytes >> 20} MiB free on the disk")

    def _failed(self, error: str) -> None:
        self.dropped += 1
        self._tell(error)

    def _tell(self, error: str) -> None:
        if self.error != error:
            self.error = error
            self._events.say(EventKind.IMAGES, "images cannot be kept; inspection goes on", error=error)


def _take(copied: _Copied, fmt: PixelFormat, *, overlay: bool) -> Taken:
    entry, image, inspection = copied.entry, copied.image, copied.inspection
    if overlay:
        if inspection is None or inspection.anomaly_map is None:
            raise NoMap(f"part {entry.sequence} is INVALID and has no anomaly map; ask again")
        judged_by = entry.judged_by
        image = overlay_of(image, fmt, inspection.anomaly_map, judged_by.geometry, judged_by.threshold)
        fmt = PixelFormat.BGR8
    png, stored = encode_image(image, fmt, "png")
    return Taken(png, entry.sequence, stored)


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
