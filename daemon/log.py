"""structlog: JSON lines for machines, readable colour on a terminal, always to standard error."""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import sys
import threading
from collections import deque
from typing import Literal, TextIO, cast

import structlog

_tracebacks = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)
"""Without local variables: an image does not belong in a log."""
_WAITING = 1000
"""Entries of the log that wait for whoever reads it; what comes on top of them is dropped, and counted."""
_LAST_WORDS_S = 2.0


class _Unbreakable(io.TextIOBase):
    """Standard error that never stops the line: the disk may be full, the reader gone or asleep (Ctrl-S)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._changed = threading.Condition()
        self._waiting: deque[str] = deque()
        self._busy = False
        self._dropped = 0
        threading.Thread(target=self._copy, name="log", daemon=True).start()

    def write(self, text: str) -> int:
        with self._changed:
            if len(self._waiting) < _WAITING:
                self._waiting.append(text)
                self._changed.notify_all()
            else:
                self._dropped += 1
        return len(text)

    def flush(self) -> None:
        """Do nothing: another thread writes."""

    def drain(self) -> bool:
        """Wait a moment for what was logged last, at the end of the process; False where nobody reads it."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._waiting or self._busy), _LAST_WORDS_S)

    def _copy(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting)
                pieces, dropped = list(self._waiting), self._dropped
                self._waiting.clear()
                self._busy, self._dropped = True, 0
            with contextlib.suppress(OSError, ValueError):  # where would a failure to log be logged?
                self._stream.write("".join(pieces))
                if dropped:
                    self._stream.write(f"{dropped} entries of the log were dropped: nobody read them\n")
                self._stream.flush()


_outputs: list[_Unbreakable] = []


def is_configured() -> bool:
    """Tell whether standard error belongs to the log."""
    return bool(_outputs)


def last_words(text: str = "") -> bool:
    """Say something at the end of the process, after what was logged; False where nobody reads it."""
    for output in _outputs if text else ():
        output.write(text)
    return all(output.drain() for output in _outputs)


atexit.register(last_words)


def configure_logging(level: str = "info", log_format: Literal["auto", "json", "console"] = "auto") -> None:
    """Set up structlog for the whole process."""
    on_terminal = sys.stderr.isatty()
    as_json = log_format == "json" or (log_format == "auto" and not on_terminal)
    processors: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if as_json:
        processors += [_tracebacks, structlog.processors.JSONRenderer()]
    else:
        # Without local variables: those of an inspection are images.
        processors.append(
            structlog.dev.ConsoleRenderer(colors=on_terminal, exception_formatter=structlog.dev.plain_traceback)
        )
    if not _outputs:
        _outputs.append(_Unbreakable(sys.stderr))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        # An entry and the end of its line in one piece, of which none or all is dropped; printing makes two.
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _outputs[-1])),
        cache_logger_on_first_use=False,
    )
