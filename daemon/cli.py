"""The `inspectord` command: running a station. Exit codes are in `daemon.cli_errors`."""

from __future__ import annotations

import io
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from daemon import cli_bench, cli_calibrate, cli_keys, cli_line, cli_teacher
from daemon.cli_errors import clear_errors, leaving_at_the_end
from daemon.cli_options import ConfigOption, SecretOption, ServerKeyOption

app = typer.Typer(
    name="inspectord",
    help="One EfficientAD verdict for every part in front of an industrial camera, over ZeroMQ.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
cli_calibrate.register(app)
cli_teacher.register(app)
cli_bench.register(app)
cli_line.register(app)
cli_keys.register(app)

StateDirOption = Annotated[
    Path | None, typer.Option(help="instead of the configured state_dir: numbers, journal, images, ipc sockets")
]


@app.command()
def run(config: ConfigOption, state_dir: StateDirOption = None) -> None:
    """Inspect: grab frames, judge them, publish verdicts and maps, until stopped or the source ends."""
    from daemon.config import load_config
    from daemon.log import configure_logging

    configure_logging()
    with clear_errors():
        settings = load_config(config)
    configure_logging(settings.log.level, settings.log.format)
    from daemon.station import Station

    with leaving_at_the_end(), clear_errors():
        station = Station(settings, config_path=config, state_dir=state_dir)

        def stop(_number: int, _frame: FrameType | None) -> None:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda n, _f: os._exit(128 + n))  # the second one ends at once
            station.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        signal.signal(signal.SIGHUP, lambda _number, _frame: station.reload_soon())
        typer.echo(station.run())


@app.command()
def check(config: ConfigOption) -> None:
    """Validate a configuration, open the camera, load the bundle and run one frame through."""
    from daemon.log import configure_logging

    configure_logging("warning")
    with clear_errors():
        from daemon.check import check_station
        from daemon.config import load_config

        for line in check_station(load_config(config)):
            typer.echo(line)


@app.command()
def grab(
    config: ConfigOption,
    count: Annotated[int, typer.Argument(min=1, max=100_000, help="photographs to take")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for them", file_okay=False)],
    every_s: Annotated[float, typer.Option(min=0, help="seconds from one to the next at least")] = 0,
    wait_s: Annotated[float, typer.Option(min=1, help="seconds to wait for a frame (a hardware trigger)")] = 60,
) -> None:
    """Photograph good parts with a station's camera, to train on; of its file only `camera:` is looked at."""
    with clear_errors():
        from daemon.photographs import photograph

        taken = skipped = 0
        for path, frame in photograph(config, output, count, every_s, wait_s):
            if path is None:
                skipped += 1
                typer.echo(f"skipped a frame: {frame.status.value} {frame.detail}", err=True)
                continue
            taken += 1
            typer.echo(f"{path} {frame.pixel_format}")
        typer.echo(f"{taken} photographs in {output.absolute()}, {skipped} frames skipped")


@app.command()
def watch(
    endpoint: Annotated[str, typer.Argument(help="a verdict endpoint, such as tcp://127.0.0.1:5550")],
    station: Annotated[str | None, typer.Option(help="only this station")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="end after so many verdicts")] = None,
    secret: SecretOption = None,
    server_key: ServerKeyOption = None,
) -> None:
    """Subscribe to verdicts and show them as they come."""
    from daemon.client import ClientKeys
    from daemon.keys import read_secret
    from daemon.watch import watch_verdicts

    if (secret is None) != (server_key is None):
        raise typer.BadParameter("--secret and --server-key belong together", param_hint="--secret")
    with clear_errors():
        keys = (
            None if secret is None or server_key is None else ClientKeys(*read_secret(secret), server_key.encode())
        )
        watch_verdicts(endpoint, station, count, keys)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="where bundle, configuration and picture go")] = Path("runs/demo"),
    parts: Annotated[int, typer.Option(min=8, max=10_000, help="parts to inspect")] = 40,
    steps: Annotated[int, typer.Option(min=1, help="training steps")] = 400,
) -> None:
    """Show the whole thing on the simulated line: train a small model, run the daemon, watch it."""
    from daemon.demo import run_demo

    with clear_errors():
        run_demo(folder, parts, steps)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"inspectord {version('inspectord')}")
        raise typer.Exit


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a sign that a terminal does not know ends no command
    app(prog_name="inspectord")


if __name__ == "__main__":
    main()
