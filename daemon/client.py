"""A client for any Python program: verdicts without a gap, and commands. Needs pyzmq only.

Example:
    for verdict in Subscription("tcp://127.0.0.1:5550", "tcp://127.0.0.1:5552", "line1"):
        print(verdict["sequence"], verdict["verdict"])
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import zmq
import zmq.auth

_RECONNECT_MS = 20
_HEARTBEAT_MS, _GONE_AFTER_MS = 1000, 3000
"""Without them a network that falls silent (power cut, switch) is never noticed by who only listens."""
_CONNECTED_WITHIN_MS = 3000
"""Else the operating system asks at ever longer intervals whether a network is back."""
_ANSWER_S = 2.0
"""After so long a request is sent again: the daemon may have been restarted in between."""
_LOOK_UP_MS = 100
_AHEAD = 100_000
"""Live verdicts that are kept while those before them are being asked for."""

Verdict = dict[str, Any]


class RequestFailed(Exception):
    """The daemon refused a request, or did not answer; the message says which and why."""


@dataclass(frozen=True)
class ClientKeys:
    """CURVE keys of one client, Z85."""

    public: bytes
    secret: bytes
    server: bytes
    """The daemon's public key."""

    @classmethod
    def read(cls, secret_file: Path, server: str) -> ClientKeys:
        """Read a file made by `inspectord keys create`. Raises OSError or ValueError."""
        public, secret = zmq.auth.load_certificate(secret_file)
        if secret is None:
            raise ValueError(f"{secret_file} holds no secret key")
        return cls(public, secret, server.encode())


def connected(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, endpoint: str, keys: ClientKeys | None
) -> zmq.Socket[bytes]:
    """Connect a socket of any kind to a daemon. Raises RequestFailed when the endpoint makes no sense."""
    _check_access(endpoint)
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    if kind == zmq.DEALER:
        # Requests go to a daemon that is there; they do not wait for one that comes back and obeys them then.
        socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECTED_WITHIN_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _GONE_AFTER_MS)
    socket.setsockopt(zmq.IPV6, "[" in endpoint)
    try:
        if keys is not None and not endpoint.startswith("ipc://"):
            socket.curve_serverkey = keys.server
            socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise RequestFailed(f"cannot connect to {endpoint}: {error.strerror}") from error
    return socket


def _check_access(endpoint: str) -> None:
    """Say at once what ZeroMQ would try again for ever."""
    path = Path(endpoint.removeprefix("ipc://"))
    if not endpoint.startswith("ipc://"):
        return
    try:
        if not path.exists() or os.access(path, os.W_OK):
            return
        group = path.group()
    except (PermissionError, KeyError):  # of a folder above it, or of a group without a name
        group = "that it belongs to"
    raise RequestFailed(f"no right to use {path}: be root, or a member of the group {group}")


