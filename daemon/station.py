"""One station: three threads in a row and their supervisor."""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict

import structlog

from daemon.acquisition import Acquisition
from daemon.channels import Channel, End, Grabbed, Judged, Probe, Worker
from daemon.config import StationConfig
from daemon.judging import Judging
from daemon.messages import HEALTH_SCHEMA, CameraHealth, HealthMessage, rfc3339
from daemon.notify import Notifier
from daemon.publishing import Identity, Publishing
from daemon.ring import FrameRing
from daemon.sequence import SequenceFile
from daemon.tally import Summary, Tally, summarise
from drivers.camera import Camera
from drivers.catalog import make_camera
from drivers.frame import Frame, FrameStatus
from pipeline.bundle import Bundle, Model, read_bundle
from pipeline.engines import EngineChoice, EngineUnavailable, make_engine
from pipeline.inspect import Inspection, Inspector, Outcome, Reason

_HEALTH_PERIOD_S = 1.0
_FRAMES_ON_THE_WAY = 4096
"""Reports without images that may wait for the engine; beyond that acquisition waits."""
_JUDGED_ON_THE_WAY = 256
_TEARDOWN_S = 5.0
_GRABBER_STOPS_S = 5.0
"""How long acquisition may take to end once it was told to."""


class StationFailed(Exception):
    """A worker failed in a way that this process cannot mend; it should be restarted."""


