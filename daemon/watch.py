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

from daemon.client import ClientKeys, connected
from daemon.messages import VerdictMessage

_SHOWN = 20
_SILENT_MS = 5000
"""Health comes every second."""
_COLOURS = {"OK": "green", "NG": "bold red", "INVALID": "bold yellow"}


def receive_verdicts(
    endpoint: str, station: str | None = None, keys: ClientKeys | None = None
) -> Iterator[VerdictMessage]:
    """Yield verdicts from a PUB endpoint for ever; a silence is said once. Raises RequestFailed."""
    topics = [f"{kind}/{station}/" if station else f"{kind}/" for kind in ("verdict", "health")]
    decoder = msgspec.json.Decoder(VerdictMessage)
    heard = False
    with zmq.Context() as context, connected(context, zmq.SUB, endpoint, keys) as socket:
        for topic in topics:
            socket.subscribe(topic.encode())
        while True:
            if not heard and not socket.poll(_SILENT_MS):
                print(  # noqa: T201 - this is the command's output
                    f"nothing heard from {endpoint} so far: does the daemon run, publish there"
                    + (", and know this key?" if keys else ", and ask for keys (--secret, --server-key)?"),
                    file=sys.stderr,
                    flush=True,
                )
            heard = True
            kind, body, *_ = socket.recv_multipart()
            if kind.startswith(b"verdict/"):
                yield decoder.decode(body)


def verdict_line(verdict: VerdictMessage) -> str:
    """Write a verdict as one line of text."""
    score = "      –" if verdict.score is None else f"{verdict.score:7.3f}"
    ms = verdict.latency_us.total / 1000
    return (
        f"{verdict.station} {verdict.sequence:>6}  {verdict.verdict:<7} {verdict.reason or '':<10} "
        f"score {score} / {verdict.threshold:.3f}  {ms:8.1f} ms  {verdict.source}"
    )


def watch_verdicts(endpoint: str, station: str | None, count: int | None, keys: ClientKeys | None = None) -> None:
    """Show verdicts until Ctrl-C, or until `count` of them have come."""
    if not sys.stdout.isatty():
        for number, verdict in enumerate(receive_verdicts(endpoint, station, keys), 1):
            print(verdict_line(verdict), flush=True)  # noqa: T201 - this is the command's output
            if number == count:
                return
    latest: deque[VerdictMessage] = deque(maxlen=_SHOWN)
    totals: Counter[str] = Counter()
    with Live(_table(endpoint, latest, totals), console=Console(), auto_refresh=False) as live:
        for verdict in receive_verdicts(endpoint, station, keys):
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