class Subscription:
    """Every verdict of one station from `start` on, in order, each once, over reconnects and restarts.

    Iterating waits for ever; `next_verdict` waits as long as it is told. Numbers that neither journal nor memory of
    the daemon holds any more are listed in `missing`.
    """

    def __init__(
        self,
        verdicts: str,
        replay: str,
        station: str,
        *,
        start: int | Literal["last", "live"] = "last",
        keys: ClientKeys | None = None,
    ) -> None:
        """Connect.

        Args:
            verdicts: endpoint of the live messages.
            replay: endpoint of the replay socket.
            station: its name.
            start: a sequence number, "last" (the newest verdict at once, then what follows), or "live".
            keys: where the daemon asks for them.

        Raises RequestFailed when an endpoint makes no sense, and ValueError when `start` does not.
        """
        if isinstance(start, int) and start < 1:
            raise ValueError(f"start is {start}; numbers begin with 1")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._verdict_topic = f"verdict/{station}/".encode()
        self._health_topic = f"health/{station}/".encode()
        try:
            self._live = connected(self._context, zmq.SUB, verdicts, keys)
            self._replay = connected(self._context, zmq.DEALER, replay, keys)
        except RequestFailed:
            self._context.destroy(linger=0)
            raise
        self._live.subscribe(self._verdict_topic)
        self._live.subscribe(self._health_topic)
        self._poller = zmq.Poller()
        self._poller.register(self._live, zmq.POLLIN)
        self._poller.register(self._replay, zmq.POLLIN)
        self._next = start if isinstance(start, int) else None
        """Number that comes next; None until the first is known."""
        self._ready: deque[Verdict] = deque()
        self._ahead: dict[int, Verdict] = {}
        """Live verdicts that came while those before them are being asked for."""
        self._request: tuple[str, float] | None = None
        self.missing: list[tuple[int, int]] = []
        self._boots: set[str] = set()
        """Of every verdict that was handed out."""
        self.boot: str | None = None
        """Of the last verdict; another one means that the daemon was restarted."""
        if start != "live":
            self._ask()

    def __iter__(self) -> Iterator[Verdict]:
        """Yield verdicts for ever."""
        while True:
            verdict = self.next_verdict(None)
            if verdict is not None:
                yield verdict

    def next_verdict(self, timeout_s: float | None) -> Verdict | None:
        """Return the next verdict; None when there is none within `timeout_s` (None: wait for ever)."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._ready:
            left_ms = _LOOK_UP_MS
            if deadline_s is not None:
                left_ms = min(left_ms, max(0, int((deadline_s - time.monotonic()) * 1000)))
            for socket, _ in self._poller.poll(left_ms):
                if socket is self._live:
                    self._take_live()
                else:
                    self._take_replay()
            if self._request is not None and time.monotonic() - self._request[1] > _ANSWER_S:
                self._ask()
            if left_ms == 0 and not self._ready:
                return None
        verdict = self._ready.popleft()
        self.boot = verdict["boot"]
        return verdict

    def close(self) -> None:
        """Disconnect; to be called by the thread that reads."""
        self._context.destroy(linger=0)

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_live(self) -> None:
        topic, body, *_ = self._live.recv_multipart()
        message = json.loads(body)
        if topic == self._verdict_topic:
            sequence = message["sequence"]
            if message["boot"] not in self._boots and self._next is not None and sequence < self._next:
                self._next = sequence  # after a power cut numbers repeat, under another boot
            if self._next is None and self._request is None:
                self._next = sequence
            if len(self._ahead) < _AHEAD:  # more than that are asked for again
                self._ahead[sequence] = message
            self._deliver()
            if self._next is not None and sequence > self._next:
                self._ask_once()
        elif topic == self._health_topic and self._next is not None and message["last_sequence"] >= self._next:
            self._ask_once()  # the last one before an idle time was lost on its way

    def _take_replay(self) -> None:
        head, *bodies = self._replay.recv_multipart()
        reply = json.loads(head)
        if self._request is None or reply["id"] != self._request[0]:
            return  # the answer to a question that was asked again
        if not reply["ok"]:
            self._request = (self._request[0], time.monotonic())  # busy, or no journal now: ask again later
            return
        verdicts = [json.loads(body) for body in bodies]
        if self._next is None:
            self._next = verdicts[0]["sequence"] if verdicts else reply["next"]
        self._ahead.update((verdict["sequence"], verdict) for verdict in verdicts)
        self._deliver(gone=reply["missing"])
        self._request = (self._request[0], time.monotonic()) if reply["more"] else None
        if self._request is None and self._ahead:
            self._ask_once()

    def _deliver(self, gone: Sequence[tuple[int, int]] = ()) -> None:
        """Hand out what follows without a gap, or with one that is said to stay: `gone`, first and last numbers."""
        while self._next is not None:
            wanted = self._next
            verdict = self._ahead.pop(wanted, None)
            if verdict is not None:
                self._ready.append(verdict)
                self._boots.add(verdict["boot"])
                self._next += 1
                continue
            end = next((last for first, last in gone if first <= wanted <= last), None)
            if end is None:
                break
            # The daemon may have lost what we were sent, in a restart without a journal.
            self._next = min((number for number in self._ahead if wanted < number <= end), default=end + 1)
            self.missing.append((wanted, self._next - 1))
        if self._next is not None:
            self._ahead = {number: verdict for number, verdict in self._ahead.items() if number >= self._next}

    def _ask_once(self) -> None:
        if self._request is None:
            self._ask()

    def _ask(self) -> None:
        request_id = uuid.uuid4().hex
        wanted = {} if self._next is None else {"from": self._next}
        body = json.dumps({"id": request_id, "replay": wanted}).encode()
        asked_s = time.monotonic()
        try:
            self._replay.send_multipart([body], flags=zmq.DONTWAIT)
        except zmq.Again:  # not connected now: tried again at the next look
            asked_s -= _ANSWER_S
        self._request = (request_id, asked_s)


class Control:
    """Sends commands to one station. Not for several threads at once."""

    def __init__(self, endpoint: str, keys: ClientKeys | None = None) -> None:
        """Connect. Raises RequestFailed when the endpoint makes no sense."""
        self._endpoint = endpoint
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._socket = connected(self._context, zmq.DEALER, endpoint, keys)
        except RequestFailed:
            self._context.destroy(linger=0)
            raise

    def request(
        self, command: str, timeout_s: float = 60.0, connect_s: float = 10.0, **arguments: Any
    ) -> tuple[dict[str, Any], bytes | None]:
        """Send a command; return its result and what came with it.

        Args:
            command: such as `status`.
            timeout_s: until there must be an answer.
            connect_s: of that, until a daemon that runs must have taken the connection.
            arguments: of the command.

        Raises RequestFailed.
        """
        request_id = str(arguments.pop("id", None) or uuid.uuid4().hex)
        body = json.dumps({"id": request_id, "command": command, **arguments}).encode()
        deadline_s = time.monotonic() + timeout_s
        while self._socket.poll(0):  # answers to questions that nobody waits for any more
            self._socket.recv_multipart()
        self._socket.poll(int(min(timeout_s, connect_s) * 1000), zmq.POLLOUT)
        try:
            self._socket.send_multipart([body], flags=zmq.DONTWAIT)
        except zmq.Again:
            raise RequestFailed(
                f"no answer from {self._endpoint}: nobody takes it; does the daemon run, and ask for keys?"
            ) from None
        while (left_s := deadline_s - time.monotonic()) > 0:
            if not self._socket.poll(int(left_s * 1000) + 1):
                break
            head, *more = self._socket.recv_multipart()
            reply = json.loads(head)
            if reply["id"] != request_id:
                continue
            if not reply["ok"]:
                raise RequestFailed(reply["error"])
            return reply["result"], more[0] if more else None
        raise RequestFailed(f"no answer from {self._endpoint} within {timeout_s:g} s, though it took the request")

    def close(self) -> None:
        """Disconnect."""
        self._context.destroy(linger=0)

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
