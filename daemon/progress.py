"""A progress bar for long commands, and Ctrl-C as a request to stop cleanly."""

from __future__ import annotations

import datetime
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from calibrate.listener import Listener

_LINE_PERIOD_S = 10.0
"""How often progress is written where there is no terminal."""


class ConsoleListener(Listener):
    """Shows a bar on a terminal and a line now and then elsewhere, on standard error."""

    def __init__(self, what: str = "training") -> None:
        self._what = what
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=self._console,
        )
        self._task: TaskID | None = None
        self._stop = False
        self._said_s = 0.0
        self._began = (0.0, 0, 0)
        """When the first step was told of, its number, and of how many."""
        self._previous: Any = None

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)
        if self._task is not None:
            self._bar.stop()

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if self._stop:
            raise KeyboardInterrupt  # the second time at once; the last checkpoint is whole
        self._stop = True

    def say(self, message: str) -> None:
        """Write a line."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def step(self, done: int, total: int, losses: dict[str, float]) -> None:
        """Move the bar."""
        facts = " ".join(f"{name} {value:.3f}" for name, value in losses.items() if value)
        if sys.stderr.isatty():
            if self._task is None:
                self._bar.start()
                self._task = self._bar.add_task(self._what, total=total, completed=done, facts="")
            self._bar.update(self._task, completed=done, total=total, facts=facts)
            return
        now_s = time.monotonic()
        _, first, of = self._began
        if total != of or done < first:  # something else has begun
            self._began = (now_s, done, total)
        if done == total or now_s - self._said_s > _LINE_PERIOD_S:
            self._said_s = now_s
            began_s, first, _ = self._began
            left_s = (now_s - began_s) / (done - first) * (total - done) if total > done > first else 0
            left = f" {datetime.timedelta(seconds=round(left_s))} left" if left_s else ""
            self.say(f"{self._what} {done}/{total}{left} {facts}".rstrip())

    def should_stop(self) -> bool:
        """Tell whether Ctrl-C was pressed."""
        if self._stop:
            self.say("stopping after this step; press Ctrl-C again to stop at once")
        return self._stop