class Station:
    """Run one station until its source ends or `stop` is called. One use each."""

    def __init__(
        self,
        config: StationConfig,
        *,
        camera: Camera | None = None,
        engine_for: Callable[[Model], EngineChoice] | None = None,
    ) -> None:
        """Prepare; nothing is opened yet.

        Args:
            config: validated.
            camera: instead of the configured one.
            engine_for: instead of the configured device's engine.

        Raises DriverMissing when the configured driver's library is not installed.
        """
        self._config = config
        self._camera = camera or make_camera(config.camera)
        self._engine_for = engine_for or (lambda model: make_engine(model, config.device, config.threads))
        self._log = structlog.get_logger().bind(station=config.station)
        self._notifier = Notifier()
        self._stop = threading.Event()
        self._torn = threading.Event()
        self._began_s = time.monotonic()
        self._device: str | None = None
        self.boot = secrets.token_hex(8)
        self.tally = Tally()

    def stop(self) -> None:
        """Stop grabbing, finish what is in flight, then `run` returns. Safe in a signal handler."""
        self._stop.set()

    def run(self) -> Summary:
        """Inspect until the end.

        Raises BundleError, EngineUnavailable, EndpointError or StateError when the station cannot start, and
        StationFailed when it cannot go on.
        """
        with SequenceFile(self._config.state_folder()) as sequences:
            try:
                return self._run(sequences)
            finally:
                self._torn.set()
                self._notifier.close()

    def _run(self, sequences: SequenceFile) -> Summary:
        config = self._config
        bundle = read_bundle(config.model)
        ring = FrameRing(config.slots)
        frames: Channel[Grabbed | Probe | End] = Channel(_FRAMES_ON_THE_WAY, self._torn)
        judged: Channel[Judged | HealthMessage | Probe | End] = Channel(_JUDGED_ON_THE_WAY, self._torn)
        threshold = bundle.threshold if config.threshold is None else config.threshold
        identity = Identity(
            config.station,
            self.boot,
            bundle.model_id,
            bundle.calibration_id,
            threshold,
            _map_geometry(bundle),
        )
        publishing = Publishing(
            identity,
            config.publish.verdicts,
            config.publish.maps or [],
            judged,
            sequences,
            self.tally,
            self._log,
        )
        judging = Judging(lambda: self._make_inspector(bundle), ring, frames, judged, self._log)
        wait_when_full = config.on_overload == "wait" if config.on_overload is not None else not self._camera.live
        acquisition = Acquisition(
            self._camera,
            sequences,
            ring,
            frames,
            self.tally,
            wait_when_full=wait_when_full,
            stop=self._stop,
            torn=self._torn,
            log=self._log,
        )
        workers = [
            Worker("publisher", publishing.run, self._torn),
            Worker("engine", judging.run, self._torn),
            Worker("acquisition", acquisition.run, self._torn),
        ]
        publisher, engine, grabber = workers
        # The sockets come first: subscribers that wait for us connect while the networks are loaded.
        publisher.start()
        publishing.ready.result()
        engine.start()
        self._device = self._engine_device(judging)
        self._answer_for_earlier_run(sequences, judged)
        grabber.start()
        self._notifier.send("READY=1")
        self._log.info(
            "ready",
            boot=self.boot,
            device=self._device,
            model=bundle.model_id,
            calibration=bundle.calibration_id,
            threshold=threshold,
            verdicts=config.publish.verdicts,
            maps=config.publish.maps,
        )
        self._supervise(workers, acquisition, publishing, frames, judged, identity)
        duration_s = (publishing.last_sent_ns - (publishing.first_grab_ns or publishing.last_sent_ns)) / 1e9
        return summarise(self.tally, duration_s)

    def _engine_device(self, judging: Judging) -> str:
        try:
            return judging.ready.result().engine.device
        except EngineUnavailable:
            raise
        except Exception as error:
            self._log.error("the engine could not be made", exc_info=error)
            raise StationFailed(f"the engine could not be made: {type(error).__name__}: {error}") from error

    def _make_inspector(self, bundle: Bundle) -> Inspector:
        choice = self._engine_for(bundle.model)
        self._log.info("engine", device=choice.engine.device, because=choice.because)
        choice.engine.warm_up()
        limits = self._config.plausible.limits()
        return Inspector(bundle, choice.engine, limits=limits, threshold=self._config.threshold)

    def _answer_for_earlier_run(
        self, sequences: SequenceFile, judged: Channel[Judged | HealthMessage | Probe | End]
    ) -> None:
        """Give each number that an earlier run left without a verdict its INVALID/restart."""
        left = sequences.without_verdict()
        if left:
            self._log.warning("numbers of an earlier run without a verdict", first=left[0], last=left[-1])
        for sequence in left:
            self.tally.saw()
            frame = Frame(FrameStatus.LOST, source="", sequence=sequence)
            judged.put(Judged(frame, Inspection(Outcome.INVALID, Reason.RESTART), 0))

    def _supervise(
        self,
        workers: list[Worker],
        acquisition: Acquisition,
        publishing: Publishing,
        frames: Channel[Grabbed | Probe | End],
        judged: Channel[Judged | HealthMessage | Probe | End],
        identity: Identity,
    ) -> None:
        publisher, _engine, grabber = workers
        stop_by_s = math.inf
        abandoned = False
        watchdog_s = self._notifier.watchdog_s
        period_s = _HEALTH_PERIOD_S if watchdog_s is None else min(_HEALTH_PERIOD_S, watchdog_s / 4)
        health_due_s, probe, last_moved, stopping = 0.0, 0, -1, False
        while publisher.is_alive() and not self._torn.is_set():
            publisher.join(period_s)
            if self._stop.is_set() and not stopping:
                stopping = True
                stop_by_s = time.monotonic() + _GRABBER_STOPS_S
                self._notifier.send("STOPPING=1")
                self._log.info("stopping")
            if time.monotonic() > stop_by_s and grabber.is_alive() and not abandoned:
                # A vendor call hangs. What it has grabbed is still judged and published, without it.
                abandoned = True
                self._log.error("acquisition does not end; it is abandoned")
                frames.put(End())
            now_s = time.monotonic()
            if now_s >= health_due_s:
                health_due_s = now_s + _HEALTH_PERIOD_S
                state = "draining" if stopping else "running" if acquisition.state.connected else "no_camera"
                judged.try_put(self._health(identity, acquisition, state))
            moved = self.tally.totals().last_sequence
            # Work that moved, or an idle probe that came all the way through: both prove every thread alive.
            if moved != last_moved or publishing.probe_seen == probe:
                self._notifier.send("WATCHDOG=1")
                last_moved = moved
                probe += 1
                acquisition.send_probe(probe)
        if not stopping:
            self._notifier.send("STOPPING=1")
        deadline_s = time.monotonic() + _TEARDOWN_S
        for worker in workers:
            worker.join(max(0.0, deadline_s - time.monotonic()))
        if self._notifier.failure:
            self._log.warning("systemd was not told", error=self._notifier.failure)
        if abandoned:
            raise StationFailed("the camera's driver did not return; it was abandoned with its device")
        failed = next((worker for worker in workers if worker.failure is not None), None)
        if failed is not None:
            self._log.error("worker failed", worker=failed.name, exc_info=failed.failure)
            raise StationFailed(f"the {failed.name} thread failed: {failed.failure}") from failed.failure

    def _health(self, identity: Identity, acquisition: Acquisition, state: str) -> HealthMessage:
        totals = self.tally.totals()
        return HealthMessage(
            schema=HEALTH_SCHEMA,
            station=identity.station,
            boot=identity.boot,
            time=rfc3339(time.time_ns()),
            state=state,
            uptime_s=round(time.monotonic() - self._began_s, 3),
            seen=totals.seen,
            ok=totals.ok,
            ng=totals.ng,
            invalid=totals.invalid,
            in_flight=totals.in_flight,
            invalid_reasons=totals.reasons,
            last_sequence=totals.last_sequence,
            camera=CameraHealth(**asdict(acquisition.state)),
            device=self._device,
            model=identity.model,
            calibration=identity.calibration,
        )


def _map_geometry(bundle: Bundle) -> dict[str, object]:
    roi = bundle.model.preprocess.roi
    return {**bundle.model.geometry.to_json(), "roi": None if roi is None else asdict(roi)}
