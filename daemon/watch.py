"""`inspectord watch`: verdicts as they come, as a live table on a terminal and as lines elsewhere."""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Iterator

import msgspec
import zmq
from rich.console import Console
from rich.live import Live
from rich.table import Table

from daemon.messages import VerdictMessage
from daemon.sockets import EndpointError

_SHOWN = 20
_COLOURS = {"OK": "green", "NG": "bold red", "INVALID": "bold yellow"}


def receive_verdicts(endpoint: str, station: str | None = None) -> Iterator[VerdictMessage]:
    """Yield verdicts from a PUB endpoint for ever. Raises EndpointError when the endpoint makes no sense."""
    topic = f"verdict/{station}/" if station else "verdict/"
    decoder = msgspec.json.Decoder(VerdictMessage)
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.IPV6, "[" in endpoint)
        socket.subscribe(topic.encode())
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise EndpointError(f"cannot connect to {endpoint}: {error.strerror}") from error
        while True:
            yield decoder.decode(socket.recv_multipart()[1])


def verdict_line(verdict: VerdictMessage) -> str:
    """Write a verdict as one line of text."""
    score = "      –" if verdict.score is None else f"{verdict.score:7.3f}"
    ms = verdict.latency_us.total / 1000
    return (
        f"{verdict.station} {verdict.sequence:>6}  {verdict.verdict:<7} {verdict.reason or '':<10} "
        f"score {score} / {verdict.threshold:.3f}  {ms:8.1f} ms  {verdict.source}"
    )


def watch_verdicts(endpoint: str, station: str | None, count: int | None) -> None:
    """Show verdicts until Ctrl-C, or until `count` of them have come."""
    if not sys.stdout.isatty():
        for number, verdict in enumerate(receive_verdicts(endpoint, station), 1):
            print(verdict_line(verdict), flush=True)  # noqa: T201 - this is the command's output
            if number == count:
                return
    latest: deque[VerdictMessage] = deque(maxlen=_SHOWN)
    totals: Counter[str] = Counter()
    with Live(_table(endpoint, latest, totals), console=Console(), auto_refresh=False) as live:
        for verdict in receive_verdicts(endpoint, station):
            latest.append(verdict)
            totals[verdict.verdict] += 1
            live.update(_table(endpoint, latest, totals), refresh=True)
            if totals.total() == count:
                return


def _table(endpoint: str, latest: deque[VerdictMessage], totals: Counter[str]) -> Table:
    seen = ", ".join(f"{totals[word]} {word}" for word in _COLOURS)
    table = Table(title=f"{endpoint}   {seen}", title_justify="left")
    for name in ("station", "sequence", "verdict", "reason", "score", "threshold", "regions", "ms", "source"):
        right = name in ("sequence", "score", "threshold", "regions", "ms")
        table.add_column(name, justify="right" if right else "left")
    for v in latest:
        table.add_row(
            v.station,
            str(v.sequence),
            f"[{_COLOURS.get(v.verdict, 'white')}]{v.verdict}[/]",
            v.reason or "",
            "" if v.score is None else f"{v.score:.3f}",
            f"{v.threshold:.3f}",
            str(len(v.regions)),
            f"{v.latency_us.total / 1000:.1f}",
            v.source,
        )
    return table
