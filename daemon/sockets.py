"""Endpoints: bound with the keys that they ask for, and with an error that names them."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from pathlib import Path

import zmq

from daemon.keys import Right, Security

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]
LINGER_MS = 2000
_FREE_AGAIN_S = 0.5
_SOCKET_MODE = 0o660
"""Of ipc sockets: for the service's own user and group."""


class EndpointError(Exception):
    """An endpoint cannot be bound or connected; the message names it and says why."""


def bind(socket: Socket, endpoints: Sequence[str], security: Security, right: Right) -> None:
    """Bind a socket to all its endpoints, with CURVE on TCP where keys are configured. Raises EndpointError."""
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.IPV6, any("[" in endpoint for endpoint in endpoints))
    for endpoint in endpoints:
        path = ipc_path(endpoint)
        security.protect(socket, right, encrypted=path is None)
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            _bind_patiently(socket, endpoint)
            if path is not None:
                path.chmod(_SOCKET_MODE)
        except zmq.ZMQError as error:
            raise EndpointError(f"cannot bind {endpoint}: {error.strerror}") from error
        except OSError as error:
            raise EndpointError(f"cannot bind {endpoint}: {error}") from error


def _bind_patiently(socket: Socket, endpoint: str) -> None:
    """Bind; an address that our own closing socket still holds is free again in a moment."""
    deadline_s = time.monotonic() + _FREE_AGAIN_S
    while True:
        try:
            socket.bind(endpoint)
            return
        except zmq.ZMQError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline_s:
                raise
        time.sleep(_FREE_AGAIN_S / 50)


def ipc_path(endpoint: str) -> Path | None:
    """Return the file of an ipc endpoint; None for others."""
    return Path(endpoint.removeprefix("ipc://")) if endpoint.startswith("ipc://") else None
