"""Commands beside a running line: `ctl`, `verdicts`, `replay-images`."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli_errors import EXIT_FAILED, clear_errors
from daemon.cli_options import (
    ConfigOption,
    DeviceOption,
    EnginePrecisionOption,
    SecretOption,
    ServerKeyOption,
    engine_words,
    one_of,
)

if TYPE_CHECKING:
    from daemon.client import Control

_ctl = typer.Typer(no_args_is_help=True, help="Talk to a running daemon through its control socket.")
EndpointOption = Annotated[
    str | None, typer.Option(help="instead of the configured control endpoint, such as tcp://10.0.0.5:5553")
]
_COLUMNS = ("sequence", "time", "verdict", "reason", "score", "threshold", "source", "part", "model", "calibration")


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.add_typer(_ctl, name="ctl")
    app.command()(verdicts)
    app.command("replay-images")(replay_images)


@_ctl.callback()
def _ctl_options(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="the station's YAML file")] = None,
    endpoint: EndpointOption = None,
    secret: SecretOption = None,
    server_key: ServerKeyOption = None,
) -> None:
    context.obj = (config, endpoint, secret, server_key)


@contextmanager
def _control(context: typer.Context, config: Path | None) -> Iterator[Control]:
    from daemon.addresses import load_addresses
    from daemon.client import ClientKeys, Control
    from daemon.keys import SERVER, KeyFolder, read_secret

    given, endpoint, secret, server_key = context.obj
    config = config or given
    if config is None and endpoint is None:
        raise typer.BadParameter("give the station's file, or --endpoint", param_hint="--config")
    if (secret is None) != (server_key is None) and config is None:
        raise typer.BadParameter("--secret and --server-key belong together", param_hint="--secret")
    with clear_errors():
        addresses = None if config is None else load_addresses(config)
        address = endpoint or (addresses.control_address(with_keys=secret is not None) if addresses else "")
        keys = None
        if secret is not None:
            if server_key is None and addresses is not None and addresses.security.keys is not None:
                server_key = KeyFolder(addresses.security.keys).secret(SERVER)[0].decode()
            keys = ClientKeys(*read_secret(secret), (server_key or "").encode())
        with Control(address, keys) as control:
            yield control


def _ask(context: typer.Context, config: Path | None, command: str, **arguments: Any) -> None:
    with _control(context, config) as control:
        result, _ = control.request(command, **arguments)
    typer.echo(json.dumps(result, indent=2))


OptionalConfig = Annotated[Path | None, typer.Option("--config", "-c", help="the station's YAML file")]


@_ctl.command()
def status(context: typer.Context, config: OptionalConfig = None) -> None:
    """Show how the station is."""
    _ask(context, config, "status")


@_ctl.command()
def trigger(
    context: typer.Context,
    config: OptionalConfig = None,
    part: Annotated[str | None, typer.Option(help="the part's id; comes back in the verdict")] = None,
) -> None:
    """Expose one part now (camera.trigger: command)."""
    _ask(context, config, "trigger", **({} if part is None else {"part": part}))


@_ctl.command()
def pause(context: typer.Context, config: OptionalConfig = None) -> None:
    """Stop grabbing; the camera is closed."""
    _ask(context, config, "pause")


@_ctl.command()
def resume(context: typer.Context, config: OptionalConfig = None) -> None:
    """Grab again."""
    _ask(context, config, "resume")


@_ctl.command()
def reload(context: typer.Context, config: OptionalConfig = None) -> None:
    """Take a new configuration, bundle, calibration or keys between two frames; fails when they are refused."""
    _ask(context, config, "reload", timeout_s=300)


@_ctl.command()
def snapshot(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file", dir_okay=False)],
    config: OptionalConfig = None,
    overlay: Annotated[
        bool, typer.Option("--overlay", help="in colour, with the anomaly map laid over it")
    ] = False,
) -> None:
    """Save the next judged frame."""
    with _control(context, config) as control:
        result, png = control.request("snapshot", overlay=overlay)
        output.write_bytes(png or b"")
    typer.echo(f"{output}: part {result['sequence']}, {result['pixel_format']}")


@_ctl.command()
def capture(
    context: typer.Context,
    count: Annotated[int, typer.Argument(min=1, max=100_000, help="good parts to keep")],
    name: Annotated[str, typer.Option(help="folder below the state folder's captures/")] = "capture",
    config: OptionalConfig = None,
) -> None:
    """Keep the next good frames in a folder, while inspecting, to train or recalibrate with."""
    _ask(context, config, "capture", count=count, name=name)


@_ctl.command()
def stop(context: typer.Context, config: OptionalConfig = None) -> None:
    """End the daemon as SIGTERM does (systemd may start it again)."""
    _ask(context, config, "stop")


_LARGEST = 2**63 - 1
"""Of an integer in SQLite."""


def _moment_ns(text: str, option: str) -> int:
    """Read a time: RFC 3339, or so long ago (90s, 15m, 8h, 2d)."""
    ago = re.fullmatch(r"(\d+)([smhd])", text)
    try:
        if ago:
            unit = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}[ago.group(2)]
            moment = datetime.now().astimezone() - timedelta(**{unit: int(ago.group(1))})
        else:
            moment = datetime.fromisoformat(text).astimezone()
        return max(-_LARGEST, min(int(moment.timestamp() * 1e9), _LARGEST))
    except (OverflowError, ValueError):
        what = f"{text!r} is neither a time such as 2026-01-31T06:00 nor an age such as 8h"
        raise typer.BadParameter(what, param_hint=option) from None


def verdicts(
    config: ConfigOption,
    since: Annotated[str | None, typer.Option(help="time (local unless it says otherwise) or age (8h)")] = None,
    until: Annotated[str | None, typer.Option(help="the same")] = None,
    verdict: Annotated[str | None, typer.Option(help="OK, NG or INVALID")] = None,
    reason: Annotated[str | None, typer.Option(help="only INVALID for this reason")] = None,
    first: Annotated[int, typer.Option(min=0, max=_LARGEST, help="from this sequence number on")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, max=_LARGEST, help="at most so many")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="comma-separated, with a header")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one verdict a line, as published")] = False,
) -> None:
    """Read the journal, also while the daemon runs."""
    from daemon.addresses import load_addresses
    from daemon.journal import JournalError, Query, read_journal

    if as_csv and as_json:
        raise typer.BadParameter("choose one of --csv and --json", param_hint="--csv")
    if verdict is not None:
        one_of(verdict, "--verdict", "OK", "NG", "INVALID")
    query = Query(
        first_sequence=first,
        since_ns=None if since is None else _moment_ns(since, "--since"),
        until_ns=None if until is None else _moment_ns(until, "--until"),
        verdict=verdict,
        reason=reason,
        limit=limit,
    )
    with clear_errors():
        path = load_addresses(config).journal_path()
        if path is None:
            raise JournalError(f"{config}: journal: false; there is nothing to read")
        writer = csv.writer(sys.stdout, lineterminator="\n")
        if as_csv:
            writer.writerow(_COLUMNS)
        for _, body in read_journal(path, query):
            if as_json:
                typer.echo(body.decode())
                continue
            v = json.loads(body)
            row = ["" if v[column] is None else v[column] for column in _COLUMNS]
            if as_csv:
                writer.writerow(row)
            else:
                score = "–" if v["score"] is None else f"{v['score']:.4f}"
                word = f"{v['verdict']:<7} {v['reason'] or '':<10}"
                typer.echo(f"{v['sequence']:>9}  {v['time']}  {word} {score:>8}  {v['source']}")


def replay_images(
    folder: Annotated[Path, typer.Argument(help="kept images (the state folder's images/)", exists=True)],
    model: Annotated[Path, typer.Option(help="bundle to judge them with", file_okay=False)],
    threshold: Annotated[float | None, typer.Option(help="instead of the bundle's")] = None,
    device: DeviceOption = "auto",
    precision: EnginePrecisionOption = "auto",
) -> None:
    """Judge kept images again with another bundle or calibration, and print what would change."""
    from daemon.replay_images import Judgement, judge_again

    with clear_errors():
        changed = failed = total = 0
        for item in judge_again(folder, model, threshold, *engine_words(device, precision)):
            total += 1
            if not isinstance(item, Judgement):
                failed += 1
                typer.echo(f"{item.path}: {item.error}", err=True)
                continue
            changed += item.changed
            mark = "CHANGED" if item.changed else ""
            typer.echo(f"{item.name:<40} {item.before:<22} {item.after:<22} {mark}")
        typer.echo(f"{total} images: {changed} would change, {failed} cannot be read")
        if failed:
            raise typer.Exit(EXIT_FAILED)
