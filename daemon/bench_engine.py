"""`inspectord bench engine`: the engines beside the published implementation, each in a process of its own.

The processes are fresh and take turns in small rounds, so that a machine that slows down slows all sides down.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from daemon.ring import Slot
from drivers.frame import Image, PixelFormat
from pipeline.architecture import TEACHER_CHANNELS, PdnSize
from pipeline.bundle import Model
from pipeline.engine import CalibratedEngine, Pending, Precision
from pipeline.engines import frame_memory
from pipeline.folded import Filters, fold
from pipeline.geometry import Geometry
from pipeline.machine import describe_machine, usable_cores
from pipeline.networks import EfficientAD, weights_of
from pipeline.preprocess import PreprocessSpec

_ROUNDS = 10
_WARM_UP = 3
_AT_LEAST = 3
"""Runs in each turn, after one that finds the caches as the others left them."""
_LIMIT_CHANNELS, _LIMIT_SIDE_PX, _LIMIT_LAYERS = 512, 64, 6
_LIMIT_TRIES = 10
_SATURATED_AT_LEAST = 12
"""Frames, of which the first and the last few do not overlap."""
_SPREAD = 0.05
"""Standard deviation of a random model's channel statistics and biases."""
_ANSWER_S = 600.0

EngineName = Literal["reference", "cpu", "cuda"]


@dataclass(frozen=True)
class FrameOf:
    """What a camera would deliver."""

    width: int
    height: int
    pixel_format: PixelFormat


@dataclass(frozen=True)
class Side:
    """One engine to be timed."""

    engine: EngineName
    precision: Precision
    size: PdnSize
    geometry: Geometry
    threads: int | None
    reference_device: Literal["cpu", "cuda"] = "cpu"
    frame: FrameOf | None = None
    """Our engines begin with such a frame in host memory; None: with a prepared image, as the reference does."""


class Answer(NamedTuple):
    """What a side's process says of one round."""

    peak_memory_mib: float
    """Largest resident memory so far."""
    device_memory_mib: float | None
    """Largest memory of the GPU that PyTorch has reserved so far; None on the CPU."""
    took_ms: list[float]
    saturated_fps: float | None
    """Rate when as many frames as the engine takes at once are always on their way; only from frames."""


class _Timed(NamedTuple):
    """What a side is timed at."""

    once: Callable[[], object]
    saturated: Callable[[int], object] | None
    """So many frames as fast as they are taken."""


class SideFailed(Exception):
    """A side's process ended or raised; the message says which."""


def bench_engine(
    sides: list[Side], seconds: float, on_round: Callable[[int, int], None], *, limits: bool = True
) -> dict[str, Any]:
    """Time the sides in turns.

    Args:
        sides: of any sizes; each is compared with the reference of its size, where there is one.
        seconds: wanted for each side.
        on_round: told how many of how many rounds are done.
        limits: measure what the machine can do at most, too.

    Returns:
        `{"machine": …, "results": […]}`; times in milliseconds.

    Raises SideFailed.
    """
    with ExitStack() as stack:
        asking, latest = [], []
        for side in sides:  # one after the other: a GPU's algorithms are chosen by timing them
            asking.append(stack.enter_context(_process(side)))
            latest.append(asking[-1](_WARM_UP))
        once_ms = [min(answer.took_ms) for answer in latest]
        times: list[list[float]] = [[] for _ in sides]
        rates: list[list[float]] = [[] for _ in sides]
        for turn in range(_ROUNDS):
            for index, ask in enumerate(asking):
                count = max(_AT_LEAST, round(seconds * 1000 / _ROUNDS / once_ms[index]))
                latest[index] = ask(count)
                times[index] += latest[index].took_ms
                if (rate := latest[index].saturated_fps) is not None:
                    rates[index].append(rate)
            on_round(turn + 1, _ROUNDS)
    device = "cuda" if any(side.engine == "cuda" for side in sides) else "cpu"
    threads = sides[0].threads or usable_cores()
    gmac_per_s = _machine_limits(threads) if limits and device == "cpu" else {}
    medians = [statistics.median(took) for took in times]
    base = {side.size: medians[index] for index, side in enumerate(sides) if side.engine == "reference"}
    results = []
    for index, side in enumerate(sides):
        published = gigamacs(side.size, side.geometry)
        computed = _computed_gigamacs(side) if side.engine == "cpu" and side.precision == "fp32" else published
        limit = gmac_per_s.get(side.precision)
        results.append(
            {
                "engine": side.engine,
                "precision": _computed_in(side),
                "size": side.size,
                "image_size": [side.geometry.image_width, side.geometry.image_height],
                "tiles": [side.geometry.tile_rows, side.geometry.tile_columns],
                "frame": None if side.frame is None or side.engine == "reference" else asdict(side.frame),
                "runs": len(times[index]),
                "median_ms": medians[index],
                "p10_ms": float(np.percentile(times[index], 10)),
                "p90_ms": float(np.percentile(times[index], 90)),
                "p99_ms": float(np.percentile(times[index], 99)),
                "saturated_fps": statistics.median(rates[index]) if rates[index] else None,
                "peak_memory_mib": latest[index].peak_memory_mib,
                "device_memory_mib": latest[index].device_memory_mib,
                "ratio_to_reference": base[side.size] / medians[index] if side.size in base else None,
                "gmac": published,
                "gmac_computed": computed,
                "limit_ms": None if limit is None else computed / limit * 1000,
            }
        )
    machine = describe_machine(device)
    facts = {"engine_threads": threads, "gmac_per_s": gmac_per_s}
    return {"machine": {**machine, **facts}, "results": results}


