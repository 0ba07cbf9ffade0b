"""`inspectord bench soak`: a station under faults for as long as one likes, and the proof that nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
import zmq

from daemon.client import Control, RequestFailed, Subscription, Verdict
from daemon.events import EventKind
from daemon.faults import Fault, Faults
from daemon.journal import Query, read_journal
from daemon.ports import free_ports
from daemon.sequence import SequenceFile
from pipeline.machine import describe_machine

_HANG_S = 1.0
_DEADLINE_MS = 400.0
_RATE_FPS = 25.0
_RECOVERED_WITHIN_S = 60.0
_STARTS_WITHIN_S = 120.0
_DISK_FULL_S = 0.5
_SLOW_DISK_S = 0.5
_ON_THE_WAY_S = 0.1
_STATION = "soak"
_SMALL_FILE_BYTES = 4096
"""RLIMIT_FSIZE of the daemon while its disk is full: writes beyond it fail with EFBIG."""


class SoakFailed(Exception):
    """A promise was broken, or the station did not come back; the message says which."""


@dataclass
class SoakResult:
    """What was injected and what came of it."""

    faults: Counter[str] = field(default_factory=Counter)
    recovery_ms: dict[str, list[float]] = field(default_factory=dict)
    """From the order of a fault to the next verdict that is OK or NG."""
    verdicts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    last_sequence: int = 0
    lost: int = 0
    double: int = 0
    unjournaled: int = 0
    late: Counter[str] = field(default_factory=Counter)
    """Verdicts that went out after their deadline, by their own `latency_us.total`, and the fault before them."""
    disordered: int = 0
    """Verdicts that were sent after one with a higher number."""
    ended: list[str] = field(default_factory=list)
    """How the process ended where nobody had killed it, and the fault before that."""
    invariants: int = 0
    """Events that say of the daemon's own arithmetic that it does not hold."""
    boots: set[str] = field(default_factory=set)
    duration_s: float = 0.0
    rss_mib: list[float] = field(default_factory=list)
    """Resident memory of the present process after each fault."""
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    longest: dict[str, list[float] | list[int]] = field(default_factory=dict)
    """The three of the process that was looked at most often."""

    def next_process(self) -> None:
        """Begin to look at another process."""
        self._keep_longest()
        for seen in (self.rss_mib, self.descriptors, self.threads):
            seen.clear()

    def _keep_longest(self) -> None:
        if len(self.rss_mib) > len(self.longest.get("rss_mib", [])):
            rss_mib = [round(value, 1) for value in self.rss_mib]
            self.longest = {"rss_mib": rss_mib, "descriptors": [*self.descriptors], "threads": [*self.threads]}

    def to_json(self) -> dict[str, Any]:
        """Return `{"machine": …, "results": […]}`, as every bench does."""
        self._keep_longest()
        rows = [
            {
                "fault": name,
                "injected": count,
                "median_recovery_ms": round(statistics.median(self.recovery_ms[name])),
            }
            for name, count in sorted(self.faults.items())
        ]
        totals = {
            "duration_s": round(self.duration_s, 1),
            "verdicts": self.last_sequence,
            "lost": self.lost,
            "double": self.double,
            "outcomes": dict(self.verdicts),
            "reasons": dict(self.reasons),
            "unjournaled": self.unjournaled,
            "late": dict(self.late),
            "disordered": self.disordered,
            "ended": self.ended,
            "invariants": self.invariants,
            "boots": len(self.boots),
            "longest_process": self.longest,
        }
        return {"machine": describe_machine(), "results": rows, "totals": totals}


