"""Threads that may fail or hang: each generation is watched, and followed by the next after a pause."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from daemon.channels import Closed
from daemon.ledger import Revoked

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.05, 5.0
_FAILURES, _WINDOW_S = 8, 60.0
"""So many failures of one worker within the window end the process, for systemd to restart."""


class Backoff:
    """Pauses that double from 50 ms to 5 s, and begin anew after a success."""

    def __init__(self) -> None:
        self._next_s = FIRST_BACKOFF_S

    def pause_s(self) -> float:
        """Return how long to wait before the next try."""
        pause_s, self._next_s = self._next_s, min(2 * self._next_s, LONGEST_BACKOFF_S)
        return pause_s

    def succeeded(self) -> None:
        """Begin with the shortest pause again."""
        self._next_s = FIRST_BACKOFF_S


class Failures:
    """Failures of one worker: how long to wait after each, and when they are too many."""

    def __init__(self) -> None:
        self._at_s: deque[float] = deque(maxlen=_FAILURES)
        self._backoff = Backoff()

    def happened(self) -> float:
        """Note one; return the pause before the next generation begins."""
        now_s = time.monotonic()
        if self._at_s and now_s - self._at_s[-1] > _WINDOW_S:
            self._backoff.succeeded()
        self._at_s.append(now_s)
        return self._backoff.pause_s()

    @property
    def too_many(self) -> bool:
        """Tell whether the process should end rather than try again."""
        return len(self._at_s) == _FAILURES and self._at_s[-1] - self._at_s[0] < _WINDOW_S


class Call:
    """Says since when a worker has been inside a call that may hang."""

    def __init__(self) -> None:
        self._since_s: float | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Mark the time inside a vendor's call."""
        self._since_s = time.monotonic()
        try:
            yield
        finally:
            self._since_s = None

    @property
    def under_way(self) -> bool:
        """Tell whether the worker is inside the call."""
        return self._since_s is not None

    def hangs(self, limit_s: float) -> bool:
        """Tell whether the present call has taken longer than `limit_s`."""
        since_s = self._since_s
        return since_s is not None and time.monotonic() - since_s > limit_s


def let_go_of_frames(error: BaseException) -> None:
    """Drop the tracebacks of an exception and of those behind it, once they are logged.

    Their frames hold a dead thread's engine or camera, and through the thread the exception itself: such a circle
    stays for long after, for a daemon in its stride makes no rubbish that would have it collected.
    """
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        behind = waiting.pop()
        if behind is not None and id(behind) not in seen:
            seen.add(id(behind))
            behind.__traceback__ = None
            waiting += [behind.__cause__, behind.__context__]


class Worker(threading.Thread):
    """One generation of a thread. Its failure is kept, and whoever supervises is told."""

    def __init__(self, name: str, work: Callable[[], None], on_end: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._on_end = on_end
        self.failure: BaseException | None = None
        self.holds: list[object] = []
        """What only this thread may let go of, which it does at its end: it may hang as its call does."""

    def run(self) -> None:
        """Do the work; the supervisor reads `failure` afterwards."""
        try:
            self._work()
        except (Closed, Revoked):
            return  # this generation was abandoned, its successor is at work
        except BaseException as error:  # noqa: BLE001 - handed to the supervisor, which restarts or ends
            self.failure = error
        finally:
            self.holds.clear()
            self._on_end()