def _computed_in(side: Side) -> str:
    # As published, and as PyTorch does unless told otherwise: convolutions on CUDA round their input to TF32.
    return "tf32" if side.engine == "reference" and side.reference_device == "cuda" else side.precision


@contextmanager
def _process(side: Side) -> Iterator[Callable[[int], Answer]]:
    """Start a side; yields a function that has it infer so often."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs, asdict(side)), daemon=True)
    process.start()
    theirs.close()

    def ask(count: int) -> Answer:
        try:
            ours.send(count)
            if not ours.poll(_ANSWER_S):
                raise SideFailed(f"{side.engine} {side.precision} {side.size}: no answer within {_ANSWER_S:g} s")
            answer = ours.recv()
        except (EOFError, OSError) as error:
            raise SideFailed(f"{side.engine} {side.precision} {side.size}: its process has ended") from error
        if isinstance(answer, str):
            raise SideFailed(f"{side.engine} {side.precision} {side.size}: {answer}")
        return cast(Answer, answer)

    try:
        yield ask
    finally:
        ours.close()
        process.join(5)
        process.kill()


def _serve(connection: Connection, description: dict[str, Any]) -> None:
    """Be one side: infer as often as asked, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the bench's own affair
    try:
        frame = description["frame"]
        made = {"geometry": Geometry(**description["geometry"]), "frame": frame and FrameOf(**frame)}
        timed = _make_side(Side(**{**description, **made}))
        while True:
            try:
                count = connection.recv()
            except EOFError:
                return
            connection.send(_time(timed, count))
    except Exception as error:  # noqa: BLE001 - told to the other process, which raises it
        connection.send(f"{type(error).__name__}: {error}")


def _time(timed: _Timed, count: int) -> Answer:
    took_ms = []
    timed.once()
    for _ in range(count):
        began_ns = time.perf_counter_ns()
        timed.once()
        took_ms.append((time.perf_counter_ns() - began_ns) / 1e6)
    saturated_fps = None
    if timed.saturated is not None:
        count = max(count, _SATURATED_AT_LEAST)
        began_ns = time.perf_counter_ns()
        timed.saturated(count)
        saturated_fps = count * 1e9 / (time.perf_counter_ns() - began_ns)
    on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    device_mib = torch.cuda.max_memory_reserved() / 2**20 if on_cuda else None
    return Answer(_peak_mib(), device_mib, took_ms, saturated_fps)


def _peak_mib() -> float:
    """Return the largest resident memory of this process; `ru_maxrss` would tell of its parent's, too."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def _make_side(side: Side) -> _Timed:
    """Build a side; returns what is timed."""
    threads = side.threads or usable_cores()  # left to themselves, libraries count differently
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    networks = random_networks(side.size, side.geometry)
    g = side.geometry
    image = np.random.default_rng(0).normal(0, 1, (3, g.image_height, g.image_width)).astype(np.float32)
    if side.engine == "reference":
        reference = Reference(networks, side.reference_device)
        return _Timed(lambda: reference(image), None)
    model = Model(side.size, g, PreprocessSpec(g.image_width, g.image_height), weights_of(networks))
    engine: CalibratedEngine
    if side.engine == "cuda":
        from pipeline.engine_cuda import CudaEngine

        engine = CudaEngine(model, side.precision)
    else:
        from pipeline.engine_cpu import CpuEngine
        from pipeline.openvino_graph import convolution_names

        if side.precision == "int8":
            # What they are makes no difference to speed, and looking would take memory that is not the engine's.
            names = convolution_names(fold(side.size, g, model.weights))
            model = replace(model, ranges=dict.fromkeys(names, 1.0))
        engine = CpuEngine(model, threads, side.precision)
    if side.frame is None:
        return _Timed(lambda: engine.infer(image), None)
    fmt, frame = side.frame.pixel_format, _noise(side.frame, side.engine)

    def saturated(count: int) -> None:
        waiting: deque[Pending] = deque()
        for _ in range(count):
            if len(waiting) == engine.at_once:
                waiting.popleft()()
            waiting.append(engine.begin(frame, fmt))
        for finish in waiting:
            finish()

    return _Timed(lambda: engine.begin(frame, fmt)(), saturated)


def _noise(of: FrameOf, device: Literal["cpu", "cuda"]) -> Image:
    """Fill a frame in the memory that a station would have for it."""
    fmt = of.pixel_format
    shape = (of.height, of.width) + ((3,) if fmt.channels == 3 else ())
    rng, largest = np.random.default_rng(0), fmt.max_value + 1
    drawn: Image = (
        rng.integers(0, largest, shape, np.uint8) if fmt.bits == 8 else rng.integers(0, largest, shape, np.uint16)
    )
    return Slot(frame_memory(device)).store(drawn)


def random_networks(size: PdnSize, geometry: Geometry) -> EfficientAD:
    """Make networks with seeded random weights: their speed is that of trained ones."""
    torch.manual_seed(0)
    networks = EfficientAD(size, geometry).eval()
    networks.teacher_mean.normal_(0, _SPREAD)
    networks.teacher_std.uniform_(_SPREAD, 2 * _SPREAD)
    return networks


class Reference:
    """Inference as the public reference does it: eager PyTorch, float32, one network after the other.

    On a GPU that means PyTorch's own default, convolutions in TF32.

    Written out, so that it stays what it is when our own networks get faster.
    """

    def __init__(self, networks: EfficientAD, device: str) -> None:
        self._networks, self._device = networks.to(device), device

    @torch.no_grad()
    def __call__(self, image: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Compute the raw maps of a prepared image, tile by tile where the geometry says so."""
        n = self._networks
        whole = torch.from_numpy(image)[None].to(self._device)
        g = n.geometry
        predicted = n.autoencode(whole)
        map_st, map_ae = (torch.empty(g.map_height, g.map_width) for _ in range(2))
        for tile in g.tiles():
            piece = whole[:, :, tile.y_px, tile.x_px]
            described = (n.teacher(piece) - n.teacher_mean[:, None, None]) / n.teacher_std[:, None, None]
            imitated = n.student(piece)
            expected = predicted[:, :, tile.rows, tile.columns]
            cells = (tile.rows, tile.columns)
            map_st[cells] = torch.mean((described - imitated[:, :TEACHER_CHANNELS]) ** 2, dim=1)[0].cpu()
            map_ae[cells] = torch.mean((expected - imitated[:, TEACHER_CHANNELS:]) ** 2, dim=1)[0].cpu()
        return map_st.numpy(), map_ae.numpy()


