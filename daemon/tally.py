"""What the station counts: verdicts, and the time that each stage took."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.inspection import Outcome, Reason

STAGES = ("grab", "queue", "preprocess", "infer", "total")
"""`total` ends when the sockets have the verdict: its commit, for which a message cannot speak yet, is in it."""
_KEPT = 65536
"""Latencies that percentiles are taken from: the latest so many frames, in memory that never grows."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts at one moment; seen = ok + ng + invalid + in_flight."""

    seen: int
    ok: int
    ng: int
    invalid: int
    reasons: dict[str, int]
    last_sequence: int

    @property
    def in_flight(self) -> int:
        """Frames that were numbered and have no verdict yet."""
        return self.seen - self.ok - self.ng - self.invalid


class Tally:
    """Counts of one run, written by acquisition and publisher, read by anyone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen = 0
        self._outcomes: Counter[Outcome] = Counter()
        self._reasons: Counter[str] = Counter()
        self._last_sequence = 0
        self._latency_us = np.zeros((_KEPT, len(STAGES)), np.int64)
        self._measured = 0
        self._commit_us = np.zeros(_KEPT, np.int64)
        self._commits = 0

    def go_on_after(self, sequence: int) -> None:
        """Learn the last number that an earlier run published."""
        with self._lock:
            self._last_sequence = sequence

    def saw(self) -> None:
        """Count a frame or trigger that was given a number."""
        with self._lock:
            self._seen += 1

    def published(
        self, sequence: int, outcome: Outcome, reason: Reason | None, latency_us: tuple[int, ...] | None
    ) -> None:
        """Count a published verdict; latencies in the order of STAGES, None where nothing was measured."""
        with self._lock:
            self._outcomes[outcome] += 1
            self._last_sequence = sequence
            if reason is not None:
                self._reasons[reason.value] += 1
            if latency_us is not None:
                self._latency_us[self._measured % _KEPT] = latency_us
                self._measured += 1

    def committed(self, commit_us: int) -> None:
        """Note how long a verdict waited for the journal."""
        with self._lock:
            self._commit_us[self._commits % _KEPT] = commit_us
            self._commits += 1

    def commits_us(self) -> NDArray[np.int64]:
        """Return how long the latest verdicts waited for the journal."""
        with self._lock:
            return self._commit_us[: min(self._commits, _KEPT)].copy()

    def totals(self) -> Totals:
        """Return the counts, consistent with one another."""
        with self._lock:
            return Totals(
                self._seen,
                self._outcomes[Outcome.OK],
                self._outcomes[Outcome.NG],
                self._outcomes[Outcome.INVALID],
                dict(self._reasons),
                self._last_sequence,
            )

    def latencies_us(self) -> NDArray[np.int64]:
        """Return (frames, stages) of the latest inspected frames."""
        with self._lock:
            return self._latency_us[: min(self._measured, _KEPT)].copy()


@dataclass(frozen=True, slots=True)
class Summary:
    """What a finished run did."""

    totals: Totals
    duration_s: float
    """From the first grab to the last verdict."""
    percentiles_ms: dict[str, tuple[float, float, float, float]] = field(default_factory=dict)
    """p50, p95, p99 and maximum of each stage over inspected frames, and of the commit within `total`."""

    def __str__(self) -> str:
        t = self.totals
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(t.reasons.items()))
        lines = [
            f"{t.seen} frames: {t.ok} OK, {t.ng} NG, {t.invalid} INVALID" + (f" ({reasons})" if reasons else "")
        ]
        if self.duration_s > 0:
            lines.append(f"{t.seen / self.duration_s:.1f} frames/s over {self.duration_s:.1f} s")
        if self.percentiles_ms:
            lines.append(f"{'latency, ms':<12}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}")
            for stage, values in self.percentiles_ms.items():
                lines.append(f"  {stage:<10}" + "".join(f"{value:9.2f}" for value in values))
        return "\n".join(lines)


def spread(values: NDArray[np.floating[Any]]) -> tuple[float, float, float, float]:
    """Return p50, p95, p99 and the maximum."""
    p50, p95, p99, top = np.percentile(values, (50, 95, 99, 100)).tolist()
    return p50, p95, p99, top


def summarise(tally: Tally, duration_s: float) -> Summary:
    """Sum up a run."""
    latencies = tally.latencies_us() / 1000
    columns = {stage: latencies[:, index] for index, stage in enumerate(STAGES)}
    columns["journal"] = tally.commits_us() / 1000
    percentiles = {}
    for stage, values in columns.items():
        if len(values):
            percentiles[stage] = spread(values)
    return Summary(tally.totals(), duration_s, percentiles)
