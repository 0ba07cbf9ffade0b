"""The CPU engine: OpenCV preprocessing and OpenVINO, for PCs without a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from drivers.frame import Image, PixelFormat
from pipeline.bundle import Model
from pipeline.engine import Precision, Prepared, RawMaps
from pipeline.folded import fold
from pipeline.geometry import Geometry
from pipeline.openvino_graph import Part, Ranges, build_graph, build_observer
from pipeline.preprocess import Preprocessor
from pipeline.scoring import FloatMap

CORE = ov.Core()
"""The only one of the process. Where the processor has AMX, each gives its thread a stack for signals; when two do
not end in the reverse order of their making, one is left that is no longer there: the next Ctrl-C is a crash."""
_Run = Callable[..., list[NDArray[np.float32]]]
"""One part of the networks: arrays in, arrays out."""
_NEEDS = {"fp32": "FP32", "bf16": "BF16", "int8": "INT8"}


def cpu_precisions() -> list[Precision]:
    """List the precisions that this processor computes in."""
    able = set(CORE.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return [precision for precision, needed in _NEEDS.items() if needed in able]  # type: ignore[misc]


class CpuEngine:
    """The folded networks on the CPU."""

    def __init__(
        self, model: Model, threads: int | None = None, precision: Precision = "fp32", *, pin_threads: bool = False
    ) -> None:
        """Build and compile the networks.

        Args:
            model: networks and preprocessing.
            threads: None: one for each core that this process may use.
            precision: `int8` needs the model's activation ranges.
            pin_threads: bind each to a core of its own.

        Raises KeyError when the model has no ranges for int8.
        """
        self.device, self.precision = "cpu", precision
        self._preprocess = Preprocessor(model.preprocess)
        self._geometry = model.geometry
        folded = fold(model.size, model.geometry, model.weights)
        ranges = model.ranges if precision == "int8" else None
        options = compile_options(precision, threads, pin_threads=pin_threads)
        self._parts = [
            _run_of(build_graph(folded, part, ranges, winograd=precision == "fp32"), options)
            for part in _parts_of(model.geometry)
        ]

    def warm_up(self) -> None:
        """Run once on an empty picture."""
        g = self._geometry
        self.infer(np.zeros((3, g.image_height, g.image_width), np.float32))

    def raw_maps(self, image: Image, fmt: PixelFormat) -> RawMaps:
        """Compute the raw maps of one frame."""
        start_ns = time.perf_counter_ns()
        prepared = self._preprocess(image, fmt)
        ready_ns = time.perf_counter_ns()
        maps = self.infer(prepared)
        return RawMaps(*maps, preprocess_ns=ready_ns - start_ns, infer_ns=time.perf_counter_ns() - ready_ns)

    def infer(self, prepared: Prepared) -> tuple[FloatMap, FloatMap]:
        """Compute the raw maps of one prepared image, (map_height, map_width) each."""
        return _maps(self._parts, self._geometry, prepared)


def compile_options(precision: Precision, threads: int | None, *, pin_threads: bool = False) -> dict[str, Any]:
    """Return OpenVINO's options for one image at a time."""
    return {
        # Beside int8, what is left in float is faster in bfloat16.
        "INFERENCE_PRECISION_HINT": "bf16" if precision != "fp32" and "bf16" in cpu_precisions() else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads or 0,
        "ENABLE_CPU_PINNING": pin_threads,
    }


def observe_ranges(model: Model, images: Iterable[Prepared], threads: int | None = None) -> Ranges:
    """Return the largest magnitude at each convolution's input over some images, tile by tile where tiled."""
    folded = fold(model.size, model.geometry, model.weights)
    largest: dict[str, float] = {}

    def observing(part: Part) -> _Run:
        graph, names = build_observer(folded, part)
        run = _run_of(graph, compile_options("fp32", threads))

        def run_and_look(*inputs: NDArray[np.float32]) -> list[NDArray[np.float32]]:
            seen, *results = run(*inputs)
            for name, value in zip(names, seen.tolist(), strict=True):
                largest[name] = max(value, largest.get(name, 0.0))
            return results

        return run_and_look

    parts = [observing(part) for part in _parts_of(model.geometry)]
    for image in images:
        _maps(parts, model.geometry, image)
    return largest


def _parts_of(geometry: Geometry) -> list[Part]:
    return ["prediction", "tile"] if geometry.is_tiled else ["whole"]


def _run_of(graph: ov.Model, options: dict[str, Any]) -> _Run:
    """Compile a graph; the results of a run are copies, for the request reuses its memory."""
    request = CORE.compile_model(graph, "CPU", options).create_infer_request()

    def run(*inputs: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        request.infer(list(inputs), share_inputs=True)
        return [output.data.copy() for output in request.output_tensors]

    return run


def _maps(parts: Sequence[_Run], geometry: Geometry, prepared: Prepared) -> tuple[FloatMap, FloatMap]:
    """Run the parts (`_parts_of`) on one image."""
    image = prepared[None]
    if not geometry.is_tiled:
        st, ae = parts[0](image)
        return st, ae
    prediction, tiles = parts
    (predicted,) = prediction(image)
    map_st, map_ae = np.empty((2, geometry.map_height, geometry.map_width), np.float32)
    for tile in geometry.tiles():
        piece = np.ascontiguousarray(image[:, :, tile.y_px, tile.x_px])
        expected = np.ascontiguousarray(predicted[:, :, tile.rows, tile.columns])
        map_st[tile.rows, tile.columns], map_ae[tile.rows, tile.columns] = tiles(piece, expected)
    return map_st, map_ae