class SoakLine:
    """One station as a process, with a client that must miss nothing."""

    def __init__(self, folder: Path, model: Path, camera: dict[str, Any] | None = None, **config: Any) -> None:
        """Write the configuration; nothing runs yet.

        Args:
            folder: for state, configuration and log.
            model: bundle.
            camera: instead of the simulated line.
            config: further keys of the configuration.
        """
        self.folder = folder
        self.orders = folder / "orders"
        self.orders.mkdir(parents=True, exist_ok=True)
        self.faults = Faults(self.orders, _HANG_S)
        verdicts, maps, replay = (f"tcp://127.0.0.1:{port}" for port in free_ports(3))
        line = {
            "driver": "synthetic",
            "width": 96,
            "height": 96,
            "seed": 3,
            "rate_fps": _RATE_FPS,
            "first_index": 0,
        }
        self.config: dict[str, Any] = {
            "station": _STATION,
            "camera": camera or {**line, "faults": {"incomplete": 0.01, "lost": 0.01, "unplugged": 0.002}},
            "model": str(model),
            "publish": {"verdicts": verdicts, "maps": maps, "replay": replay},
            "on_overload": "invalid",
            "threads": 1,
            "state_dir": str(folder / "state"),
            "verdict": {"deadline_ms": _DEADLINE_MS},
            "supervision": {"hang_s": _HANG_S},
            "images": {"quota_mib": 4, "reserve_mib": 0},
            **config,
        }
        self.path = folder / "station.yaml"
        self.write()
        self.journal = folder / "state" / _STATION / "journal.sqlite"
        self.control_endpoint = f"ipc://{self.journal.parent.absolute() / 'control.sock'}"
        self.process: subprocess.Popen[bytes] | None = None
        self.subscription = Subscription(verdicts, replay, _STATION, start=1)
        self.endpoints = [verdicts, maps, replay]
        # Beside the client, which drops what it has seen: what was really sent, and sent twice.
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._raw = self._context.socket(zmq.SUB)
        self._raw.setsockopt(zmq.RCVHWM, 0)
        self._raw.setsockopt(zmq.RECONNECT_IVL, 20)
        self._raw.connect(verdicts)
        self._raw.subscribe(b"verdict/")
        self._raw.subscribe(b"event/")
        self._sent: set[int] = set()
        self._highest = 0
        self._received: dict[int, tuple[str, str | None]] = {}
        """Verdict and reason of each number."""
        self.result = SoakResult()
        self._expected = 1
        self.after = "start"
        """The last fault that was injected."""
        self._began_s = time.monotonic()

    def write(self, **changes: Any) -> None:
        """Write the configuration, changed for the next reload or start."""
        self.path.write_text(yaml.safe_dump({**self.config, **changes}, sort_keys=False))

    def start(self) -> None:
        """Start the process; its log is appended to `daemon.log`."""
        self.result.next_process()
        if "first_index" in self.config["camera"]:  # its own faults follow from the index: others than before
            self.config["camera"]["first_index"] = self.result.last_sequence
            self.write()
        with (self.folder / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "daemon.faults", "-c", str(self.path), str(self.orders)],
                stdout=log,
                stderr=log,
            )

    @property
    def pid(self) -> int:
        """Id of the running process."""
        if self.process is None:
            raise SoakFailed("the station was not started")
        return self.process.pid

    def receive(self, timeout_s: float) -> Verdict | None:
        """Take the next verdict and hold it against the promise."""
        verdict = self.subscription.next_verdict(timeout_s)
        self._take_raw()
        if verdict is None:
            return None
        result, sequence = self.result, verdict["sequence"]
        result.double += sequence < self._expected
        result.lost += max(0, sequence - self._expected)
        self._expected = max(self._expected, sequence + 1)
        result.last_sequence = sequence
        self._received[sequence] = verdict["verdict"], verdict["reason"]
        result.verdicts[verdict["verdict"]] += 1
        if verdict["reason"] is not None:
            result.reasons[verdict["reason"]] += 1
        result.unjournaled += not verdict["journaled"]
        if verdict["reason"] != "restart" and verdict["latency_us"]["total"] > _DEADLINE_MS * 1000:
            result.late[self.after] += 1
        result.boots.add(verdict["boot"])
        return verdict

    def _take_raw(self) -> None:
        while self._raw.poll(0):
            topic, body, *_ = self._raw.recv_multipart()
            message = json.loads(body)
            if topic.startswith(b"event/"):
                self.result.invariants += message["event"] == EventKind.INVARIANT.value
                continue
            sequence = message["sequence"]
            self.result.double += sequence in self._sent
            self.result.disordered += sequence < self._highest
            self._sent.add(sequence)
            self._highest = max(self._highest, sequence)

    def receive_until(self, condition: Callable[[Verdict], bool], within_s: float = _RECOVERED_WITHIN_S) -> Verdict:
        """Receive until a verdict meets a condition; a process that ended is started again, as systemd would."""
        deadline_s = time.monotonic() + within_s
        while time.monotonic() < deadline_s:
            if self.process is not None and (code := self.process.poll()) is not None:
                self.result.ended.append(f"{code} after {self.after}")
                self.start()
            verdict = self.receive(0.2)
            if verdict is not None and condition(verdict):
                return verdict
        raise SoakFailed(f"no such verdict within {within_s:g} s; see {self.folder / 'daemon.log'}")

    def look(self) -> None:
        """Note memory, descriptors and threads of the process."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
        values = dict(line.split(":", 1) for line in status)
        self.result.rss_mib.append(int(values["VmRSS"].split()[0]) / 1024)
        self.result.threads.append(int(values["Threads"]))
        self.result.descriptors.append(len(list(Path(f"/proc/{self.pid}/fd").iterdir())))

    def stop(self) -> None:
        """End the process as systemd would, and take what it still had."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGTERM)
        deadline_s = time.monotonic() + _RECOVERED_WITHIN_S
        while self.process.poll() is None and time.monotonic() < deadline_s:
            self.receive(0.1)
        while self.receive(0.5) is not None:
            pass
        if self.process.poll() is None:
            raise SoakFailed("the station did not end after SIGTERM")
        if self.process.returncode:
            raise SoakFailed(f"the station ended with {self.process.returncode} after SIGTERM")
        self.result.duration_s = time.monotonic() - self._began_s
        self.check_books()

    def check_books(self) -> None:
        """Hold what was received against the journal, and against the numbers that were given out."""
        written = {}
        for sequence, body in read_journal(self.journal, Query()):
            verdict = json.loads(body)
            written[sequence] = verdict["verdict"], verdict["reason"]
        if written != self._received:
            differ = sorted(n for n in written.keys() | self._received if written.get(n) != self._received.get(n))
            raise SoakFailed(f"journal and subscriber differ in {len(differ)} numbers, the first is {differ[0]}")
        with SequenceFile(self.journal.parent, lambda _error: None) as sequences:
            if left := sequences.without_verdict():
                raise SoakFailed(f"{len(left)} numbers have no verdict, the first is {left[0]}")

    def close(self) -> None:
        """Kill what still runs and disconnect."""
        self.result.duration_s = self.result.duration_s or time.monotonic() - self._began_s
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
        self.subscription.close()
        self._context.destroy(linger=0)


