"""Free TCP ports for stations that we start ourselves."""

from __future__ import annotations

import socket


def free_ports(count: int) -> list[int]:
    """Find different ports that nobody listens on now."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
