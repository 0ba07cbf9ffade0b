"""Run the whole daemon as a process, with a subscriber that knows nothing of our code."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
import zmq

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 120.0


_given: set[int] = set()
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))


def free_port():
    """Find a free port that this test run, in whichever of its processes, has not given out before."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        # By pairs, since Linux mostly gives even ones.
        if port not in _given and port // 2 % _WORKERS == _WORKER:
            _given.add(port)
            return port


@dataclass
class Line:
    """A station on free ports with a fresh state directory."""

    folder: Path
    config: dict
    context: zmq.Context = field(default_factory=zmq.Context)
    verdicts: list = field(default_factory=list)
    maps: list = field(default_factory=list)
    health: list = field(default_factory=list)
    events: list = field(default_factory=list)
    environment: dict = field(default_factory=dict)
    process: subprocess.Popen | None = None

    def __post_init__(self):
        self.verdict_endpoint = f"tcp://127.0.0.1:{free_port()}"
        self.map_endpoint = f"tcp://127.0.0.1:{free_port()}"
        self.config.setdefault("station", "bench")
        self.config.setdefault("state_dir", str(self.folder / "state"))
        self.config.setdefault("publish", {"verdicts": self.verdict_endpoint, "maps": self.map_endpoint})
        self.path = self.folder / "station.yaml"
        self.path.write_text(yaml.safe_dump(self.config, sort_keys=False))  # features are written in order
        # The subscriber connects before the daemon starts, so that it misses nothing.
        self.subscriber = self.context.socket(zmq.SUB)
        self.subscriber.setsockopt(zmq.LINGER, 0)
        self.subscriber.setsockopt(zmq.RCVHWM, 0)
        self.subscriber.setsockopt(zmq.RECONNECT_IVL, 10)
        for endpoint in (self.verdict_endpoint, self.map_endpoint):
            self.subscriber.connect(endpoint)
        self.state = Path(self.config["state_dir"]) / self.config["station"]
        for topic in ("verdict", "map", "health", "event"):
            self.subscriber.subscribe(f"{topic}/{self.config['station']}/".encode())

    def start(self):
        self._close_files()
        self.log = (self.folder / "daemon.log").open("a+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "daemon.cli", "run", "-c", str(self.path)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **self.environment},
        )
        return self

    def receive(self, timeout_s=0.2):
        """Take one message, if one comes, and sort it in."""
        if not self.subscriber.poll(int(timeout_s * 1000)):
            return False
        topic, header, *rest = self.subscriber.recv_multipart()
        kind = topic.split(b"/")[0].decode()
        assert topic == f"{kind}/{self.config['station']}/".encode()
        message = json.loads(header)
        if kind == "map":
            (blob,) = rest
            message["values"] = np.frombuffer(blob, message["dtype"]).reshape(message["shape"])
            self.maps.append(message)
        else:
            assert not rest
            {"verdict": self.verdicts, "health": self.health, "event": self.events}[kind].append(message)
        return True

    def receive_until(self, condition):
        """Receive until the condition holds; fails with the daemon's log when it ends or takes too long."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            if not self.receive() and (self.process.poll() is not None or time.monotonic() > deadline_s):
                raise AssertionError(f"exit code {self.process.poll()}; log:\n{self.read_log()}")

    def finish(self):
        """Receive everything until the process has ended; return its exit code and output."""
        deadline_s = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            self.receive()
            assert time.monotonic() < deadline_s, self.read_log()
        while self.receive(0.3):
            pass
        return self.process.returncode, self.process.stdout.read()

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.finish()

    def read_log(self):
        return (self.folder / "daemon.log").read_text()

    def log_events(self):
        return [json.loads(line) for line in self.read_log().splitlines() if line.startswith("{")]

    def close(self):
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
        self._close_files()
        self.context.destroy(linger=0)

    def _close_files(self):
        if self.process is not None:
            self.process.stdout.close()
            self.log.close()

    def sequences(self):
        return [v["sequence"] for v in self.verdicts]
