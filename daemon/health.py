"""The health message: what is known of the station once a second."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict

import numpy as np

from daemon.acquisition import Line
from daemon.archive import Archive
from daemon.config import StationConfig
from daemon.events import Events
from daemon.journal import Journal
from daemon.ledger import JudgedBy
from daemon.messages import HEALTH_SCHEMA, CameraHealth, HealthMessage, ImagesHealth, JournalHealth, rfc3339
from daemon.publishing import Publishing
from daemon.tally import Tally, Totals
from pipeline.inspection import Outcome

_RATE_WINDOW_S = 5.0
_RATE_WINDOW_PARTS = 4


class Health:
    """Puts health messages together, for the supervisor and for whoever asks."""

    def __init__(
        self,
        config: StationConfig,
        boot: str,
        tally: Tally,
        line: Line,
        publishing: Publishing,
        journal: Journal | None,
        archive: Archive,
        events: Events,
    ) -> None:
        self._station, self._boot = config.station, boot
        self._min_rate_fps = config.supervision.min_rate_fps
        self._tally = tally
        self._line = line
        self._publishing = publishing
        self._journal = journal
        self._archive = archive
        self._events = events
        self._lock = threading.Lock()
        self._began_s = time.monotonic()
        self._seen_at = [(self._began_s, 0)]

    def message(self, totals: Totals, state: str, judged_by: JudgedBy, restarts: dict[str, int]) -> HealthMessage:
        """Describe the station now."""
        with self._lock:
            camera = self._camera(totals)
        return HealthMessage(
            schema=HEALTH_SCHEMA,
            station=self._station,
            boot=self._boot,
            time=rfc3339(time.time_ns()),
            state=state,
            uptime_s=round(time.monotonic() - self._began_s, 3),
            seen=totals.seen,
            ok=totals.ok,
            ng=totals.ng,
            invalid=totals.invalid,
            in_flight=totals.in_flight,
            invalid_reasons=totals.reasons,
            last_sequence=totals.last_sequence,
            camera=camera,
            device=judged_by.device,
            precision=judged_by.precision,
            model=judged_by.model,
            calibration=judged_by.calibration,
            journal=self._journal_health(),
            images=self._images_health(),
            events=self._events.counts(),
            restarts=restarts,
        )

    def _camera(self, totals: Totals) -> CameraHealth:
        state, now_s = self._line.state, time.monotonic()
        # On a slow line long enough for a few parts, or it would seem to stand still between two.
        window_s = max(_RATE_WINDOW_S, _RATE_WINDOW_PARTS / (self._min_rate_fps or 1.0))
        self._seen_at = [pair for pair in self._seen_at if now_s - pair[0] <= window_s] or self._seen_at[-1:]
        began_s, began = self._seen_at[0]
        self._seen_at.append((now_s, totals.seen))
        rate_ok = None
        if self._min_rate_fps is not None and now_s - began_s > window_s / 2:
            # The window may have begun just after a part.
            rate_ok = (totals.seen - began + 1) / (now_s - began_s) >= self._min_rate_fps
        last = self._publishing.last_outcome
        return CameraHealth(
            **asdict(state),
            alive=state.connected and not self._line.paused.is_set(),
            rate_ok=rate_ok,
            valid=None if last is None else last is not Outcome.INVALID,
        )

    def _journal_health(self) -> JournalHealth | None:
        journal = self._journal
        if journal is None:
            return None
        commits_us = self._tally.commits_us()
        p50, p99 = (int(v) for v in np.percentile(commits_us, (50, 99))) if len(commits_us) else (None, None)
        return JournalHealth(
            path=str(journal.path),
            written=journal.written,
            given_up=journal.given_up,
            lagging=journal.lagging,
            error=journal.error or journal.flush_error,
            commit_p50_us=p50,
            commit_p99_us=p99,
        )

    def _images_health(self) -> ImagesHealth | None:
        archive = self._archive
        if archive.folder is None:
            return None
        return ImagesHealth(
            path=str(archive.folder),
            kept=archive.kept,
            dropped=archive.dropped,
            bytes=archive.bytes,
            error=archive.error,
        )
