"""A station whose camera and engine fail when they are told to: for `inspectord bench soak` and the tests.

`python -m daemon.faults -c FILE FOLDER` runs the station of FILE. A file in FOLDER with a fault's name makes it
happen once, and disappears as it does.
"""

from __future__ import annotations

import signal
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from daemon.cli_errors import clear_errors, leaving_at_the_end
from daemon.cli_options import ConfigOption
from drivers.camera import Camera, CameraInfo, CameraLost, Fires
from drivers.frame import Frame, Image, PixelFormat
from pipeline.bundle import Bundle
from pipeline.engine import Engine, Pending, RawMaps
from pipeline.engines import EngineChoice


class Fault(StrEnum):
    """What can be made to fail from outside."""

    ENGINE_ERROR = "engine_error"
    """The engine raises."""
    ENGINE_HANG = "engine_hang"
    """The engine does not return for longer than `supervision.hang_s`."""
    CAMERA_LOST = "camera_lost"
    """The driver says that the camera is gone."""
    CAMERA_HANG = "camera_hang"
    """The driver does not return for longer than `supervision.hang_s`."""
    CAMERA_BROKEN = "camera_broken"
    """The driver raises what it should not."""


class Faults:
    """The folder through which faults are ordered."""

    def __init__(self, folder: Path, hang_s: float) -> None:
        self.folder = folder
        self._hang_s = hang_s

    def order(self, fault: Fault) -> None:
        """Make a fault happen at the next opportunity."""
        (self.folder / fault.value).touch()

    @property
    def waiting(self) -> bool:
        """Tell whether an order was not carried out yet."""
        return any((self.folder / fault.value).exists() for fault in Fault)

    def happens(self, fault: Fault) -> bool:
        """Tell whether a fault was ordered, and take the order."""
        try:
            (self.folder / fault.value).unlink()
        except FileNotFoundError:
            return False
        return True

    def hang(self) -> None:
        """Sleep like a vendor's call that comes back long after everyone has given it up."""
        time.sleep(2 * self._hang_s)


class FaultyEngine:
    """A real engine that raises or hangs when ordered to."""

    def __init__(self, engine: Engine, faults: Faults) -> None:
        self._engine, self._faults, self._count = engine, faults, 0
        self.device, self.precision, self.at_once = engine.device, engine.precision, engine.at_once

    def warm_up(self) -> None:
        """Warm the real engine up."""
        self._engine.warm_up()

    def begin(self, image: Image, fmt: PixelFormat) -> Pending:
        """Begin as the real engine does; fail as ordered, here and where maps are waited for by turns."""
        is_blank = not image.any()  # of a warm-up, which goes well
        self._count += not is_blank
        fails_late = self._count % 2 == 0
        if not (is_blank or fails_late):
            self._fail()
        finish = self._engine.begin(image, fmt)

        def finish_or_fail() -> RawMaps:
            maps = finish()
            if not is_blank and fails_late:
                self._fail()
            return maps

        return finish_or_fail

    def _fail(self) -> None:
        if self._faults.happens(Fault.ENGINE_HANG):
            self._faults.hang()
        if self._faults.happens(Fault.ENGINE_ERROR):
            raise RuntimeError("ordered: an illegal memory access was encountered")


class FaultyCamera:
    """A real camera whose driver fails when ordered to."""

    live: ClassVar[bool] = True

    def __init__(self, camera: Camera, faults: Faults) -> None:
        self._camera, self._faults = camera, faults
        self.fires: Fires = camera.fires
        self.signals_pass = camera.signals_pass

    def open(self) -> CameraInfo:
        """Open the real camera."""
        return self._camera.open()

    def ready(self, timeout_s: float) -> bool:
        """Ask the real camera."""
        return self._camera.ready(timeout_s)

    def fire(self) -> None:
        """Fire the real camera."""
        self._camera.fire()

    def grab(self, timeout_s: float) -> list[Frame]:
        """Fail as ordered, else grab."""
        if self._faults.happens(Fault.CAMERA_HANG):
            self._faults.hang()
        if self._faults.happens(Fault.CAMERA_LOST):
            raise CameraLost("ordered: the cable was pulled")
        if self._faults.happens(Fault.CAMERA_BROKEN):
            raise RuntimeError("ordered: a fault in the driver")
        return self._camera.grab(timeout_s)

    def signal_pass(self, until_ns: int) -> None:
        """Signal with the real camera."""
        self._camera.signal_pass(until_ns)

    def close(self) -> None:
        """Close the real camera."""
        self._camera.close()


def run_faulty(
    config: ConfigOption, folder: Annotated[Path, typer.Argument(help="where faults are ordered")]
) -> None:
    """Run a station that fails when it is told to."""
    from daemon.config import StationConfig, load_config
    from daemon.log import configure_logging
    from daemon.station import Station
    from drivers.catalog import make_camera

    configure_logging()
    with leaving_at_the_end(), clear_errors():
        settings = load_config(config)
        faults = Faults(folder, settings.supervision.hang_s)

        def engine_for(now: StationConfig, bundle: Bundle) -> EngineChoice:
            choice = now.make_engine(bundle)
            return EngineChoice(FaultyEngine(choice.engine, faults), choice.because)

        station = Station(
            settings,
            config_path=config,
            camera_for=lambda now: FaultyCamera(make_camera(now.camera), faults),
            engine_for=engine_for,
        )
        signal.signal(signal.SIGTERM, lambda _number, _frame: station.stop())
        signal.signal(signal.SIGHUP, lambda _number, _frame: station.reload_soon())
        typer.echo(station.run())


if __name__ == "__main__":
    typer.run(run_faulty)