def _order(fault: Fault, line: SoakLine) -> None:
    line.faults.order(fault)


def _kill_9(line: SoakLine) -> None:
    os.kill(line.pid, signal.SIGKILL)
    if line.process is not None:
        line.process.wait()
    line.start()


def _stall(line: SoakLine) -> None:
    os.kill(line.pid, signal.SIGSTOP)
    time.sleep(_SLOW_DISK_S)
    os.kill(line.pid, signal.SIGCONT)


def _slow_disk(line: SoakLine) -> None:
    """Hold SQLite's write lock, as a disk that does not answer would."""
    with contextlib.closing(sqlite3.connect(line.journal, timeout=5, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        _receive_for(line, _SLOW_DISK_S)
        connection.execute("ROLLBACK")


def _full_disk(line: SoakLine) -> None:
    _, hard = resource.prlimit(line.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(line.pid, resource.RLIMIT_FSIZE, (_SMALL_FILE_BYTES, hard))
    _receive_for(line, _DISK_FULL_S)
    resource.prlimit(line.pid, resource.RLIMIT_FSIZE, (hard, hard))


def _receive_for(line: SoakLine, seconds: float) -> None:
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        line.receive(0.05)


def _stalled_subscriber(line: SoakLine) -> None:
    """Subscribe to everything and read nothing."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    subscriber = context.socket(zmq.SUB)
    subscriber.setsockopt(zmq.RCVHWM, 1)
    for endpoint in line.endpoints[:2]:
        subscriber.connect(endpoint)
    subscriber.subscribe(b"")
    _receive_for(line, 1.0)
    context.destroy(linger=0)


def _garbage(line: SoakLine) -> None:
    """Send what no client would to every TCP port, and to the control socket as messages."""
    generator = random.Random(line.result.last_sequence)
    for endpoint in line.endpoints:
        host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
        for blob in (b"GET / HTTP/1.1\r\n\r\n", generator.randbytes(50_000), b"\xff" + b"\0" * 8 + b"\x7f\x03\x01"):
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=2) as connection:
                connection.sendall(blob)  # libzmq may hang up before it has read it all
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    for endpoint in (line.control_endpoint, line.endpoints[2]):
        dealer = context.socket(zmq.DEALER)
        dealer.connect(endpoint)
        for body in (b"", b"\xff\xfe", b"{", b'{"command": "explode"}', generator.randbytes(60_000), b"[" * 10_000):
            dealer.send_multipart([body], flags=zmq.DONTWAIT)
        dealer.send_multipart([b"x"] * 50, flags=zmq.DONTWAIT)
        dealer.close(linger=500)
    context.term()


def _good_reload(line: SoakLine) -> None:
    """Take another threshold each time."""
    threshold = 0.5 + line.result.last_sequence % 1000 / 1000
    line.write(threshold=threshold)
    _ask_to_reload(line)
    line.write()
    line.receive_until(lambda verdict: verdict["threshold"] == threshold)


def _bad_reload(line: SoakLine) -> None:
    missing = line.folder / "no-bundle"
    line.write(model=str(missing))
    try:
        _ask_to_reload(line)
    except RequestFailed as error:
        if str(missing) not in str(error):
            raise SoakFailed(f"a bad reload was refused, but for another reason: {error}") from error
    else:
        raise SoakFailed("a bad reload was taken")
    finally:
        line.write()


def _ask_to_reload(line: SoakLine) -> None:
    with Control(line.control_endpoint) as control:
        control.request("reload", timeout_s=30)


_INJECTED: dict[str, Callable[[SoakLine], None]] = {
    **{fault.value: partial(_order, fault) for fault in Fault},
    "kill -9": _kill_9,
    "process stalls": _stall,
    "slow disk": _slow_disk,
    "full disk": _full_disk,
    "stalled subscriber": _stalled_subscriber,
    "garbage on every socket": _garbage,
    "good reload": _good_reload,
    "bad reload": _bad_reload,
}
FAULTS = tuple(_INJECTED)


def injections(line: SoakLine) -> dict[str, Callable[[], None]]:
    """Name everything that can be done to a line."""
    return {name: partial(inject, line) for name, inject in _INJECTED.items()}


def soak(
    line: SoakLine,
    minutes: float | None,
    frames: int | None,
    seed: int,
    pause_s: float,
    without: Collection[str] = (),
) -> Iterator[tuple[str, SoakResult]]:
    """Inject faults until the time or the frames are over; yields each fault's name when it is over.

    Raises SoakFailed when a number is lost, doubled or out of order, when the process ends by itself or does not
    recover, and when journal and subscriber differ.
    """
    generator = random.Random(seed)
    todo = {name: inject for name, inject in injections(line).items() if name not in without}
    line.start()
    line.receive_until(_judged, _STARTS_WITHIN_S)
    line.look()
    began_s, result, order = time.monotonic(), line.result, list(todo)
    rounds: list[str] = []
    while (minutes is None or time.monotonic() - began_s < minutes * 60) and (
        frames is None or result.last_sequence < frames
    ):
        if not rounds:  # every fault once before any comes again, in random order
            rounds = generator.sample(order, len(order))
        name = rounds.pop()
        _receive_for(line, generator.uniform(0, 2 * pause_s))
        ordered_s, line.after = time.monotonic(), name
        todo[name]()
        line.receive_until(lambda _verdict: not line.faults.waiting)
        _receive_for(line, _ON_THE_WAY_S)  # parts that were judged before the fault
        line.receive_until(partial(_judged, after=result.last_sequence))
        result.faults[name] += 1
        result.recovery_ms.setdefault(name, []).append((time.monotonic() - ordered_s) * 1000)
        if line.process is not None and line.process.poll() is None:
            line.look()
        check_promise(result, name)
        yield name, result
    line.stop()
    check_promise(result, "the end")
    result.duration_s = time.monotonic() - began_s


def check_promise(result: SoakResult, after: str) -> None:
    """Raise SoakFailed where what a subscriber saw so far is not what was promised."""
    if result.lost or result.double or result.disordered:
        broken = f"{result.lost} verdicts lost, {result.double} doubled and {result.disordered} out of order"
        raise SoakFailed(f"{broken} after {after}")
    if result.ended:
        raise SoakFailed(f"the process ended by itself: {', '.join(result.ended)}")
    if result.invariants:
        raise SoakFailed(f"the daemon's own arithmetic does not hold after {after}")


def _judged(verdict: Verdict, after: int = 0) -> bool:
    return verdict["verdict"] in ("OK", "NG") and verdict["sequence"] > after
