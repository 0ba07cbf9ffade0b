"""Basler cameras through pypylon, and the SDK's own emulated ones."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from drivers.camera import CameraError, CameraInfo, CameraLost, DriverMissing, EndOfStream, Fires, Options
from drivers.counter import INVALID_ID, BlockIdCounter
from drivers.frame import Frame, FrameStatus, PixelFormat
from drivers.pacing import Pacer
from drivers.pylon_output import PassLine, PassOutput

_SILENCE_BEFORE_PROBE_S = 2.0
_FAILED_GRABS_BEFORE_REOPEN = 10
_BUFFERS = 8
"""Transport buffers that pylon fills; the station's ring is the queue."""
_LENT_BUFFERS = 4
"""More, for frames that are judged where they lie: two in the engine, the one before them, one that waits."""


class PylonOptions(Options):
    """Options of the `pylon` driver; what is not set stays as the camera has it."""

    driver: Literal["pylon"]
    serial: str | None = None
    user_name: str | None = None
    ip: str | None = None
    pixel_format: PixelFormat | None = None
    exposure_us: float | None = Field(default=None, gt=0)
    gain: float | None = Field(default=None, description="in the camera's own unit (dB or raw)")
    width: int | None = Field(default=None, ge=1)
    height: int | None = Field(default=None, ge=1)
    offset_x: int | None = Field(default=None, ge=0)
    offset_y: int | None = Field(default=None, ge=0)
    rate_fps: float | None = Field(default=None, gt=0, description="the camera's own rate in free run")
    trigger: Literal["free_run", "software", "command", "hardware"] = Field(
        default="free_run", description="software: we fire as soon as the camera is ready; command: when asked to"
    )
    trigger_rate_hz: float | None = Field(
        default=None, gt=0, description="software triggers a second; None: as soon as the camera is ready"
    )
    trigger_line: str = "Line1"
    trigger_activation: Literal["RisingEdge", "FallingEdge"] = "RisingEdge"
    trigger_timeout_ms: int = Field(default=1000, ge=1, description="a software trigger without a frame")
    frames: int | None = Field(default=None, ge=1, description="stop after so many; None: never")
    pass_output: PassOutput | None = Field(default=None, description="pulse an output line for each OK part")
    features: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="further GenICam features by name, written in this order"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        chosen = [name for name in ("serial", "user_name", "ip") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"choose the camera by one of serial, user_name or ip, not {' and '.join(chosen)}")
        if self.trigger_rate_hz is not None and self.trigger != "software":
            raise ValueError("trigger_rate_hz needs trigger: software")
        if self.rate_fps is not None and self.trigger != "free_run":
            raise ValueError("rate_fps is for trigger: free_run; a triggered camera follows its triggers")
        return self

    @property
    def inverter_configured(self) -> bool:
        """Tell whether `features` say if the pass output's line is inverted; another line's do not."""
        line = None if self.pass_output is None else self.pass_output.line
        return "LineInverter" in self.features and self.features.get("LineSelector") == line


def import_pylon() -> Any:
    """Import pypylon's `pylon` module. Raises DriverMissing with the extra to install."""
    try:
        from pypylon import pylon
    except ImportError as error:
        raise DriverMissing(f"the pylon driver needs pypylon ({error}): pip install 'inspectord[pylon]'") from error
    return pylon