def gigamacs(size: PdnSize, geometry: Geometry) -> float:
    """Count the multiplications of all convolutions for one image, untiled, in units of 10⁹."""
    whole = replace(geometry, tile_rows=1, tile_columns=1)
    with torch.device("meta"):
        networks = EfficientAD(size, whole).eval()
        total = 0

        def count(layer: nn.Module, _: object, output: torch.Tensor) -> None:
            nonlocal total
            weight = cast(nn.Conv2d, layer).weight
            total += output.numel() * weight[0].numel()

        for layer in networks.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(count)
        networks.teacher(torch.empty(1, 3, whole.image_height, whole.image_width))
        networks.student(torch.empty(1, 3, whole.image_height, whole.image_width))
        networks.autoencoder(torch.empty(1, 3, 256, 256))
    return total / 1e9


def _computed_gigamacs(side: Side) -> float:
    """Count the multiplications of the CPU engine's graph in float32, untiled, in units of 10⁹."""
    from pipeline.openvino_graph import build_graph

    whole = replace(side.geometry, tile_rows=1, tile_columns=1)
    graph = build_graph(fold(side.size, whole, weights_of(random_networks(side.size, whole))), winograd=True)
    total = 0
    for node in graph.get_ops():
        match node.get_type_name():  # each output is a sum over one filter, or over what two matrices share
            case "Convolution":
                summed = math.prod(node.input(1).get_shape()[1:])
            case "MatMul":
                summed = node.input(0).get_shape()[-1]
            case _:
                continue
        total += math.prod(node.output(0).get_shape()) * summed
    return total / 1e9


def _machine_limits(threads: int) -> dict[str, float]:
    """Measure 10⁹ multiply-accumulates a second of large 3×3 convolutions in a row, at each precision."""
    import openvino as ov
    from openvino import opset13 as op

    from pipeline.engine_cpu import CORE, compile_options, cpu_precisions
    from pipeline.openvino_graph import quantised_convolution

    channels, side = _LIMIT_CHANNELS, _LIMIT_SIDE_PX
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.02, (channels, channels, 3, 3)).astype(np.float32)
    image = rng.random((1, channels, side, side)).astype(np.float32)
    filters = Filters(weight, padding=1)
    work = _LIMIT_LAYERS * channels * channels * 9 * side**2 / 1e9
    found: dict[str, float] = {}
    for precision in cpu_precisions():
        parameter = op.parameter([1, channels, side, side], np.float32)
        node = op.relu(parameter)
        for _ in range(_LIMIT_LAYERS):
            if precision == "int8":
                node = op.relu(quantised_convolution(node, filters, 1.0))
            else:
                node = op.relu(op.convolution(node, op.constant(weight), [1, 1], [1, 1], [1, 1], [1, 1]))
        graph = ov.Model([op.reduce_max(node, np.arange(4))], [parameter], "limit")
        request = CORE.compile_model(graph, "CPU", compile_options(precision, threads)).create_infer_request()
        times = []
        for _ in range(_LIMIT_TRIES):
            began_ns = time.perf_counter_ns()
            request.infer([image], share_inputs=True)
            times.append((time.perf_counter_ns() - began_ns) / 1e9)
        found[precision] = work / min(times)
    return found
