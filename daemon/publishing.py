"""The publisher thread: owns the sockets and sends each verdict exactly once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog
import zmq

from daemon.channels import Channel, End, Judged, Probe
from daemon.messages import (
    MAP_SCHEMA,
    VERDICT_SCHEMA,
    HealthMessage,
    LatencyMessage,
    MapMessage,
    VerdictMessage,
    encode,
    frame_message,
    map_bytes,
    region_messages,
    rfc3339,
)
from daemon.sequence import SequenceFile
from daemon.tally import Tally
from pipeline.inspect import Outcome

_VERDICT_HIGH_WATER_MARK = 20_000
"""Messages kept for a subscriber that reads too slowly, before it loses the newest."""
_MAP_HIGH_WATER_MARK = 4
_LINGER_MS = 2000


class EndpointError(Exception):
    """An endpoint cannot be bound or connected; the message names it and says why."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What every message of this run carries."""

    station: str
    boot: str
    model: str
    calibration: str
    threshold: float
    geometry: dict[str, Any]


class Publishing:
    """Send what the engine judged; PUB sockets never make the sender wait."""

    def __init__(
        self,
        identity: Identity,
        verdict_endpoints: Sequence[str],
        map_endpoints: Sequence[str],
        source: Channel[Judged | HealthMessage | Probe | End],
        sequences: SequenceFile,
        tally: Tally,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._identity = identity
        self._verdict_endpoints = verdict_endpoints
        self._map_endpoints = map_endpoints
        self._source = source
        self._sequences = sequences
        self._tally = tally
        self._log = log
        self.ready: Future[None] = Future()
        """Done when every endpoint is bound; holds the exception when one could not be."""
        self.probe_seen = 0
        """Number of the last probe that came all the way through."""
        self.first_grab_ns: int | None = None
        self.last_sent_ns = 0
        station = identity.station
        # Topics end with a slash, so that a filter for station1 does not match station10.
        self._verdict_topic = f"verdict/{station}/".encode()
        self._map_topic = f"map/{station}/".encode()
        self._health_topic = f"health/{station}/".encode()

    def run(self) -> None:
        """Bind, then publish until End."""
        context = zmq.Context()
        try:
            try:
                verdicts = _bind(context, self._verdict_endpoints, _VERDICT_HIGH_WATER_MARK)
                maps = _bind(context, self._map_endpoints, _MAP_HIGH_WATER_MARK)
            except BaseException as error:
                self.ready.set_exception(error)
                raise
            self.ready.set_result(None)
            while not isinstance(item := self._source.get(), End):
                if isinstance(item, Judged):
                    self._publish(item, verdicts, maps)
                elif isinstance(item, HealthMessage):
                    verdicts.send_multipart([self._health_topic, encode(item)])
                else:
                    self.probe_seen = item.number
        finally:
            context.destroy(linger=_LINGER_MS)

    def _publish(self, item: Judged, verdicts: zmq.Socket[bytes], maps: zmq.Socket[bytes]) -> None:
        frame, inspection, identity = item.frame, item.inspection, self._identity
        now_ns = time.monotonic_ns()
        measured = item.judging_began_ns > 0
        latency = LatencyMessage(
            grab=_us(frame.grabbed_ns - frame.arrived_ns) if measured else 0,
            queue=_us(item.judging_began_ns - frame.grabbed_ns) if measured else 0,
            preprocess=_us(inspection.preprocess_ns),
            infer=_us(inspection.infer_ns),
            total=_us(now_ns - frame.arrived_ns) if measured else 0,
        )
        verdict = VerdictMessage(
            schema=VERDICT_SCHEMA,
            station=identity.station,
            boot=identity.boot,
            sequence=frame.sequence,
            verdict=inspection.outcome.value,
            reason=None if inspection.reason is None else inspection.reason.value,
            score=inspection.score,
            threshold=identity.threshold,
            regions=region_messages(inspection),
            source=frame.source,
            part=None,
            trigger=None,
            recipe=None,
            frame=frame_message(frame),
            model=identity.model,
            calibration=identity.calibration,
            time=rfc3339(frame.wall_ns),
            latency_us=latency,
        )
        verdicts.send_multipart([self._verdict_topic, encode(verdict)])
        self._sequences.mark_published(frame.sequence)
        inspected = inspection.outcome is not Outcome.INVALID
        self._tally.published(
            frame.sequence,
            inspection.outcome,
            inspection.reason,
            msgspec.structs.astuple(latency) if inspected else None,
        )
        if inspection.anomaly_map is not None and self._map_endpoints:
            described = MapMessage(
                schema=MAP_SCHEMA,
                station=identity.station,
                boot=identity.boot,
                sequence=frame.sequence,
                dtype="<f4",
                shape=list(inspection.anomaly_map.shape),
                geometry=identity.geometry,
                score=inspection.score,
                threshold=identity.threshold,
            )
            maps.send_multipart([self._map_topic, encode(described), map_bytes(inspection.anomaly_map)])
        if self.first_grab_ns is None and measured:
            self.first_grab_ns = frame.arrived_ns
        self.last_sent_ns = now_ns
        self._log.debug("verdict", sequence=frame.sequence, verdict=verdict.verdict, score=inspection.score)


def _bind(context: zmq.Context[Any], endpoints: Sequence[str], high_water_mark: int) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = context.socket(zmq.PUB)
    socket.setsockopt(zmq.SNDHWM, high_water_mark)
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.setsockopt(zmq.IPV6, any("[" in endpoint for endpoint in endpoints))
    for endpoint in endpoints:
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise EndpointError(f"cannot bind {endpoint}: {error.strerror}") from error
    return socket


def _us(ns: int) -> int:
    return max(0, ns) // 1000
