"""The server thread: owns the ROUTER sockets for control and replay."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import structlog
import zmq

from daemon.journal import JournalError
from daemon.keys import Right, Security
from daemon.messages import encode
from daemon.replies import (
    LATER,
    BadRequest,
    Command,
    Replay,
    ReplayReply,
    Reply,
    id_of,
    read_command,
    read_replay,
)
from daemon.sockets import Bound, Context, Socket, bound

_POLL_MS = 50
_BUSY_POLL_MS = 5
_PIECE = 256
"""Verdicts in one message of a replay."""
_REPLAYS_AT_ONCE = 8
_ANSWERS_AT_ONCE = 32
_LAST_ANSWERS_S = 0.5
"""How long the sockets stay open, once they should close, for answers that are still to come."""
_CLOSING = "the connection is closing, or the daemon is stopping; ask again"
_READ_WITHIN_S = 0.1
"""ZeroMQ throws away what a client with ZMQ_IMMEDIATE has not read when its connection ends."""
_ANSWERED_WITHIN_S = 300.0
"""A snapshot of a line that stands still, a reload that hangs: nobody waits longer."""
_REQUESTS_A_TURN = 64
_ANSWERS_UNREAD = 2 * _REQUESTS_A_TURN
"""Answers kept for a client that does not read them; what comes after them it never gets."""
_PIECES_UNREAD = 4
"""Pieces of a replay kept for a client that reads slowly; the others wait where they are."""


class Refused(Exception):
    """A command that cannot be carried out; the message says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command gave."""

    result: dict[str, Any] = field(default_factory=dict)
    attachment: bytes | None = None


class Controls(Protocol):
    """What the daemon lets its clients do."""

    def carry_out(self, command: Command) -> Answer | Future[Answer]:
        """Do what a command says, at once or later. Raises Refused."""
        ...

    def last_published(self) -> int:
        """Return the last number that was published; 0 before the first."""
        ...

    def verdicts(self, first: int, last: int) -> Iterator[tuple[int, bytes]]:
        """Yield the published verdicts of a range that can still be had. Raises JournalError."""
        ...


@dataclass(frozen=True, slots=True)
class _Awaited:
    route: list[bytes]
    id: str
    answer: Future[Answer]
    until_s: float


@dataclass(slots=True)
class _Stream:
    route: list[bytes]
    id: str
    next: int
    last: int | None
    """Last number wanted; None: up to the present."""
    unsent: list[bytes] | None = None
    """A piece that the client has no room for yet."""
    more: bool = True
    """Another piece follows the one that was made last."""
    sent_s: float = field(default_factory=time.monotonic)
    """When the client last took a piece, or asked."""


class Serving:
    """Answer requests; whatever comes in, the line is not disturbed."""

    def __init__(
        self,
        control: Sequence[str],
        replay: Sequence[str],
        *,
        context: Context,
        security: Security,
        controls: Controls,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        answers, pieces = (
            {zmq.ROUTER_MANDATORY: 1, zmq.SNDHWM: most} for most in (_ANSWERS_UNREAD, _PIECES_UNREAD)
        )
        self._wanted = (
            Bound("control.endpoints", zmq.ROUTER, control, Right.CONTROL, answers),
            Bound("publish.replay", zmq.ROUTER, replay, Right.REPLAY, pieces),
        )
        self._context = context
        self._security = security
        self._controls = controls
        self._log = log
        self._rebind, self._end = threading.Event(), threading.Event()
        self._streams: deque[_Stream] = deque()
        self._awaited: list[_Awaited] = []
        self._answered_s = -math.inf
        self.ready: Future[None] = Future()
        """Done when every endpoint is bound; holds the exception when one could not be."""

    def rebind(self) -> None:
        """Close every connection and let the clients come back, so that revoked keys end."""
        self._rebind.set()

    def end(self) -> None:
        """Close the sockets and end."""
        self._end.set()

    def run(self) -> None:
        """Bind and serve until `end`."""
        while not self._end.is_set():
            self._rebind.clear()
            self._streams.clear()
            with bound(self._context, self._security, self._wanted, self.ready) as (control, replay):
                self._serve(control, replay)

    def _serve(self, control: Socket, replay: Socket) -> None:
        poller = zmq.Poller()
        poller.register(control, zmq.POLLIN)
        poller.register(replay, zmq.POLLIN)
        while not (self._end.is_set() or self._rebind.is_set()):
            poller.poll(_BUSY_POLL_MS if self._streams or self._awaited else _POLL_MS)
            for message in _received(control):
                self._command(control, message)
            for message in _received(replay):
                self._begin_replay(replay, message)
            self._send_answers(control)
            self._send_pieces(replay)
        self._send_last_answers(control)

    def _send_last_answers(self, control: Socket) -> None:
        """Answer whoever waits, above all for the reload that brings us here; nothing more is taken in."""
        wait([item.answer for item in self._awaited], _LAST_ANSWERS_S)
        for item in self._awaited:
            item.answer.cancel()
        self._send_answers(control)
        for item in self._awaited:  # what runs cannot be cancelled
            self._reply(control, item.route, Reply(item.id, ok=False, error=_CLOSING))
        self._awaited.clear()
        time.sleep(max(0.0, self._answered_s + _READ_WITHIN_S - time.monotonic()))

    def _command(self, socket: Socket, message: list[bytes]) -> None:
        route, body = message[:-1], message[-1]
        try:
            command = read_command(body)
            if isinstance(command, LATER) and len(self._awaited) >= _ANSWERS_AT_ONCE:
                raise Refused("too many requests wait for their answers; ask again later")
            answer = self._controls.carry_out(command)
        except (BadRequest, Refused) as error:
            self._reply(socket, route, Reply(id_of(body), ok=False, error=str(error)))
        else:
            if isinstance(answer, Future):
                self._awaited.append(_Awaited(route, command.id, answer, time.monotonic() + _ANSWERED_WITHIN_S))
            else:
                self._answer(socket, route, command.id, answer)

    def _send_answers(self, socket: Socket) -> None:
        now_s = time.monotonic()
        awaited, self._awaited = self._awaited, []
        for item in awaited:
            if not item.answer.done() and now_s < item.until_s:
                self._awaited.append(item)
                continue
            if not item.answer.done() or item.answer.cancelled():
                item.answer.cancel()
                gone = f"no answer within {_ANSWERED_WITHIN_S:g} s"
                late = now_s >= item.until_s
                self._reply(socket, item.route, Reply(item.id, ok=False, error=gone if late else _CLOSING))
            elif (error := item.answer.exception()) is not None:
                self._reply(socket, item.route, Reply(item.id, ok=False, error=str(error)))
            else:
                self._answer(socket, item.route, item.id, item.answer.result())

    def _answer(self, socket: Socket, route: list[bytes], request_id: str, answer: Answer) -> None:
        more = [] if answer.attachment is None else [answer.attachment]
        self._reply(socket, route, Reply(request_id, ok=True, result=answer.result), *more)

    def _reply(self, socket: Socket, route: list[bytes], reply: msgspec.Struct, *more: bytes) -> None:
        """Send; a client that is gone or does not read gets nothing."""
        try:
            socket.send_multipart([*route, encode(reply), *more], flags=zmq.DONTWAIT)
            self._answered_s = time.monotonic()
        except zmq.ZMQError as error:
            self._log.debug("a client was gone before its answer", error=error.strerror)

    def _begin_replay(self, socket: Socket, message: list[bytes]) -> None:
        route, body = message[:-1], message[-1]
        try:
            request = read_replay(body)
        except BadRequest as error:
            self._reply(socket, route, Reply(id_of(body), ok=False, error=str(error)))
            return
        # Who asks again has given up what he asked before.
        self._streams = deque(stream for stream in self._streams if stream.route != route)
        if len(self._streams) >= _REPLAYS_AT_ONCE:
            self._reply(
                socket, route, Reply(request.id, ok=False, error="too many replays at once; ask again later")
            )
            return
        self._streams.append(self._stream(route, request))

    def _stream(self, route: list[bytes], request: Replay) -> _Stream:
        present = self._controls.last_published()
        first = request.replay.first
        if first is None:  # only the last one
            return _Stream(route, request.id, max(1, present), present)
        return _Stream(route, request.id, first, request.replay.last)

    def _send_pieces(self, socket: Socket) -> None:
        for _ in range(len(self._streams)):
            stream = self._streams.popleft()
            try:
                finished = self._send_piece(socket, stream)
            except JournalError as error:
                self._reply(socket, stream.route, Reply(stream.id, ok=False, error=str(error)))
                finished = True
            except zmq.ZMQError as error:
                self._log.debug("a client was gone before its replay", error=error.strerror)
                finished = True
            if not finished:
                self._streams.append(stream)

    def _send_piece(self, socket: Socket, stream: _Stream) -> bool:
        """Send the next piece of a replay; True when it was the last one."""
        if stream.unsent is None:
            stream.unsent = self._next_piece(stream)
        try:
            socket.send_multipart([*stream.route, *stream.unsent], flags=zmq.DONTWAIT)
        except zmq.Again:
            # It reads slowly, and the next turn tries again; one that has stopped must not keep others from replay.
            return time.monotonic() - stream.sent_s > _ANSWERED_WITHIN_S
        stream.unsent, stream.sent_s = None, time.monotonic()
        return not stream.more

    def _next_piece(self, stream: _Stream) -> list[bytes]:
        present = self._controls.last_published()
        end = present if stream.last is None else min(stream.last, present)
        last = min(end, stream.next + _PIECE - 1)
        bodies: list[bytes] = []
        missing: list[list[int]] = []
        wanted = stream.next
        for sequence, body in self._controls.verdicts(stream.next, last):
            if sequence > wanted:
                missing.append([wanted, sequence - 1])
            bodies.append(body)
            wanted = sequence + 1
        if wanted <= last:
            missing.append([wanted, last])
        stream.next = max(stream.next, last + 1)
        stream.more = stream.next <= end
        head = ReplayReply(
            stream.id, ok=True, verdicts=len(bodies), missing=missing, more=stream.more, next=stream.next
        )
        return [encode(head), *bodies]


def _received(socket: Socket) -> Iterator[list[bytes]]:
    """Take what has come, but not so much at once that other clients wait."""
    for _ in range(_REQUESTS_A_TURN):
        try:
            message = socket.recv_multipart(flags=zmq.DONTWAIT)
        except zmq.Again:
            return
        if len(message) >= 2:  # the client's identity, and what it says
            yield message