class PylonCamera:
    """One Basler camera, grabbed OneByOne so that pylon itself never skips a frame."""

    live: ClassVar[bool] = True

    def __init__(self, options: PylonOptions) -> None:
        self._pylon = import_pylon()
        from pypylon import genicam

        self._genicam = genicam
        self._options = options
        self.signals_pass = options.pass_output is not None
        self._pass_line: PassLine | None = None
        self.fires = _FIRES.get(options.trigger, Fires.ITSELF)
        self._pacer = Pacer(options.trigger_rate_hz)
        self._camera: Any = None
        self._source = ""
        self._pixel_format = PixelFormat.MONO8
        self._ids = BlockIdCounter()
        self._failed_in_a_row = 0
        self._heard_s = 0.0
        self._count = 0
        self._ready_buffers: Any = None
        self._lost_because: str | None = None
        self._device_class = ""
        self._tick_ns: int | Fraction = 1
        self._triggered_ns: int | None = None
        """When the trigger was fired whose frame has not come yet."""
        self._late_frame_possible = False

    def open(self) -> CameraInfo:
        """Find, open and configure the camera, then start grabbing."""
        try:
            return self._open()
        except self._genicam.GenericException as error:
            self.close()
            raise CameraError(_first_line(error)) from error

    def _open(self) -> CameraInfo:
        pylon, options = self._pylon, self._options
        self._camera = camera = pylon.InstantCamera(pylon.TlFactory.GetInstance().CreateDevice(self._find()))
        camera.Open()
        self._write_features()
        # Read back: a camera may round what it was given.
        name = _GENICAM_ALIASES.get(camera.PixelFormat.Value, camera.PixelFormat.Value)
        try:
            self._pixel_format = PixelFormat(name)
        except ValueError:
            raise CameraError(
                f"the camera delivers {name}; set pixel_format to one of "
                + ", ".join(f.value for f in PixelFormat if _genicam_name(camera, f) is not None)
            ) from None
        info = camera.GetDeviceInfo()
        self._source = info.GetSerialNumber()
        self._device_class = info.GetDeviceClass()
        self._tick_ns = self._read_tick_ns()
        self._failed_in_a_row, self._lost_because = 0, None
        self._heard_s = time.monotonic()
        if options.pass_output is not None:
            self._pass_line = PassLine(camera, options.pass_output, inverter_configured=options.inverter_configured)
        camera.MaxNumBuffer.Value = _BUFFERS + _LENT_BUFFERS
        self._start_grabbing()
        return CameraInfo(
            self._source,
            f"{info.GetVendorName()} {info.GetModelName()} ({info.GetDeviceClass()}), trigger {options.trigger}",
            camera.Width.Value,
            camera.Height.Value,
            self._pixel_format,
            lends=_LENT_BUFFERS,
        )

    def _find(self) -> Any:
        options = self._options
        devices = self._pylon.TlFactory.GetInstance().EnumerateDevices()
        wanted: dict[str, tuple[str | None, Callable[[Any], str]]] = {
            "serial": (options.serial, lambda d: d.GetSerialNumber()),
            "user_name": (options.user_name, lambda d: d.GetUserDefinedName()),
            "ip": (options.ip, lambda d: d.GetIpAddress() if d.IsIpAddressAvailable() else ""),
        }
        found = ", ".join(f"{d.GetModelName()} {d.GetSerialNumber()}" for d in devices) or "none"
        for name, (value, read) in wanted.items():
            if value is not None:
                for device in devices:
                    if read(device) == value:
                        return device
                raise CameraError(f"no camera with {name} {value!r}; connected: {found}")
        if not devices:
            raise CameraError("no Basler camera found; check cable, power and network adapter")
        if len(devices) > 1:
            raise CameraError(f"several cameras are connected; choose one by serial, of: {found}")
        return devices[0]

    def _write_features(self) -> None:
        options, camera = self._options, self._camera
        if options.pixel_format is not None:
            name = _genicam_name(camera, options.pixel_format)
            if name is None:
                offered = ", ".join(f.value for f in PixelFormat if _genicam_name(camera, f) is not None)
                raise CameraError(f"the camera has no {options.pixel_format.value}; it offers {offered}")
            camera.PixelFormat.Value = name
        # An offset is limited by the present width, so offsets go to zero before sizes grow.
        if any(v is not None for v in (options.width, options.height, options.offset_x, options.offset_y)):
            self._write("offset_x", 0, "OffsetX")
            self._write("offset_y", 0, "OffsetY")
        self._write("width", options.width, "Width")
        self._write("height", options.height, "Height")
        self._write("offset_x", options.offset_x, "OffsetX")
        self._write("offset_y", options.offset_y, "OffsetY")
        self._write("exposure_us", options.exposure_us, "ExposureTime", "ExposureTimeAbs")
        # Decibels where the camera has them; its raw steps are another unit.
        has_gain = self._camera.GetNodeMap().GetNode("Gain") is not None
        self._write("gain", options.gain, "Gain" if has_gain else "GainRaw")
        if options.rate_fps is not None:
            self._write("rate_fps", True, "AcquisitionFrameRateEnable")
            self._write("rate_fps", options.rate_fps, "AcquisitionFrameRate", "AcquisitionFrameRateAbs")
        camera.AcquisitionMode.Value = "Continuous"
        camera.TriggerSelector.Value = "FrameStart"
        if options.trigger == "free_run":
            camera.TriggerMode.Value = "Off"
        else:
            # A rate limit left over in the camera would make it ignore triggers (and hangs the emulator).
            if camera.GetNodeMap().GetNode("AcquisitionFrameRateEnable") is not None:
                self._write("trigger", False, "AcquisitionFrameRateEnable")
            camera.TriggerSource.Value = options.trigger_line if options.trigger == "hardware" else "Software"
            if options.trigger == "hardware":
                camera.TriggerActivation.Value = options.trigger_activation
            camera.TriggerMode.Value = "On"
        for name, value in options.features.items():
            self._write(f"features.{name}", value, name)

    def _write(self, option: str, value: bool | int | float | str | None, *nodes: str) -> None:
        """Write a feature under each of its names that the camera has (SFNC's, and the one before it).

        Cameras have one of them; the emulator has both and obeys the older one.
        """
        if value is None:
            return
        written = False
        node_map = self._camera.GetNodeMap()
        for name in nodes:
            node = node_map.GetNode(name)
            if node is None or not self._genicam.IsImplemented(node):
                continue
            try:
                if isinstance(node, self._genicam.ICommand):
                    node.Execute()
                elif isinstance(node, self._genicam.IInteger):
                    node.SetValue(_whole_number(value))
                elif isinstance(node, self._genicam.IFloat):
                    node.SetValue(_number(value))
                elif isinstance(node, self._genicam.IBoolean):
                    node.SetValue(_truth(value))
                elif isinstance(value, bool):  # as YAML reads an enumeration's Off and On
                    node.FromString("On" if value else "Off")
                else:
                    node.FromString(str(value))
            except (self._genicam.GenericException, TypeError, ValueError, OverflowError) as error:
                raise CameraError(f"{option}: {value!r} was refused by {name}: {_first_line(error)}") from error
            written = True
        if not written:
            raise CameraError(f"{option}: this camera has no feature {' or '.join(nodes)}")

    def _make_counter(self) -> BlockIdCounter:
        if self._device_class != "BaslerGigE":
            return BlockIdCounter.usb()
        node = self._camera.GetNodeMap().GetNode("GevGVSPExtendedIDMode")
        extended = node is not None and self._genicam.IsReadable(node) and node.ToString() == "On"
        return BlockIdCounter.gige_extended() if extended else BlockIdCounter.gige()

    def _read_tick_ns(self) -> int | Fraction:
        """Return how long a tick of the camera's clock is: nanoseconds on USB, often longer on GigE."""
        node = self._camera.GetNodeMap().GetNode("GevTimestampTickFrequency")
        if self._device_class != "BaslerGigE" or node is None or not self._genicam.IsReadable(node):
            return 1
        return Fraction(10**9, node.GetValue() or 10**9)

    def ready(self, timeout_s: float) -> bool:
        """Wait until the camera takes a trigger: those sent earlier collapse into one."""
        self._check_count()
        self._check_usable()
        with self._lost():
            if not self._pacer.wait(timeout_s):
                return False
            if self._late_frame_possible:
                # The frame that was given up may still come and must not pass for the next trigger's.
                self._camera.StopGrabbing()
                self._start_grabbing()
            timeout_ms = max(1, int(timeout_s * 1000))
            if self._camera.WaitForFrameTriggerReady(timeout_ms, self._pylon.TimeoutHandling_Return):
                return True
            if time.monotonic() - self._heard_s > _SILENCE_BEFORE_PROBE_S:
                self._probe()
            return False

    def fire(self) -> None:
        """Fire one software trigger."""
        with self._lost():
            self._triggered_ns = time.monotonic_ns()
            self._camera.ExecuteSoftwareTrigger()

    def grab(self, timeout_s: float) -> list[Frame]:
        """Wait for the next frame; after `fire`, report the trigger that brought none in time.

        Without a timeout, what came before a camera was lost can still be had.
        """
        self._check_count()
        if timeout_s > 0 or self._camera is None:
            self._check_usable()
        with self._lost():
            frames = self._retrieve(self._shortened(timeout_s))
        if not frames and self._trigger_left_s() <= 0:
            waited = f"no frame within {self._options.trigger_timeout_ms} ms of the trigger"
            frames = [Frame(FrameStatus.TIMEOUT, self._source, detail=waited)]
            self._late_frame_possible = True
        if frames:
            self._triggered_ns = None
        self._count += len(frames)
        return frames

    def signal_pass(self, until_ns: int) -> None:
        """Pulse the output line; raises CameraLost while the camera is away."""
        line = self._pass_line
        if line is None:
            if self.signals_pass:
                raise CameraLost("the camera is away")
            return
        with self._lost():
            line.pulse(until_ns)

    def _check_count(self) -> None:
        if self._options.frames is not None and self._count >= self._options.frames:
            raise EndOfStream

    def _check_usable(self) -> None:
        if self._pass_line is not None and self._pass_line.stuck is not None:
            # It passes whatever comes until it is off, as opening the camera leaves it.
            self._lost_because = f"the output line could not be switched off: {_first_line(self._pass_line.stuck)}"
        if self._camera is None or self._lost_because:
            raise CameraLost(self._lost_because or "the camera is not open")

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        """Turn the SDK's exceptions into the loss of the camera."""
        try:
            yield
        except self._genicam.GenericException as error:
            raise CameraLost(_first_line(error)) from error

    def _trigger_left_s(self) -> float:
        """Return how long the fired trigger's frame may still take; infinity without one."""
        if self._triggered_ns is None:
            return math.inf
        return self._options.trigger_timeout_ms / 1000 - (time.monotonic_ns() - self._triggered_ns) / 1e9

    def _shortened(self, timeout_s: float) -> float:
        return max(0.0, min(timeout_s, self._trigger_left_s()))

    def _start_grabbing(self) -> None:
        """Begin an acquisition; the camera's block ids begin anew with it."""
        self._ids = self._make_counter()
        self._triggered_ns, self._late_frame_possible = None, False
        self._arrivals = Arrivals()
        self._ready_buffers = self._camera.NumReadyBuffers  # looking it up takes longer than reading it
        self._camera.StartGrabbing(self._pylon.GrabStrategy_OneByOne)
        began_ns = time.monotonic_ns()
        self._arrivals.look(self._ready_buffers.GetValue(), began_ns)

    def _retrieve(self, timeout_s: float) -> list[Frame]:
        timeout_ms = max(1, int(timeout_s * 1000))
        # All times are of before a look, not after it: we may have been held up in between.
        began_ns = time.monotonic_ns()
        waiting = self._ready_buffers.GetValue()
        self._arrivals.look(waiting, began_ns)
        result = self._camera.RetrieveResult(timeout_ms, self._pylon.TimeoutHandling_Return)
        waited_until_ns = min(time.monotonic_ns(), began_ns + timeout_ms * 1_000_000)
        if result is None or not result.IsValid():
            self._arrivals.look(0, waited_until_ns)
            if time.monotonic() - self._heard_s > _SILENCE_BEFORE_PROBE_S:
                self._probe()
            return []
        arrived_ns = self._arrivals.take(None if waiting else waited_until_ns)
        taken_ns = time.monotonic_ns()
        self._arrivals.look(self._ready_buffers.GetValue(), taken_ns)
        self._heard_s = time.monotonic()
        block_id = int(result.BlockID)
        device_id = None if block_id == INVALID_ID else block_id
        frames = [
            Frame(FrameStatus.LOST, self._source, detail=f"the camera's block id jumped to {block_id}")
            for _ in range(self._ids.missing_before(block_id))
        ]
        if not result.GrabSucceeded():
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= _FAILED_GRABS_BEFORE_REOPEN:
                self._lost_because = f"{self._failed_in_a_row} grabs failed in a row"
            failure = f"{result.GetErrorDescription()} (0x{result.GetErrorCode() & 0xFFFFFFFF:08x})"
            frames.append(self._incomplete(failure, device_id, arrived_ns))
            return frames
        self._failed_in_a_row = 0
        shape = (result.Height, result.Width) + ((3,) if self._pixel_format.channels == 3 else ())
        samples = np.asarray(_Lent(result, self._pixel_format))
        if samples.size != math.prod(shape):
            problem = f"{samples.size} samples do not fill {shape} {self._pixel_format.value}"
            frames.append(self._incomplete(problem, device_id, arrived_ns))
            return frames
        frames.append(
            Frame(
                FrameStatus.COMPLETE,
                self._source,
                image=samples.reshape(shape),
                pixel_format=self._pixel_format,
                device_id=device_id,
                device_timestamp_ns=int(result.TimeStamp * self._tick_ns) or None,
                arrived_ns=arrived_ns,
            )
        )
        return frames

    def _incomplete(self, detail: str, device_id: int | None, arrived_ns: int) -> Frame:
        return Frame(
            FrameStatus.INCOMPLETE, self._source, device_id=device_id, detail=detail, arrived_ns=arrived_ns
        )

    def _probe(self) -> None:
        """Ask a silent camera whether it is still there; the removal callback is sometimes missed."""
        self._heard_s = time.monotonic()
        if self._camera.IsCameraDeviceRemoved() or not self._camera.IsGrabbing():
            raise CameraLost("the camera was removed or stopped grabbing")
        if not self._camera.NumQueuedBuffers.GetValue():
            raise CameraLost("somebody keeps all of the driver's buffers")
        self._camera.Width.GetValue(True)  # verify: reads the device, not the cache

    def close(self) -> None:
        """Stop grabbing and close the device, whatever state it is in."""
        camera, self._camera = self._camera, None
        line, self._pass_line = self._pass_line, None
        self._ready_buffers = None
        if camera is None:
            return
        end_passing = [] if line is None else [line.close]
        for step in (*end_passing, camera.StopGrabbing, camera.Close, camera.DestroyDevice):
            # A device that is gone refuses each step of its own closing; the next steps still matter.
            with contextlib.suppress(self._genicam.GenericException):
                step()


