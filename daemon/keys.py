"""Who may connect: CURVE keys of the daemon and its clients, each client with its rights.

A folder holds `server.key_secret` (the daemon's), `clients.yaml` (public keys and rights) and, until they are taken
to their machines, the clients' own `NAME.key_secret`. See ZeroMQ RFCs 25 (CURVE) and 27 (ZAP).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml
import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

SERVER = "server"
_CLIENTS = "clients.yaml"
_SECRET = ".key_secret"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,62}")


class Right(StrEnum):
    """What a client may do; also the ZAP domain of the socket that it needs for it."""

    SUBSCRIBE = "subscribe"
    REPLAY = "replay"
    CONTROL = "control"


class KeysError(Exception):
    """Keys cannot be read or written; the message names the file and says what to do."""


@dataclass(frozen=True, slots=True)
class Client:
    """One line of `clients.yaml`."""

    name: str
    public: bytes
    """Z85, 40 characters."""
    rights: frozenset[Right]


class KeyFolder:
    """The folder that `inspectord keys` writes and the daemon reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def secret(self, name: str) -> tuple[bytes, bytes]:
        """Return a key pair (public, secret), Z85. Raises KeysError.

        The daemon's own may come as the systemd credential `server.key_secret` instead.
        """
        path = self.folder / f"{name}{_SECRET}"
        credentials = os.environ.get("CREDENTIALS_DIRECTORY")
        if name == SERVER and credentials and (Path(credentials) / path.name).is_file():
            path = Path(credentials) / path.name
        return read_secret(path)

    def clients(self) -> list[Client]:
        """Read every client with its rights. Raises KeysError."""
        path = self.folder / _CLIENTS
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            return [
                Client(name, str(entry["public"]).encode(), frozenset(Right(r) for r in entry["rights"]))
                for name, entry in data.items()
            ]
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise KeysError(f"{path}: {error}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            wanted = "NAME: {public: KEY, rights: [subscribe, replay, control]}"
            raise KeysError(f"{path}: {error}; each entry is {wanted}") from error

    def create(self, name: str, rights: Iterable[Right]) -> Path:
        """Make a client's keys, and the daemon's own at the first call. Returns the client's secret file."""
        if not _NAME.fullmatch(name) or name == SERVER:
            raise KeysError(f"{name!r} cannot be a client's name: letters, digits, _ . - (and not {SERVER})")
        clients = {client.name: client for client in self.clients()}
        if name in clients:
            raise KeysError(f"{name} exists already; revoke it first: inspectord keys revoke {name}")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o750)
        if not (self.folder / f"{SERVER}{_SECRET}").exists():
            _write_secret(self.folder / f"{SERVER}{_SECRET}", *zmq.curve_keypair())
        public, secret = zmq.curve_keypair()
        path = self.folder / f"{name}{_SECRET}"
        _write_secret(path, public, secret)
        self._write([*clients.values(), Client(name, public, frozenset(rights))])
        return path

    def revoke(self, name: str) -> None:
        """Strike a client off. Raises KeysError when there is none of that name."""
        clients = self.clients()
        if name not in [client.name for client in clients]:
            known = ", ".join(client.name for client in clients) or "none"
            raise KeysError(f"no client {name!r} in {self.folder / _CLIENTS}; there: {known}")
        self._write([client for client in clients if client.name != name])
        (self.folder / f"{name}{_SECRET}").unlink(missing_ok=True)

    def _write(self, clients: list[Client]) -> None:
        data = {c.name: {"public": c.public.decode(), "rights": sorted(r.value for r in c.rights)} for c in clients}
        _write_whole(self.folder / _CLIENTS, yaml.safe_dump(data, sort_keys=True), 0o640)


def read_secret(path: Path) -> tuple[bytes, bytes]:
    """Read a key pair (public, secret) from a file of ZeroMQ's certificate format. Raises KeysError."""
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise KeysError(f"{path}: {error}; make keys with: inspectord keys create NAME") from error
    if secret is None:
        raise KeysError(f"{path} holds no secret key")
    return public, secret


def _write_secret(path: Path, public: bytes, secret: bytes) -> None:
    # ZeroMQ's certificate format; its own writer makes secrets readable for all.
    lines = ("curve", f'    public-key = "{public.decode()}"', f'    secret-key = "{secret.decode()}"', "")
    _write_whole(path, "\n".join(lines), 0o600)


def _write_whole(path: Path, text: str, mode: int) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            if os.geteuid() == 0:  # the folder is the service's: what root makes in it is too
                owner = path.parent.stat()
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
        part.replace(path)
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror}") from error


class Security:
    """The keys that the daemon's sockets ask for; without keys, sockets ask for none."""

    def __init__(self, folder: Path | None) -> None:
        """Read the keys. Raises KeysError."""
        self._folder = None if folder is None else KeyFolder(folder)
        self._server = None if self._folder is None else self._folder.secret(SERVER)
        self._clients = self.read()
        self._authenticator: ThreadAuthenticator | None = None

    def start(self, context: zmq.Context[Any]) -> None:
        """Begin to answer ZAP requests of a context's sockets."""
        if self._server is None:
            return
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        for right in Right:
            self._authenticator.configure_curve_callback(domain=right.value, credentials_provider=self)

    def stop(self) -> None:
        """End the thread that answers."""
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None

    def callback(self, domain: str, key: bytes) -> bool:
        """Tell pyzmq's authenticator whether a client may use the sockets of a domain."""
        client = self._clients.get(key)
        return client is not None and Right(domain) in client.rights

    def protect(self, socket: zmq.Socket[bytes], right: Right, *, encrypted: bool) -> None:
        """Set the options that the next `bind` takes over."""
        if self._server is None:
            return
        # Over ipc the authenticator lets everyone in who may open the socket's file.
        socket.setsockopt(zmq.CURVE_SERVER, int(encrypted))
        socket.setsockopt(zmq.ZAP_DOMAIN, right.value.encode())
        if encrypted:
            socket.curve_publickey, socket.curve_secretkey = self._server

    def install(self, clients: dict[bytes, Client]) -> bool:
        """Take clients over; True when one has lost a right, so that its connections must end."""
        before, self._clients = self._clients, clients
        return any(
            key not in self._clients or client.rights - self._clients[key].rights for key, client in before.items()
        )

    def read(self) -> dict[bytes, Client]:
        """Read the clients by their public keys. Raises KeysError."""
        return {} if self._folder is None else {client.public: client for client in self._folder.clients()}
