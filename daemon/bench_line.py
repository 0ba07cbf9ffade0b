"""`inspectord bench pipeline | ingest | scaling`: a whole station as a process, timed from frame to verdict."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import typer
import yaml
import zmq
from numpy.typing import NDArray

from daemon.bench_engine import Side, bench_engine, random_networks
from daemon.cli_errors import clear_errors, leaving_at_the_end
from daemon.cli_options import ConfigOption
from daemon.config import StationConfig, load_config
from daemon.log import configure_logging
from daemon.ports import free_ports
from daemon.station import Station
from daemon.tally import Tally, spread
from drivers.camera import Camera, CameraInfo, CameraLost, Fires
from drivers.catalog import make_camera
from drivers.frame import Frame, FrameStatus, Image, PixelFormat
from drivers.pacing import Pacer
from drivers.pylon import PylonCamera, PylonOptions
from drivers.synthetic import PartRenderer, SyntheticOptions
from pipeline.bundle import Bundle, Model, write_bundle
from pipeline.engine import Pending, Precision, RawMaps
from pipeline.engine_cpu import cpu_precisions
from pipeline.engines import EngineChoice
from pipeline.geometry import Geometry
from pipeline.inspection import Outcome, Reason
from pipeline.machine import describe_machine, usable_cores
from pipeline.networks import weights_of
from pipeline.preprocess import PreprocessSpec
from pipeline.scoring import Quantiles

STATION = "bench"
_DIFFERENT_PARTS = 16
_PLAYED_AT_ONCE = 4
"""As many frames as pylon's cameras lend."""
_STARTS_WITHIN_S = 60.0
_SILENT_S = 60.0
_LOOKS = 10
_OVERHEADS, _REMEMBERED = "overheads.npy", 1 << 17


class BenchFailed(Exception):
    """The station under test ended or went silent; the message holds the end of its log."""


class Playback:
    """A camera that costs nothing: parts of the simulated line, drawn beforehand and shown again and again."""

    live: ClassVar[bool] = True
    fires: Fires = Fires.ITSELF
    signals_pass = False

    def __init__(self, options: SyntheticOptions) -> None:
        self._options = options
        renderer = PartRenderer(options)
        self._parts: list[Image] = [renderer.render(index).raw for index in range(_DIFFERENT_PARTS)]
        self._pacer = Pacer(options.rate_fps)
        self._count = 0

    def open(self) -> CameraInfo:
        """Describe the parts."""
        options = self._options
        return CameraInfo(
            "playback", "playback", options.width, options.height, options.pixel_format, _PLAYED_AT_ONCE
        )

    def ready(self, timeout_s: float) -> bool:
        """Never asked."""
        raise NotImplementedError

    def fire(self) -> None:
        """Never asked."""
        raise NotImplementedError

    def grab(self, timeout_s: float) -> list[Frame]:
        """Show the next part when it is due."""
        if not self._pacer.wait(timeout_s):
            return []
        image = self._parts[self._count % _DIFFERENT_PARTS]
        self._count += 1
        return [
            Frame(
                FrameStatus.COMPLETE,
                "playback",
                image=image,
                pixel_format=self._options.pixel_format,
                # A thread that was held up does not make a part come later.
                arrived_ns=self._pacer.was_due_ns or time.monotonic_ns(),
            )
        ]

    def signal_pass(self, until_ns: int) -> None:
        """Never asked."""
        raise CameraLost("no output line")

    def close(self) -> None:
        """Nothing to close."""