class Arrivals:
    """When frames arrived that waited in the driver's queue: no sooner than the last look that did not count them.

    Their deadlines run while our thread is held up, in a slow call or by the operating system: a part that waited
    is late, and must not pass another that stands at the gate by now.
    """

    def __init__(self) -> None:
        self._taken = 0
        self._after_ns = self._last_ns = time.monotonic_ns()
        self._looks: deque[tuple[int, int]] = deque()
        """How many frames had come in all, and when that was; the last look of each number."""

    def look(self, waiting: int, at_ns: int) -> None:
        """Note that so many frames waited in the queue at some time, and no more."""
        come = self._taken + waiting
        if self._looks and self._looks[-1][0] >= come:
            self._looks.pop()
        self._looks.append((come, at_ns))

    def take(self, came_by_ns: int | None) -> int:
        """Return when the frame arrived that was just taken.

        Args:
            came_by_ns: when the wait for it was over; None: it was there already.
        """
        self._taken += 1
        while self._looks and self._looks[0][0] < self._taken:
            self._after_ns = self._looks.popleft()[1]
        # Never before the frame that came before it: of two that came during one wait the first has its end.
        self._last_ns = max(self._last_ns, self._after_ns if came_by_ns is None else came_by_ns)
        return self._last_ns


class _Lent:
    """pylon's buffer, for an array that keeps it: pylon takes it again when no array refers to it any more.

    Its memory is valid until then, even when the camera has been closed.
    """

    def __init__(self, result: Any, pixel_format: PixelFormat) -> None:
        self._result = result
        view = result.GetImageMemoryView()  # without chunk data, which may follow
        self.__array_interface__ = np.frombuffer(view, pixel_format.dtype).__array_interface__


_FIRES = {"software": Fires.WHEN_READY, "command": Fires.ON_COMMAND}

_GENICAM_ALIASES = {"BGR8Packed": "BGR8", "RGB8Packed": "RGB8"}
"""Names from before PFNC 1.1, which older cameras and the emulator use."""


def _genicam_name(camera: Any, pixel_format: PixelFormat) -> str | None:
    """Return the camera's own name for a pixel format, None where it does not offer it."""
    for name in camera.PixelFormat.Symbolics:
        if _GENICAM_ALIASES.get(name, name) == pixel_format.value:
            return str(name)
    return None


def _whole_number(value: float | str) -> int:
    number = _number(value)
    if not number.is_integer():
        raise TypeError("it wants a whole number")
    return int(value)


def _number(value: float | str) -> float:
    if isinstance(value, bool):
        raise TypeError("it wants a number")
    return float(value)


def _truth(value: float | str) -> bool:
    truth = {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
    if truth is None:
        raise ValueError("it wants true or false")
    return truth


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
