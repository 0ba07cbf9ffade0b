"""Tell systemd how the service is (sd_notify(3)): READY, STOPPING, RELOADING, WATCHDOG."""

from __future__ import annotations

import os
import socket


class Notifier:
    """Send state to the socket that systemd names in NOTIFY_SOCKET; silent where there is none."""

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        # A name that begins with @ lies in Linux's abstract namespace.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        self.failure: str | None = None
        """Why the last state could not be sent."""
        interval_us = int(os.environ.get("WATCHDOG_USEC", "0") or 0)
        same_process = os.environ.get("WATCHDOG_PID") in (None, str(os.getpid()))
        self.watchdog_s: float | None = interval_us / 1e6 if interval_us > 0 and same_process else None
        """Seconds within which systemd wants a WATCHDOG=1; None without a watchdog."""

    def send(self, state: str) -> None:
        """Send one state line. A socket that is gone is remembered in `failure`: parts are judged without it."""
        if self._socket is not None:
            try:
                self._socket.sendto(state.encode(), self._address)
                self.failure = None
            except OSError as error:
                self.failure = f"NOTIFY_SOCKET {self._address!r}: {error.strerror}"

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
