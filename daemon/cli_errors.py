"""Errors that a user can mend become one clear message and an exit code.

0 done; 1 it failed while running; 2 the configuration, bundle, data or command line is wrong, so that trying
again without a change is of no use; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import typer

from drivers.paths import may_pass

EXIT_FAILED, EXIT_MISUSED, EXIT_INTERRUPTED = 1, 2, 130


EXIT_CODES = {
    **dict.fromkeys(
        (
            "calibrate.checkpoint.CheckpointError",
            "calibrate.fetch.FetchMisused",
            "calibrate.foreign.ImportFailed",
            "calibrate.layouts.DatasetError",
            "calibrate.teacher.TeacherError",
            "calibrate.listener.TrainingError",
            "daemon.journal.JournalError",
            "daemon.keys.KeysError",
            "daemon.yaml_errors.ConfigError",
            "drivers.camera.DriverMissing",
            "pipeline.bundle.BundleError",
            "pipeline.engines.EngineUnavailable",
            "pipeline.geometry.GeometryError",
        ),
        EXIT_MISUSED,
    ),
    **dict.fromkeys(
        (
            "builtins.OSError",
            "calibrate.fetch.FetchFailed",
            "daemon.check.CheckFailed",
            "daemon.client.RequestFailed",
            "daemon.demo.DemoFailed",
            "daemon.sequence.StateError",
            "daemon.bench_engine.SideFailed",
            "daemon.bench_line.BenchFailed",
            "daemon.soak.SoakFailed",
            "daemon.sockets.EndpointError",
            "daemon.station.StationFailed",
            "drivers.camera.CameraError",
            "pipeline.engines.DeviceAbsent",
        ),
        EXIT_FAILED,
    ),
    "calibrate.listener.TrainingStopped": EXIT_INTERRUPTED,
    "builtins.KeyboardInterrupt": EXIT_INTERRUPTED,
}
"""By name, so that `inspectord ctl` need not import what only training can raise."""


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn the errors that a user can mend into one clear message and the right exit code."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        for kind in type(error).__mro__:
            code = EXIT_CODES.get(f"{kind.__module__}.{kind.__qualname__}")
            if code is not None:
                _fail(error, EXIT_FAILED if _may_pass(error) else code)
        raise


def _may_pass(error: BaseException) -> bool:
    """Tell whether a disk or a share is to blame, which may be well again: systemd tries again then."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return may_pass(cause)
        if isinstance(cause, sqlite3.Error):
            code = getattr(cause, "sqlite_errorcode", 0) & 0xFF  # the rest says where
            return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR)
        cause = cause.__cause__
    return False


@contextmanager
def leaving_at_the_end() -> Iterator[None]:
    """End the process after a station has run, also with a thread left in a vendor's call.

    All but that call's device is closed by then. Python's own ending would unwind such a thread through C++, which
    aborts the process.
    """
    code = EXIT_FAILED
    try:
        yield
        code = 0
    except typer.Exit as ending:
        code = ending.exit_code
        raise
    except BaseException:
        if _threads_left():
            _say(traceback.format_exc())
        raise
    finally:
        heard = _say("")
        if not heard:
            os._exit(code)
        if _threads_left():
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError):  # nobody reads it any more
                    stream.flush()
            os._exit(code)


def _threads_left() -> bool:
    harmless = (threading.main_thread(), threading.current_thread())
    return any(thread not in harmless and thread.name != "log" for thread in threading.enumerate())


def _say(text: str) -> bool:
    """Write to standard error, by way of the log where there is one; False where nobody reads it."""
    if "daemon.log" in sys.modules and sys.modules["daemon.log"].is_configured():
        return bool(sys.modules["daemon.log"].last_words(text))
    typer.echo(text, nl=False, err=True)
    return True


def _fail(error: BaseException, code: int) -> NoReturn:
    _say(f"inspectord: {str(error) or 'interrupted'}\n")
    raise typer.Exit(code)
