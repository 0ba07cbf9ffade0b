"""A steady rate for drivers that make their own frames or triggers."""

from __future__ import annotations

import time


class Pacer:
    """Say when the next frame is due at a given rate; a late caller is not made to hurry."""

    def __init__(self, rate_fps: float | None) -> None:
        self._period_s = 1.0 / rate_fps if rate_fps else 0.0
        self._due_s: float | None = None
        self.was_due_ns: int | None = None
        """When that was due which `wait` said last (`time.monotonic_ns`); None without a rate."""

    def wait(self, timeout_s: float) -> bool:
        """Sleep until the next frame is due, `timeout_s` at most; return whether it is due."""
        if not self._period_s:
            return True
        now_s = time.monotonic()
        if self._due_s is None:
            self._due_s = now_s
        wait_s = self._due_s - now_s
        if wait_s > timeout_s:
            time.sleep(timeout_s)
            return False
        if wait_s > 0:
            time.sleep(wait_s)
        self.was_due_ns = int(self._due_s * 1e9)
        self._due_s = max(self._due_s + self._period_s, time.monotonic() - self._period_s)
        return True
