"""Endpoints: bound with the keys that they ask for, and with an error that names them."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import AF_UNIX
from socket import socket as stream_socket

import zmq

from daemon.keys import Right, Security
from daemon.replies import MAX_REQUEST_BYTES

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]
_LINGER_MS = 2000
_KEEPALIVE = {
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 10,
    zmq.TCP_KEEPALIVE_INTVL: 5,
    zmq.TCP_KEEPALIVE_CNT: 4,
}
"""A client whose network fell silent is let go after 30 s, with what was kept for it.

ZeroMQ's heartbeats would take one that reads slowly for silent.
"""
_FREE_AGAIN_S = 0.5
_SOCKET_MODE = 0o660
"""Of ipc sockets: for the service's own user and group."""


class EndpointError(Exception):
    """An endpoint cannot be bound or connected; the message names it and says why."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A socket that is wanted, and where."""

    key: str
    """Of the configuration, for error messages."""
    kind: int
    endpoints: Sequence[str]
    right: Right
    options: Mapping[zmq.SocketOption, int]
    """ZeroMQ's socket options beside those that every socket has."""


@contextmanager
def bound(
    context: Context, security: Security, wanted: Sequence[Bound], ready: Future[None]
) -> Iterator[list[Socket]]:
    """Open sockets for as long as a thread serves them.

    Args:
        context: shared with the thread that authenticates clients.
        security: keys that the sockets ask for.
        wanted: in the order in which they are returned.
        ready: done once all are bound, the first time; holds the exception when one could not be.
    """
    sockets: list[Socket] = []
    try:
        try:
            for each in wanted:
                sockets.append(context.socket(each.kind))
                for option, value in each.options.items():
                    sockets[-1].setsockopt(option, value)
                _bind(sockets[-1], each, security)
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
            raise
        if not ready.done():
            ready.set_result(None)
        yield sockets
    finally:
        for socket in sockets:
            socket.close()


def _bind(socket: Socket, wanted: Bound, security: Security) -> None:
    """Bind a socket to all its endpoints, with CURVE on TCP where keys are configured. Raises EndpointError."""
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)  # of requests and of subscriptions
    socket.setsockopt(zmq.IPV6, any("[" in endpoint for endpoint in wanted.endpoints))
    for option, value in _KEEPALIVE.items():
        socket.setsockopt(option, value)
    for endpoint in wanted.endpoints:
        path = _ipc_path(endpoint)
        security.protect(socket, wanted.right, encrypted=path is None)
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            _bind_patiently(socket, endpoint, path)
            if path is not None:
                path.chmod(_SOCKET_MODE)
        except zmq.ZMQError as error:
            hint = "; another station or program has it: choose another one" * (error.errno == errno.EADDRINUSE)
            raise EndpointError(f"{wanted.key}: cannot bind {endpoint}: {error.strerror}{hint}") from error
        except OSError as error:
            raise EndpointError(f"{wanted.key}: cannot bind {endpoint}: {error}") from error


def _bind_patiently(socket: Socket, endpoint: str, path: Path | None) -> None:
    """Bind; an address that our own closing socket still holds is free again in a moment."""
    deadline_s = time.monotonic() + _FREE_AGAIN_S
    while True:
        try:
            if path is not None and _is_served(path):  # ZeroMQ would take the file away from whoever has it
                raise zmq.ZMQError(errno.EADDRINUSE)
            socket.bind(endpoint)
            return
        except zmq.ZMQError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline_s:
                raise
        time.sleep(_FREE_AGAIN_S / 50)


def _is_served(path: Path) -> bool:
    """Tell whether anyone accepts connections at a local socket's file."""
    with stream_socket(AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) in (0, errno.EAGAIN)  # EAGAIN: so many wait already


def _ipc_path(endpoint: str) -> Path | None:
    """Return the file of an ipc endpoint; None for others."""
    return Path(endpoint.removeprefix("ipc://")) if endpoint.startswith("ipc://") else None
