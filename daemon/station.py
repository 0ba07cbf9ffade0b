"""One station: its threads, and the supervisor that restarts them."""

from __future__ import annotations

import contextlib
import gc
import math
import queue
import secrets
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import CancelledError, wait
from dataclasses import replace
from pathlib import Path

import cv2
import structlog
import zmq

from daemon.acquisition import Acquisition, Line
from daemon.archive import Archive, Keep
from daemon.channels import Channel, Closed, Grabbed, Probe, Swap
from daemon.commands import Commands
from daemon.config import StationConfig, load_config
from daemon.events import EventKind, Events, Outbox
from daemon.health import Health
from daemon.journal import Journal, Retention
from daemon.judging import Judging
from daemon.keys import KeysError, Security
from daemon.ledger import Ledger
from daemon.messages import HealthMessage
from daemon.notify import Notifier
from daemon.passing import Passing
from daemon.publishing import Publishing
from daemon.reload import ReloadRefused, check_changes
from daemon.ring import FrameRing
from daemon.sequence import SequenceFile
from daemon.serving import Serving
from daemon.sockets import Context
from daemon.supervision import Failures, Worker, let_go_of_frames
from daemon.tally import Summary, Tally, summarise
from daemon.yaml_errors import ConfigError
from drivers.camera import Camera, DriverMissing, Fires
from drivers.catalog import make_camera
from pipeline.allocator import share_arenas
from pipeline.bundle import Bundle, BundleError, read_bundle
from pipeline.engines import EngineChoice, EngineUnavailable, frame_memory
from pipeline.inspect import Inspector
from pipeline.inspection import Inspection, Outcome, Reason
from pipeline.machine import usable_cores