class NullEngine:
    """Finds the same nine spots on any image, at once."""

    device = "null"
    precision: Precision = "fp32"
    at_once = 1

    def __init__(self, bundle: Bundle) -> None:
        g = bundle.model.geometry
        q = bundle.quantiles
        shape = (g.map_height, g.map_width)
        spotted = np.full(shape, q.st_a, np.float32)
        for row, column in np.ndindex(3, 3):
            y, x = (shape[0] * (2 * row + 1) // 6, shape[1] * (2 * column + 1) // 6)
            spotted[y : y + 2, x : x + 2] += 100 * (q.st_b - q.st_a)
        self._maps = RawMaps(
            spotted,
            np.full(shape, q.ae_a or 0.0, np.float32),
            preprocess_ns=0,
            infer_ns=0,
        )

    def warm_up(self) -> None:
        """Nothing to warm up."""

    def begin(self, image: Image, fmt: PixelFormat) -> Pending:
        """Return the spotted map, and a flat one."""
        return lambda: self._maps


@dataclass
class LineResult:
    """What a subscriber saw of a station."""

    device: str | None
    precision: str | None
    verdicts: int
    invalid: int
    rate_fps: float
    outcomes: dict[str, int]
    unjournaled: int
    maps: int
    """Maps that came, those of the warm-up included."""
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    """p50_ms, p95_ms, p99_ms and max_ms of each stage, of `overhead` and of `total`.

    `total` ends where the subscriber has the verdict. `publish` is what is left of it: score, regions, the
    journal's commit, sockets, and the ways between threads and processes. `overhead` is the station's own, by its
    own clock: from grab until the sockets have the verdict, without preprocess and infer. `infer` ends when the
    engine's thread has the maps: it looks at the image, and prepares the next frame, beside the networks.
    """
    rss_mib: list[float] = field(default_factory=list)
    """Resident memory of the station after the warm-up and after each tenth of the verdicts."""
    descriptors: list[int] = field(default_factory=list)


class BenchStation:
    """One station as a process, and a subscriber that keeps what it sends."""

    def __init__(self, folder: Path, config: dict[str, Any], *flags: str, maps: bool = False) -> None:
        """Start it.

        Args:
            folder: for its configuration, state and log.
            config: without station, endpoints and state.
            flags: of this module's own command.
            maps: publish and take them, too.
        """
        folder.mkdir(parents=True)
        self._log = folder / "station.log"
        self._overheads = folder / _OVERHEADS
        self._judged: list[int] = []
        kinds = ("verdicts", "maps") if maps else ("verdicts",)
        publish = {
            kind: f"tcp://127.0.0.1:{port}" for kind, port in zip(kinds, free_ports(len(kinds)), strict=True)
        }
        path = folder / "station.yaml"
        own = {"station": STATION, "state_dir": str(folder / "state")}
        path.write_text(yaml.safe_dump({**own, "publish": publish, **config}, sort_keys=False))
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        for address in publish.values():
            self._socket.connect(address)
        for kind in ("verdict", "health", "map"):
            self._socket.subscribe(f"{kind}/{STATION}/".encode())
        self._health: dict[str, Any] = {}
        self._maps = 0
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "daemon.bench_line", "-c", str(path), *flags],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )

    def receive(self, count: int, wait_s: float = _SILENT_S) -> list[tuple[bytes, int]]:
        """Take so many verdicts as they are, and when each came (Unix epoch, ns). Raises BenchFailed."""
        bodies: list[tuple[bytes, int]] = []
        deadline_s = time.monotonic() + wait_s
        while len(bodies) < count:
            if self._socket.poll(200):
                topic, body, *_ = self._socket.recv_multipart()
                if topic.startswith(b"health/"):
                    self._health = json.loads(body)
                elif topic.startswith(b"map/"):
                    self._maps += 1
                else:
                    bodies.append((body, time.time_ns()))
                deadline_s = time.monotonic() + _SILENT_S
            elif self._process.poll() is not None or time.monotonic() > deadline_s:
                sent = f"the station sent {len(bodies)} of {count} verdicts"
                raise BenchFailed(f"{sent}; its log ends:\n{self._end_of_log()}")
        return bodies

    def measure(self, count: int, warm_up: int) -> LineResult:
        """Take verdicts and sum them up. Raises BenchFailed."""
        self.receive(warm_up, _STARTS_WITHIN_S)
        looks = [self._look()]
        began_s = time.monotonic()
        received = []
        for tenth in np.diff(np.linspace(0, count, _LOOKS + 1, dtype=int)).tolist():
            received += self.receive(tenth)
            looks.append(self._look())
        took_s = time.monotonic() - began_s
        found = []
        for body, came_ns in received:
            verdict = json.loads(body)
            grabbed_ns = round(datetime.fromisoformat(verdict["time"]).timestamp() * 1e6) * 1000
            verdict["latency_us"]["total"] = (came_ns - grabbed_ns) // 1000
            found.append(verdict)
        outcomes: dict[str, int] = {}
        for verdict in found:
            word = verdict["verdict"] if verdict["reason"] is None else f"{verdict['verdict']}/{verdict['reason']}"
            outcomes[word] = outcomes.get(word, 0) + 1
        judged = [verdict for verdict in found if verdict["verdict"] != "INVALID"]
        self._judged = [verdict["sequence"] for verdict in judged]
        if not judged:
            raise BenchFailed(f"no part could be judged: {outcomes}; at this load, or with this camera's format")
        return LineResult(
            device=self._health.get("device"),
            precision=self._health.get("precision"),
            verdicts=count,
            invalid=count - len(judged),
            rate_fps=count / took_s,
            outcomes=outcomes,
            unjournaled=sum(not verdict["journaled"] for verdict in found),
            maps=self._maps,
            stages=_stages([verdict["latency_us"] for verdict in judged]),
            rss_mib=[round(rss_mib, 1) for rss_mib, _ in looks],
            descriptors=[descriptors for _, descriptors in looks],
        )

    def _look(self) -> tuple[float, int]:
        process = Path(f"/proc/{self._process.pid}")
        pages = int((process / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(list((process / "fd").iterdir()))

    def overhead(self) -> dict[str, float]:
        """Return how long the station, closed by now, held what was judged, as in `stages`. Raises BenchFailed."""
        try:
            written = np.load(self._overheads)
        except FileNotFoundError:
            raise BenchFailed(f"the station did not end well; its log ends:\n{self._end_of_log()}") from None
        kept_us = written[np.isin(written[:, 0], self._judged), 1]
        if not len(kept_us):
            raise BenchFailed("the station does not remember the parts that it judged")
        return _spread(kept_us / 1000)

    def _end_of_log(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]

    def close(self) -> None:
        """End the station."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._context.destroy(linger=0)


@contextmanager
def bench_station(folder: Path, config: dict[str, Any], *flags: str, maps: bool = False) -> Iterator[BenchStation]:
    """Run a station for as long as it is measured."""
    station = BenchStation(folder, config, *flags, maps=maps)
    try:
        yield station
    finally:
        station.close()


def _stages(latencies: list[dict[str, int]]) -> dict[str, dict[str, float]]:
    columns = {name: np.array([one[name] for one in latencies]) / 1000 for name in latencies[0]}
    total = columns.pop("total")
    columns["publish"] = total - sum(columns.values())
    columns["total"] = total
    return {stage: _spread(values) for stage, values in columns.items()}


def _spread(values_ms: NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(("p50_ms", "p95_ms", "p99_ms", "max_ms"), spread(values_ms), strict=True))


def _measured(
    folder: Path, config: dict[str, Any], *flags: str, frames: int, warm_up: int, maps: bool = False
) -> LineResult:
    """Run a station of its own for one measurement. Raises BenchFailed."""
    with bench_station(folder, config, *flags, maps=maps) as station:
        found = station.measure(frames, warm_up)
    found.stages["overhead"] = station.overhead()
    return found


def bench_pipeline(
    folder: Path, config: dict[str, Any], loads_fps: list[float] | None, frames: int
) -> dict[str, Any]:
    """Measure a station saturated, then at loads.

    Args:
        folder: for what stations write.
        config: of the station, its device decided; its camera is played back from memory.
        loads_fps: None: half of the saturated rate.
        frames: measured at each load.

    Raises BenchFailed.
    """
    warm_up = max(5, frames // 10)
    results = []
    saturated = _measured(
        folder / "saturated", {**config, **_SATURATED}, "--playback", frames=frames, warm_up=warm_up
    )
    for load_fps in loads_fps or [saturated.rate_fps / 2]:
        camera = {**config["camera"], "rate_fps": load_fps}
        loaded = {**config, **_QUIET, "camera": camera, "on_overload": "invalid"}
        found = _measured(folder / f"at {load_fps}", loaded, "--playback", frames=frames, warm_up=warm_up)
        results.append(_result(found, load_fps))
    machine = {**describe_machine(config["device"]), "engine_threads": config.get("threads") or usable_cores()}
    return {"machine": machine, "results": [*results, _result(saturated, None)]}


def bench_ingest(folder: Path, width_px: int, height_px: int, frames: int, rounds: int) -> dict[str, Any]:
    """Measure everything but the engine on pylon's emulated camera: as fast as frames are taken, and at a load.

    At the load, journal, maps and the regions of NG parts are added one by one, in rounds, each with a station
    of its own: stages are the medians of the rounds, `rounds_p50_ms` shows how much they differ, counts are sums.

    Raises BenchFailed, DriverMissing.
    """
    geometry = Geometry()
    model = Model("small", geometry, PreprocessSpec(256, 256), weights_of(random_networks("small", geometry)))
    write_bundle(Bundle(model, Quantiles(0.0, 1.0, None, None), threshold=1.0), folder / "model")
    os.environ.setdefault("PYLON_CAMEMU", "1")
    features = {"TestImageSelector": "Testimage2", "ExposureTimeAbs": 100.0}
    camera = {
        "driver": "pylon",
        "serial": _EMULATED,
        "width": width_px,
        "height": height_px,
        "pixel_format": "Mono8",
        "features": features,
    }
    common = {
        **_QUIET,
        "plausible": {"frozen_frames": 0},
        "model": str(folder / "model"),
        "threshold": _ALL_OK,
        # Verdicts that do not wait for a slow commit would hide what it costs.
        "journal": {"wait_ms": _JOURNAL_WAIT_MS},
    }
    loaded = {**common, "camera": {**camera, "rate_fps": _INGEST_LOAD_FPS}, "on_overload": "invalid"}
    unlimited = {**camera, "features": {**features, "AcquisitionFrameRateEnable": False}}
    sides: dict[str, dict[str, Any]] = {
        "nothing": {**loaded, "journal": False},
        "journal": loaded,
        "journal, maps": loaded,
        "journal, regions": {**loaded, "threshold": _ALL_NG},
        "journal, saturated": {**common, "camera": unlimited, "on_overload": "wait"},
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name, config in sides.items() if turn % 2 == 0 else reversed(sides.items()):
            load_fps = None if config["on_overload"] == "wait" else _INGEST_LOAD_FPS
            if turn > 0 and load_fps is None:
                continue  # one long run shows what memory does
            count = frames if load_fps is None else max(1, min(frames, _LOADED_FRAMES) // rounds)
            seen = _measured(
                folder / f"{turn} {name}",
                config,
                "--null-engine",
                frames=count,
                warm_up=_INGEST_WARM_UP if load_fps is None else _INGEST_WARM_UP // 5,
                maps="maps" in name,
            )
            found[name].append({"with": name, **_result(seen, load_fps), "precision": None})
    return {"machine": describe_machine(), "results": [_median(each) for each in found.values()]}


def _median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the last round with the medians of all rounds' percentiles, their largest and the sums of counts."""
    last = rounds[-1]
    stages = {
        stage: {
            key: float((max if key == "max_ms" else np.median)([one[stage][key] for one in rounds]))
            for key in figures
        }
        for stage, figures in last.items()
        if isinstance(figures, dict) and "p50_ms" in figures
    }
    counts = {name: sum(one[name] for one in rounds) for name in ("verdicts", "invalid", "unjournaled", "maps")}
    outcomes: Counter[str] = sum((Counter(one["outcomes"]) for one in rounds), Counter())
    return {
        **last,
        **stages,
        **counts,
        "outcomes": dict(outcomes),
        "rounds_p50_ms": [one["total"]["p50_ms"] for one in rounds],
    }


def bench_scaling(
    folder: Path, model: str, sizes_px: list[tuple[int, int]], stations: int, seconds: float, frames: int
) -> dict[str, Any]:
    """Measure image sizes with and without tiles, then one to several stations at once, each saturated.

    Raises BenchFailed, SideFailed.
    """
    sides = []
    precision = cpu_precisions()[-1]
    for width_px, height_px in sizes_px:
        for tiles in ((1, 1), (2, 2)):
            geometry = Geometry(width_px, height_px, tile_rows=tiles[0], tile_columns=tiles[1])
            sides.append(Side("cpu", precision, "small", geometry, None))
    timed = bench_engine(sides, seconds, lambda _done, _total: None, limits=False)
    results = [{"kind": "image_size", **result} for result in timed["results"]]
    cores = usable_cores()
    camera = {"driver": "synthetic", "width": 640, "height": 480, "pixel_format": "Mono8"}
    for count in range(1, stations + 1):
        threads = max(1, cores // count)
        config = {"camera": camera, "model": model, "device": "cpu", "threads": threads, **_SATURATED}
        with ExitStack() as stack:
            running = [
                stack.enter_context(bench_station(folder / f"{count}-{index}", config, "--playback"))
                for index in range(count)
            ]
            with ThreadPoolExecutor(count) as pool:
                found = list(pool.map(lambda station: station.measure(frames, frames // 4), running))
        together = {
            "rate_fps": sum(one.rate_fps for one in found),
            "total": max((one.stages["total"] for one in found), key=lambda total: total["p99_ms"]),
        }
        facts = {"kind": "stations", "stations": count, "threads": threads, "precision": found[0].precision}
        results.append({**facts, **together})
    return {"machine": timed["machine"], "results": results}


_QUIET: dict[str, Any] = {"log": {"level": "warning"}, "images": False}
_SATURATED: dict[str, Any] = {**_QUIET, "on_overload": "wait"}
_INGEST_WARM_UP, _INGEST_LOAD_FPS, _LOADED_FRAMES = 300, 100.0, 2000
_ALL_OK, _ALL_NG = 1e6, 1.0
"""Thresholds above and below the null engine's spots."""
_JOURNAL_WAIT_MS = 1000
"""Of `bench ingest`; by default a verdict waits 50 ms for its commit."""
_EMULATED = "0815-0000"
"""Serial number of pylon's first emulated camera."""


def need_pylon() -> None:
    """Say at once where pylon is missing. Raises DriverMissing."""
    PylonCamera(PylonOptions(driver="pylon"))


def _result(found: LineResult, load_fps: float | None) -> dict[str, Any]:
    facts = asdict(found)
    stages = facts.pop("stages")
    return {"load_fps": load_fps or found.rate_fps, "saturated": load_fps is None, **facts, **stages}


class _Remembering(Tally):
    """Remembers of the latest numbers how long the station had them, without preprocess and infer, µs."""

    def __init__(self) -> None:
        super().__init__()
        self.overheads = np.full((_REMEMBERED, 2), -1, np.int64)  # touched at once, or memory would seem to grow

    def published(
        self, sequence: int, outcome: Outcome, reason: Reason | None, latency_us: tuple[int, ...] | None
    ) -> None:
        """Count a published verdict."""
        super().published(sequence, outcome, reason, latency_us)
        if latency_us is not None:
            _, _, preprocess, infer, total = latency_us
            self.overheads[sequence % _REMEMBERED] = sequence, total - preprocess - infer


def run_bench_station(
    config: ConfigOption,
    null_engine: Annotated[bool, typer.Option("--null-engine", help="find the same on each part, at once")] = False,
    playback: Annotated[
        bool, typer.Option("--playback", help="draw the simulated line's parts beforehand")
    ] = False,
) -> None:
    """Run a station for a bench."""
    configure_logging()
    with leaving_at_the_end(), clear_errors():
        settings = load_config(config)
        station = Station(
            settings,
            camera_for=_played_back if playback else None,
            engine_for=_null_engine if null_engine else StationConfig.make_engine,
        )
        signal.signal(signal.SIGTERM, lambda _number, _frame: station.stop())
        threading.Thread(target=_stop_without_parent, args=(station,), daemon=True).start()
        station.tally = tally = _Remembering()
        typer.echo(station.run())
        np.save(config.with_name(_OVERHEADS), tally.overheads)


def _stop_without_parent(station: Station) -> None:
    """Wait for the end of standard input: the bench is over, however it ended."""
    sys.stdin.read()
    station.stop()


def _null_engine(_settings: StationConfig, bundle: Bundle) -> EngineChoice:
    return EngineChoice(NullEngine(bundle), "bench")


def _played_back(settings: StationConfig) -> Camera:
    if isinstance(settings.camera, SyntheticOptions):
        return Playback(settings.camera)
    return make_camera(settings.camera)


if __name__ == "__main__":
    typer.run(run_bench_station)
