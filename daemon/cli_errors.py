"""Errors that a user can mend become one clear message and an exit code.

0 done; 1 it failed while running; 2 the configuration, bundle, data or command line is wrong, so that trying
again without a change is of no use; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

EXIT_FAILED, EXIT_MISUSED, EXIT_INTERRUPTED = 1, 2, 130


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn the errors that a user can mend into one clear message and the right exit code."""
    from calibrate.checkpoint import CheckpointError
    from calibrate.fetch import FetchFailed
    from calibrate.foreign import ImportFailed
    from calibrate.layouts import DatasetError
    from calibrate.teacher import TeacherError
    from calibrate.train import TrainingError, TrainingStopped
    from daemon.check import CheckFailed
    from daemon.client import RequestFailed
    from daemon.demo import DemoFailed
    from daemon.journal import JournalError
    from daemon.keys import KeysError
    from daemon.sequence import StateError
    from daemon.soak import SoakFailed
    from daemon.sockets import EndpointError
    from daemon.station import StationFailed
    from daemon.yaml_errors import ConfigError
    from drivers.camera import CameraError, DriverMissing
    from pipeline.bundle import BundleError
    from pipeline.engines import EngineUnavailable
    from pipeline.geometry import GeometryError

    misuse = (
        BundleError,
        CheckpointError,
        ConfigError,
        DatasetError,
        DriverMissing,
        EngineUnavailable,
        GeometryError,
        ImportFailed,
        JournalError,
        KeysError,
        TeacherError,
        TrainingError,
    )
    try:
        yield
    except misuse as error:
        _fail(error, EXIT_MISUSED)
    except (
        CameraError,
        CheckFailed,
        DemoFailed,
        EndpointError,
        FetchFailed,
        RequestFailed,
        SoakFailed,
        StateError,
        StationFailed,
        OSError,
    ) as error:
        _fail(error, EXIT_FAILED)
    except (KeyboardInterrupt, TrainingStopped) as error:
        _fail(error, EXIT_INTERRUPTED)


def _fail(error: BaseException, code: int) -> NoReturn:
    typer.echo(f"inspectord: {str(error) or 'interrupted'}", err=True)
    raise typer.Exit(code)