_HEALTH_PERIOD_S = 1.0
_CONTROL_ITEMS = 8
"""Room in the engine's channel beside its frames, which the ring limits."""
_ENGINE_BUILT_WITHIN_S = 180.0
"""Loading and warming up; what takes longer hangs, and only a new process helps."""
_NO_ENGINE_IN_TIME = f"the engine could not be made within {_ENGINE_BUILT_WITHIN_S:g} s"
_NO_ANSWER = "the camera's driver does not answer"
_LOOK_UP_S = 0.1
_OWN_SOCKETS = ("publisher", "server", "replay")
_TEARDOWN_S = 5.0
_HANGS = 5
"""Threads that were abandoned one after the other without having worked in between, or that never came back: so
many end the process, for each keeps its device and its memory."""
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
        config_path: Path | None = None,
        state_dir: Path | None = None,
        camera_for: Callable[[StationConfig], Camera] | None = None,
        engine_for: Callable[[StationConfig, Bundle], EngineChoice] = StationConfig.make_engine,
    ) -> None:
        """Prepare; nothing is opened yet.

        Args:
            config: validated.
            config_path: read again by `reload`; None: nothing to reload.
            state_dir: instead of the configured one, also after a reload.
            camera_for: makes the camera, instead of the configured driver.
            engine_for: makes the engine, instead of the configured device's.

        Raises DriverMissing when the configured driver's library is not installed, and KeysError.
        """
        if state_dir is not None:
            config = config.model_copy(update={"state_dir": state_dir})
        self._config = config
        self._config_path, self._state_dir = config_path, state_dir
        self._camera_for = camera_for or (lambda settings: make_camera(settings.camera))
        self._engine_for = engine_for
        self._log = structlog.get_logger().bind(station=config.station)
        self._camera = self._camera_for(config)
        self._security = Security(config.security.keys)
        self._notifier = Notifier()
        # A queue, because unlike an Event it may be used in a signal handler that interrupts its own waiter.
        self._attention: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._reloading = threading.Lock()
        self._new_camera: Camera | None = None
        self._passes_after = 0
        """The last number that the camera before the present one may have taken."""
        self._restarts: Counter[str] = Counter()
        self._workers: dict[str, Worker] = {}
        self._simple_workers: dict[str, Callable[[], None]] = {}
        self._failures: defaultdict[str, Failures] = defaultdict(Failures)
        self._hangs: Counter[str] = Counter()
        self._stuck: list[Worker] = []
        self._due: dict[str, tuple[float, Callable[[], None]]] = {}
        """Workers that are started again, and when."""
        self._stop_by_s: float | None = None
        self.boot = secrets.token_hex(8)
        self.tally = Tally()
        self._outbox = Outbox()
        self.events = Events(config.station, self.boot, self._outbox, self._log)
        self._stop_wanted = self._reload_wanted = False

    def stop(self) -> None:
        """Stop grabbing, finish what is in flight, then `run` returns. Safe in a signal handler."""
        self._stop_wanted = True
        self._attention.put(None)

    def reload_soon(self) -> None:
        """Reload, and say in an event how it went. Safe in a signal handler."""
        self._reload_wanted = True
        self._attention.put(None)

    def run(self) -> Summary:
        """Inspect until the end.

        Raises BundleError, EngineUnavailable, EndpointError or StateError when the station cannot start, and
        StationFailed when it cannot go on.
        """
        share_arenas()
        with SequenceFile(self._config.state_folder(), self._tell_of_numbers) as sequences:
            context = zmq.Context()
            try:
                self._security.start(context)
                return self._run(sequences, context)
            finally:
                self._security.stop()
                self._notifier.close()
                # A thread that hangs still has its sockets; the end of the process closes them.
                if not any(worker.is_alive() for name, worker in self._workers.items() if name in _OWN_SOCKETS):
                    context.term()

    def _tell_of_numbers(self, error: str | None) -> None:
        if error is None:
            self.events.say(EventKind.STATE, "numbers are copied into the state folder again", level="info")
        else:
            told = "numbers cannot be copied into the state folder; memory keeps them until the machine restarts"
            self.events.say(EventKind.STATE, told, error=error)

    def _run(self, sequences: SequenceFile, context: Context) -> Summary:
        config, self._sequences = self._config, sequences
        self._bundle = read_bundle(config.model)
        self._ledger = Ledger(sequences, self.tally, self._deadline_ms)
        page_locked = frame_memory(config.device)
        self._slots = config.frame_slots(on_cuda=page_locked is not None)
        self._ring = FrameRing(self._slots, page_locked)
        self._line = Line(self._ledger, self._ring, self._engine_channel())
        self._journal = self._make_journal()
        self._archive = self._make_archive()
        self._passing = self._make_passing()
        self._publishing = self._make_publishing(context)
        self._health = Health(
            config, self.boot, self.tally, self._line, self._publishing, self._journal, self._archive, self.events
        )
        commands = Commands(self, self._line, self._archive, self._publishing, self._journal)
        # Each with a thread of its own: who reads back from a slow disk must not keep triggers waiting.
        self._serving, self._replaying = (
            Serving(control, replay, context=context, security=self._security, controls=commands, log=self._log)
            for control, replay in ((config.control_endpoints(), []), ([], config.replay_endpoints()))
        )
        try:
            if self._start(sequences):
                self._supervise()
        finally:
            self._tear_down()
            gc.unfreeze()
        publishing = self._publishing
        duration_s = (publishing.last_sent_ns - (publishing.first_grab_ns or publishing.last_sent_ns)) / 1e9
        return summarise(self.tally, duration_s)

    # Making the parts

    def _deadline_ms(self) -> float | None:
        return self._config.deadline_ms(live=self._camera.live)

    def _waits(self) -> bool:
        return self._config.waits(live=self._camera.live)

    def _engine_channel(self) -> Channel[Grabbed | Probe | Swap]:
        return Channel(self._slots + _CONTROL_ITEMS)

    def _make_journal(self) -> Journal | None:
        settings, path = self._config.journal, self._config.journal_path()
        if settings is False or path is None:
            return None
        retention = Retention(settings.keep_days, settings.max_mib << 20)
        return Journal(path, self._config.station, retention, self.events)

    def _make_archive(self) -> Archive:
        settings, state = self._config.images, self._config.state_folder()
        keep = None
        if settings is not False:
            keep = Keep(
                settings.path or state / "images",
                settings.keep,
                settings.every_ok,
                settings.format,
                settings.quota_mib << 20,
                settings.reserve_mib << 20,
            )
        return Archive(self._config.station, keep, state / "captures", self._ledger, self.events)

    def _make_passing(self) -> Passing:
        return Passing(lambda until_ns: self._camera.signal_pass(until_ns), self.events)

    def _ask_to_pass(self, sequence: int, due_ns: int | None) -> None:
        passing = self._passing  # the present one: a hung one is replaced
        if sequence > self._passes_after:
            passing.passed(sequence, due_ns)
        else:
            passing.refuse(sequence, "the camera that took it is not the present one")

    def _make_publishing(self, context: Context) -> Publishing:
        config = self._config
        return Publishing(
            config.station,
            self.boot,
            (config.publish.verdicts, config.publish.maps or []),
            context=context,
            security=self._security,
            ledger=self._ledger,
            journal=self._journal,
            tally=self.tally,
            outbox=self._outbox,
            events=self.events,
            journal_wait_ms=0 if config.journal is False else config.journal.wait_ms,
            alarm_after=lambda: self._config.verdict.alarm_after_rejects,
            passed=self._ask_to_pass if self._camera.signals_pass else None,
            log=self._log,
        )

    def _make_inspector(self, config: StationConfig, bundle: Bundle) -> Inspector:
        choice = self._engine_for(config, bundle)
        engine = choice.engine
        self._log.info("engine", device=engine.device, precision=engine.precision, because=choice.because)
        inspector = Inspector(bundle, engine, limits=config.plausible.limits(), threshold=config.threshold)
        inspector.warm_up()
        return inspector

    def _limit_threads(self) -> None:
        """Leave other cores to others in preprocessing, too."""
        cv2.setNumThreads(self._config.threads or usable_cores())

    # Starting

    def _start(self, sequences: SequenceFile) -> bool:
        """Begin every thread; False where the daemon was asked to stop before it could."""
        config = self._config
        if self._journal is not None:
            # The journal knows best what was published: it was written first.
            sequences.at_least(self._journal.open())
            self._begin_simple("journal", self._journal.write)
            self._begin_simple("flusher", self._journal.flush)
        self.tally.go_on_after(sequences.published)
        self._begin_simple("archive", self._archive.write)
        # The sockets come first: subscribers that wait for us connect while the networks are loaded.
        self._begin_simple("publisher", self._publishing.run)
        self._publishing.ready.result()
        for name, serving in (("server", self._serving), ("replay", self._replaying)):
            self._begin_simple(name, serving.run)
            serving.ready.result()
        if self._camera.signals_pass:
            self._begin_simple("passing", self._passing.run)
        self._limit_threads()
        self._begin_engine()
        if not self._await_engine():
            return False
        left = sequences.without_verdict()
        if left:
            self._log.warning("numbers of an earlier run without a verdict", first=left[0], last=left[-1])
        for sequence in left:
            self._ledger.restore(sequence)
        # What is there now stays: looking through half a million objects (PyTorch's) would hold a verdict up.
        gc.collect()
        gc.freeze()
        self._line.triggers.open()
        self._begin_acquisition(after_hang=False)
        self._notifier.send("READY=1")
        self._log.info(
            "ready",
            boot=self.boot,
            device=self._ledger.judged_by.device,
            model=self._bundle.model_id,
            calibration=self._ledger.judged_by.calibration,
            threshold=self._ledger.judged_by.threshold,
            deadline_ms=self._deadline_ms(),
            verdicts=config.publish.verdicts,
            maps=config.publish.maps,
            replay=config.replay_endpoints(),
            control=config.control_endpoints(),
        )
        return True

    def _await_engine(self) -> bool:
        """Wait until the engine can judge; False where the daemon is asked to stop meanwhile."""
        ready = self._judging.ready
        try:
            while not ready.done():
                wait([ready], _LOOK_UP_S)
                if self._stop_wanted:
                    return False
                if self._judging.building.hangs(_ENGINE_BUILT_WITHIN_S):
                    raise StationFailed(_NO_ENGINE_IN_TIME)
            ready.result()
            return True
        except (EngineUnavailable, StationFailed):
            raise
        except Exception as error:
            self._log.error("the engine could not be made", exc_info=error)
            raise StationFailed(f"the engine could not be made: {type(error).__name__}: {error}") from error

    def _begin(self, name: str, work: Callable[[], None]) -> None:
        self._workers[name] = Worker(name, work, lambda: self._attention.put(None))
        self._workers[name].start()

    def _begin_simple(self, name: str, work: Callable[[], None]) -> None:
        """Begin a thread that can be started again as it is."""
        self._simple_workers[name] = work
        self._begin(name, work)

    def _begin_engine(self) -> None:
        config, bundle = self._config, self._bundle
        self._judging = Judging(
            lambda: self._make_inspector(config, bundle),
            self._ring,
            self._line.frames,
            self._ledger,
            pass_probe=self._publishing.pass_probe,
            tap=self._archive.look,
            events=self.events,
            log=self._log,
        )
        self._begin("engine", self._judging.run)

    def _begin_acquisition(self, *, after_hang: bool) -> None:
        self._acquisition = Acquisition(
            self._camera,
            self._line,
            wait_when_full=self._waits,
            after_hang=after_hang,
            events=self.events,
            next_camera=self._take_new_camera,
            log=self._log,
        )
        self._begin("acquisition", self._acquisition.run)

    def _take_new_camera(self) -> Camera | None:
        camera, self._new_camera = self._new_camera, None
        if camera is not None:
            self._use(camera)
        return camera

    def _use(self, camera: Camera) -> None:
        # What was numbered before stands at the other camera's gate.
        self._passes_after = self._sequences.grabbed
        self._camera = camera

    # Watching

    def _supervise(self) -> None:
        watchdog_s = self._notifier.watchdog_s
        hang_s = self._config.supervision.hang_s
        if watchdog_s and hang_s >= watchdog_s:
            told = "systemd's watchdog comes before a hung call is given up: raise WatchdogSec or lower hang_s"
            self._log.warning(told, hang_s=hang_s, watchdog_s=watchdog_s)
        period_s = min(_HEALTH_PERIOD_S, hang_s / 4, *([watchdog_s / 4] if watchdog_s else []))
        health_due_s, watch_due_s, probe, last_moved = 0.0, 0.0, 0, (-1, 0)
        while not self._ledger.over or self._workers["publisher"].is_alive():
            with contextlib.suppress(queue.Empty):
                self._attention.get(timeout=self._nap_s(period_s))
            now_s = time.monotonic()
            if self._stop_wanted:
                self._stopping(now_s)
            elif self._reload_wanted:
                self._reload_wanted = False
                threading.Thread(target=self._reload_and_say, name="reload", daemon=True).start()
            for name in [name for name, (due_s, _) in self._due.items() if now_s >= due_s]:
                self._due.pop(name)[1]()
            for name, watch in (("acquisition", self._watch_acquisition), ("engine", self._watch_engine)):
                if name not in self._due:
                    watch(hang_s)
            for name, work in self._simple_workers.items():
                self._watch(name, work)
            self._watch_passing(hang_s)
            if now_s >= health_due_s:
                health_due_s = now_s + _HEALTH_PERIOD_S
                self._outbox.put("health", self.health_message())
            if now_s >= watch_due_s:
                watch_due_s = now_s + period_s / 2
                moved = self.tally.totals().last_sequence, self._restarts.total()
                # Work that moved, or an idle probe that came all the way through: both prove every thread alive.
                # A thread that was given up, or an engine in the making, has limits of its own.
                arrived = self._publishing.probe_seen == probe
                if moved != last_moved or arrived or self._judging.building.under_way:
                    self._notifier.send("WATCHDOG=1")
                    last_moved = moved
                if arrived:  # one probe at a time: they must not fill the channel of an engine that hangs
                    probe += 1
                    self._line.probe_wanted = probe

    def _nap_s(self, period_s: float) -> float:
        """Return how long nothing needs the supervisor, unless it is woken."""
        soonest_s = min((due_s for due_s, _ in self._due.values()), default=math.inf)
        return max(0.0, min(period_s, soonest_s - time.monotonic()))

    def _stopping(self, now_s: float) -> None:
        if self._stop_by_s is None:
            self._stop_by_s = now_s + _GRABBER_STOPS_S
            self._notifier.send("STOPPING=1")
            self._log.info("stopping")
            self._line.stop.set()
        grabber = self._workers["acquisition"]
        if "acquisition" in self._due or (not grabber.is_alive() and grabber.failure is not None):
            self._due.pop("acquisition", None)
            self._abandon_acquisition()
            self._line.end("the camera's driver failed")
        if now_s > self._stop_by_s and grabber.is_alive() and self._acquisition.call.hangs(_GRABBER_STOPS_S):
            # A vendor call hangs. What it has grabbed is still judged and published, without it.
            self._log.error("acquisition does not end; it is abandoned")
            self._drain()
            raise StationFailed("the camera's driver did not return; it was abandoned with its device")

    def _drain(self, why: str = _NO_ANSWER) -> None:
        """Let what was grabbed be judged and published; nothing more is numbered."""
        self._abandon_acquisition(why)
        self._line.end(why)
        self._workers["publisher"].join(_TEARDOWN_S)

    def _watch(self, name: str, work: Callable[[], None]) -> None:
        worker = self._workers[name]
        if name not in self._due and not worker.is_alive() and worker.failure is not None:
            self._start_later(name, worker.failure, lambda: self._begin(name, work))

    def _watch_passing(self, hang_s: float) -> None:
        if self._passing.worked:
            self._hangs["passing"] = 0
        if not self._passing.call.hangs(hang_s):
            return
        self._passing.end()  # when its call returns; its successor drives the camera that is there now
        self._passing = self._make_passing()
        failure = TimeoutError(f"a pass pulse took longer than {hang_s:g} s")
        self._hung("passing", failure)
        self._simple_workers["passing"] = self._passing.run
        self._start_later("passing", failure, lambda: self._begin("passing", self._passing.run))

    def _watch_acquisition(self, hang_s: float) -> None:
        grabber = self._workers["acquisition"]
        if self._stop_wanted:
            return
        if self._acquisition.worked:
            self._hangs["acquisition"] = 0
        if grabber.is_alive():
            if self._acquisition.call.hangs(hang_s):
                self._abandon_acquisition()
                failure = TimeoutError(f"a driver call took longer than {hang_s:g} s")
                if not self._camera.live:  # it would begin with its first file again
                    self._drain()
                    raise StationFailed(str(failure))
                self._hung("acquisition", failure)
                self._start_later("acquisition", failure, lambda: self._grab_anew(after_hang=True))
            return
        if grabber.failure is None:
            return
        self._abandon_acquisition()
        if not self._camera.live or self._acquisition.after_hang:
            self._log.error("acquisition failed", exc_info=grabber.failure)
            self._drain()
            raise StationFailed(f"the acquisition thread failed: {grabber.failure}") from grabber.failure
        self._start_later("acquisition", grabber.failure, lambda: self._grab_anew(after_hang=False))

    def _hung(self, name: str, failure: BaseException) -> None:
        """Count a thread that was abandoned. Raises StationFailed when only a new process can help."""
        self._hangs[name] += 1
        self._stuck = [worker for worker in self._stuck if worker.is_alive()] + [self._workers[name]]
        if self._hangs[name] >= _HANGS or len(self._stuck) >= _HANGS:
            self._drain(str(failure))
            raise StationFailed(
                f"{failure}, {self._hangs[name]} times without work in between; {len(self._stuck)} threads stuck"
            )

    def _grab_anew(self, *, after_hang: bool) -> None:
        self._use(self._camera_for(self._config))
        self._begin_acquisition(after_hang=after_hang)

    def _abandon_acquisition(self, why: str = _NO_ANSWER) -> None:
        """Take the present generation's right to number; a trigger without a frame gets its verdict."""
        self._ledger.revoke(self._acquisition.ticket)
        grabber = self._workers["acquisition"]
        if grabber.is_alive():
            grabber.holds += self._ring.abandon_loans()
        entry = self._acquisition.waiting_entry
        if entry is not None:
            self._ledger.settle(entry, Inspection(Outcome.INVALID, Reason.CAMERA, why))
        self._line.state = replace(self._line.state, connected=False, error=why)

    def _watch_engine(self, hang_s: float) -> None:
        engine, judging = self._workers["engine"], self._judging
        if engine.is_alive() and judging.building.hangs(_ENGINE_BUILT_WITHIN_S):
            raise StationFailed(_NO_ENGINE_IN_TIME)
        if judging.worked:
            self._hangs["engine"] = 0
        hung = engine.is_alive() and judging.call.hangs(hang_s)
        if not hung and (engine.is_alive() or engine.failure is None):
            return
        failure = engine.failure or TimeoutError(f"an engine call took longer than {hang_s:g} s")
        old, self._line.frames = self._line.frames, self._engine_channel()
        lost = Inspection(Outcome.INVALID, Reason.ENGINE, f"{type(failure).__name__}: {failure}")
        for item in old.close():
            if isinstance(item, Swap):
                item.done.cancel()
            elif isinstance(item, Grabbed):
                self._ledger.settle(item.entry, lost)
                item.entry.frame.forget_image()
                self._ring.give_back(item.slot)
            else:
                self._line.frames.put(item)  # the probe goes on through the next generation
        in_hand, slots = judging.abandon()
        for item in in_hand:
            self._ledger.settle(item.entry, lost)
        for slot in slots:
            # A hung call may still read or write its slots when it comes back: they are not used again.
            if hung:
                self._ring.replace(slot)
            else:
                self._ring.give_back(slot)
        if hung:
            self._hung("engine", failure)
        self._start_later("engine", failure, self._begin_engine)

    def _start_later(self, name: str, failure: BaseException, begin: Callable[[], None]) -> None:
        failures = self._failures[name]
        pause_s = failures.happened()
        self._restarts[name] += 1
        self.events.say(
            EventKind.WORKER,
            f"the {name} thread failed and is started again",
            level="error",
            exc_info=failure,
            worker=name,
            error=f"{type(failure).__name__}: {failure}",
            pause_s=pause_s,
        )
        let_go_of_frames(failure)
        if failures.too_many:
            raise StationFailed(f"the {name} thread failed too often: {failure}") from failure
        self._due[name] = time.monotonic() + pause_s, begin

    def fires(self) -> Fires:
        """Tell who triggers the camera."""
        return self._camera.fires

    def health_message(self) -> HealthMessage:
        """Describe the station now, and check its arithmetic."""
        totals, open_numbers = self._ledger.audit()
        if totals.in_flight != open_numbers:
            self.events.say(
                EventKind.INVARIANT,
                "seen = ok + ng + invalid + in_flight does not hold",
                level="error",
                in_flight=totals.in_flight,
                open=open_numbers,
            )
        state = "running" if self._line.state.connected else "no_camera"
        if self._line.stop.is_set():
            state = "draining"
        elif self._line.paused.is_set():
            state = "paused"
        return self._health.message(totals, state, self._ledger.judged_by, dict(self._restarts))

    # Reloading

    def reload(self) -> dict[str, str]:
        """Take a new configuration, bundle, calibration and keys between two frames; an event says how it went.

        Returns the ids of what judges now. Raises ReloadRefused; then nothing has changed.
        """
        try:
            if not self._reloading.acquire(blocking=False):
                raise ReloadRefused("another reload is under way")
            try:
                self._reload()
            finally:
                self._reloading.release()
        except ReloadRefused as error:
            self.events.say(EventKind.RELOAD, "the reload was refused; the old one goes on", error=str(error))
            raise
        judged_by = self._ledger.judged_by
        self.events.say(
            EventKind.RELOAD,
            "reloaded",
            level="info",
            model=judged_by.model,
            calibration=judged_by.calibration,
            threshold=judged_by.threshold,
        )
        return {"model": judged_by.model, "calibration": judged_by.calibration}

    def _reload(self) -> None:
        try:
            config, bundle, inspector, camera = self._prepare_reload()
            clients = self._security.read()
        except (ReloadRefused, BundleError, ConfigError, DriverMissing, EngineUnavailable, KeysError) as error:
            raise ReloadRefused(str(error)) from error
        except Exception as error:
            self._log.error("the reload failed", exc_info=error)
            raise ReloadRefused(f"{type(error).__name__}: {error}") from error
        swap = Swap(inspector)
        try:
            self._line.send(swap)
            swap.done.result(self._config.supervision.hang_s)
        except (CancelledError, TimeoutError, Closed) as error:
            if swap.done.cancel():  # else the engine has just taken it
                raise ReloadRefused("the engine does not take the new model now; try again") from error
        self._config, self._bundle = config, bundle
        self._limit_threads()
        if camera is not None:  # else the one of an earlier reload may still wait to be taken
            self._new_camera = camera
        if self._security.install(clients):
            self._publishing.rebind()
            self._serving.rebind()
            self._replaying.rebind()

    def _prepare_reload(self) -> tuple[StationConfig, Bundle, Inspector, Camera | None]:
        if self._config_path is None:
            raise ReloadRefused("this station was started without a configuration file")
        config = load_config(self._config_path)
        if self._state_dir is not None:
            config = config.model_copy(update={"state_dir": self._state_dir})
        check_changes(self._config, config)
        bundle = read_bundle(config.model)
        inspector = self._make_inspector(config, bundle)
        camera = self._camera_for(config) if config.camera != self._config.camera else None
        if camera is not None and camera.signals_pass != self._camera.signals_pass:
            raise ReloadRefused("cannot change while running: camera.pass_output; restart the daemon for that")
        return config, bundle, inspector, camera

    def _reload_and_say(self) -> None:
        self._notifier.send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            self.reload()
        except ReloadRefused:
            pass  # said in an event
        finally:
            self._notifier.send("READY=1")

    # Ending

    def _tear_down(self) -> None:
        self._notifier.send("STOPPING=1")
        self._line.stop.set()
        self._line.triggers.close()
        if "acquisition" in self._workers:  # nothing is numbered any more
            self._ledger.revoke(self._acquisition.ticket)
        self._ledger.give_up(Reason.ENGINE, "the daemon is ending")
        self._line.frames.close()
        self._archive.refuse_snapshots()
        self._serving.end()
        self._replaying.end()
        if "publisher" in self._workers:  # it still hands verdicts to the journal
            self._workers["publisher"].join(_TEARDOWN_S)
        self._passing.end()
        deadline_s = time.monotonic() + _TEARDOWN_S
        self._archive.close()
        if self._journal is not None:
            self._journal.close()
        for worker in self._workers.values():
            worker.join(max(0.0, deadline_s - time.monotonic()))
        if self._notifier.failure:
            self._log.warning("systemd was not told", error=self._notifier.failure)
