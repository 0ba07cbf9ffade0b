"""`inspectord keys`: who may connect over TCP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from daemon.cli_errors import clear_errors
from daemon.cli_options import one_of

FolderOption = Annotated[
    Path, typer.Option("--keys", help="folder of the keys, as `security.keys` names it", file_okay=False)
]
_DEFAULT = Path("/etc/inspectord/keys")
NameArgument = Annotated[str, typer.Argument(help="the client's name: letters, digits, _ . -")]

_keys = typer.Typer(no_args_is_help=True, help="Keys of the clients that may connect over TCP.")


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.add_typer(_keys, name="keys")


@_keys.command()
def create(
    name: NameArgument,
    rights: Annotated[
        str, typer.Option(help="comma-separated: subscribe (verdicts, maps, health, events), replay, control")
    ] = "subscribe,replay",
    keys: FolderOption = _DEFAULT,
) -> None:
    """Make a client's keys (and the daemon's own, the first time)."""
    from daemon.keys import SERVER, KeyFolder, Right

    words = [one_of(word.strip(), "--rights", *(right.value for right in Right)) for word in rights.split(",")]
    with clear_errors():
        folder = KeyFolder(keys)
        secret = folder.create(name, [Right(word) for word in words])
        server, _ = folder.secret(SERVER)
    typer.echo(f"{secret}: take this file to the client; it is secret, and not needed here any more")
    typer.echo(f"the daemon's public key: {server.decode()}")
    typer.echo("the running daemon learns of it by: inspectord ctl reload -c FILE")


@_keys.command("list")
def list_clients(keys: FolderOption = _DEFAULT) -> None:
    """Show the daemon's public key, and every client with its rights."""
    from daemon.keys import SERVER, KeyFolder

    with clear_errors():
        folder = KeyFolder(keys)
        server, _ = folder.secret(SERVER)
        clients = folder.clients()
    typer.echo(f"{SERVER:<20} {server.decode()}")
    for client in clients:
        typer.echo(f"{client.name:<20} {client.public.decode()}  {', '.join(sorted(client.rights))}")


@_keys.command()
def revoke(name: NameArgument, keys: FolderOption = _DEFAULT) -> None:
    """Strike a client off; its connections end when the daemon reloads."""
    from daemon.keys import KeyFolder

    with clear_errors():
        KeyFolder(keys).revoke(name)
    typer.echo(f"{name} is revoked; end its connections by: inspectord ctl reload -c FILE")
