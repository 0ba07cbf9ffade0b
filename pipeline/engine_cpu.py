"""The CPU engine: OpenCV preprocessing and OpenVINO, for PCs without a GPU."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from drivers.frame import Image, PixelFormat
from pipeline.bundle import Model
from pipeline.engine import Pending, Precision, Prepared, RawMaps
from pipeline.folded import fold
from pipeline.geometry import Tile
from pipeline.openvino_graph import Part, Ranges, build_graph, build_observer
from pipeline.preprocess import Preprocessor
from pipeline.scoring import FloatMap

CORE = ov.Core()
"""The only one of the process. Where the processor has AMX, each gives its thread a stack for signals; when two do
not end in the reverse order of their making, one is left that is no longer there: the next Ctrl-C is a crash."""
_NEEDS = {"fp32": "FP32", "bf16": "BF16", "int8": "INT8"}


def cpu_precisions() -> list[Precision]:
    """List the precisions that this processor computes in."""
    able = set(CORE.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return [precision for precision, needed in _NEEDS.items() if needed in able]  # type: ignore[misc]


_AT_ONCE = 2
"""A frame is prepared while the one before it is in the networks. In tiles, where the networks run many times for a
frame, that would be for the first of them only."""


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
        is_tiled = self._geometry.is_tiled
        parts: list[Part] = ["prediction", "tile"] if is_tiled else ["whole"]
        compiled = [
            CORE.compile_model(build_graph(folded, part, ranges, winograd=precision == "fp32"), "CPU", options)
            for part in parts
        ]
        self.at_once = 1 if is_tiled else _AT_ONCE
        self._requests = [_Request(graph) for graph in compiled for _ in range(self.at_once)]
        self._turns = itertools.cycle(self._requests)

    def warm_up(self) -> None:
        """Run once on an empty picture."""
        g = self._geometry
        self.infer(np.zeros((3, g.image_height, g.image_width), np.float32))

    def begin(self, image: Image, fmt: PixelFormat) -> Pending:
        """Prepare one frame and begin with its raw maps."""
        start_ns = time.perf_counter_ns()
        prepared = self._preprocess(image, fmt)
        ready_ns = time.perf_counter_ns()
        wait = self._begin(prepared)

        def finish() -> RawMaps:
            st, ae = wait()
            infer_ns = time.perf_counter_ns() - ready_ns
            return RawMaps(st, ae, preprocess_ns=ready_ns - start_ns, infer_ns=infer_ns)

        return finish

    def _begin(self, prepared: Prepared) -> Callable[[], Sequence[FloatMap]]:
        if self._geometry.is_tiled:
            return lambda: self._by_tiles(prepared[None])
        request = next(self._turns)
        request.start(prepared[None])
        return request.wait

    def infer(self, prepared: Prepared) -> tuple[FloatMap, FloatMap]:
        """Compute the raw maps of one prepared image, (map_height, map_width) each."""
        st, ae = self._begin(prepared)()
        return st, ae

    def _by_tiles(self, image: NDArray[np.float32]) -> tuple[FloatMap, FloatMap]:
        prediction, piece = self._requests
        (predicted,) = prediction.run(image)
        g = self._geometry
        map_st, map_ae = np.empty((2, g.map_height, g.map_width), np.float32)
        for tile in g.tiles():
            maps = piece.run(*_piece(tile, image, predicted))
            map_st[tile.rows, tile.columns], map_ae[tile.rows, tile.columns] = maps
        return map_st, map_ae


class _Request:
    """One inference at a time; results are copies, for OpenVINO uses their memory again."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self._request = compiled.create_infer_request()
        # Looked up once: asking OpenVINO for its results takes longer than copying them.
        self._outputs = [output.data for output in self._request.output_tensors]

    def run(self, *inputs: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        self.start(*inputs)
        return self.wait()

    def start(self, *inputs: NDArray[np.float32]) -> None:
        self._request.start_async(list(inputs), share_inputs=True)

    def wait(self) -> list[NDArray[np.float32]]:
        self._request.wait()
        return [output.copy() for output in self._outputs]


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
    folded, geometry = fold(model.size, model.geometry, model.weights), model.geometry
    largest: dict[str, float] = {}

    def observer(part: Part) -> Callable[..., list[NDArray[np.float32]]]:
        graph, names = build_observer(folded, part)
        request = _Request(CORE.compile_model(graph, "CPU", compile_options("fp32", threads)))

        def observe(*inputs: NDArray[np.float32]) -> list[NDArray[np.float32]]:
            seen, *results = request.run(*inputs)
            for name, value in zip(names, seen.tolist(), strict=True):
                largest[name] = max(value, largest.get(name, 0.0))
            return results

        return observe

    if not geometry.is_tiled:
        whole = observer("whole")
        for image in images:
            whole(image[None])
        return largest
    prediction, piece = observer("prediction"), observer("tile")
    for image in images:
        (predicted,) = prediction(image[None])
        for tile in geometry.tiles():
            piece(*_piece(tile, image[None], predicted))
    return largest


def _piece(
    tile: Tile, image: NDArray[np.float32], predicted: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a tile's pixels and its part of the prediction."""
    return (
        np.ascontiguousarray(image[:, :, tile.y_px, tile.x_px]),
        np.ascontiguousarray(predicted[:, :, tile.rows, tile.columns]),
    )
