"""The CUDA engine: CuPy preprocessing straight into the networks' input, and a graph for all the rest."""

from __future__ import annotations

import gc
import itertools
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache

import cupy
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drivers.frame import Image, PixelFormat
from pipeline.bundle import Model
from pipeline.engine import Pending, Precision, Prepared, RawMaps
from pipeline.folded import fold
from pipeline.folded_networks import FoldedEfficientAD
from pipeline.geometry import Geometry, Tile
from pipeline.networks import maps_by_tiles
from pipeline.preprocess_cuda import CudaPreprocessor
from pipeline.scoring import FloatMap

_RUNS_BEFORE_CAPTURE = 3
"""cuDNN chooses its algorithms outside the capture."""
_CAPTURING = ThreadPoolExecutor(1, "capture")
"""One capture at a time, and all on one thread that stays: cuDNN keeps what it chose and built for as long as the
thread lives that asked for it."""
_CAPTURED_WITHIN_S = 240.0
"""For a graph and those that are captured before it. What takes longer hangs, and a reload must not wait for it for
ever; an engine's own thread is waited for less."""
_FREE: list[torch.cuda.Stream] = []
"""Lanes' streams that no engine has any more. torch hands 32 streams out in turns: with new ones for each engine,
one of them would soon be that of an engine that judges."""
_TYPES = {"fp32": torch.float32, "fp16": torch.float16}


class CudaEngine:
    """The folded networks on CUDA, captured in graphs; float32 (no TF32) or float16.

    A frame takes one of a few lanes, each a stream with a graph and buffers of its own, so that one frame is copied
    in while another is in the networks. Autoencoder and teacher run on streams of their own beside the student. A
    frame costs two launches (the preprocessing kernel and the graph), two copies, no allocation, and one wait, for
    the maps in pinned memory.
    """

    at_once = 3

    def __init__(self, model: Model, precision: Precision = "fp32") -> None:
        """Put the networks on the device and capture them. Raises KeyError for a precision of another device."""
        dtype = _TYPES[precision]
        self.device, self.precision = torch.cuda.get_device_name(), precision
        networks = FoldedEfficientAD(fold(model.size, model.geometry, model.weights))
        networks = networks.to("cuda", dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Memory of the engine that this one replaces; CuPy keeps it by stream and would not give it to another.
        cupy.get_default_memory_pool().free_all_blocks()
        g = model.geometry
        inputs = [torch.zeros(1, 3, g.image_height, g.image_width, device="cuda") for _ in range(self.at_once)]
        preprocess = CudaPreprocessor(model.preprocess, [cupy.from_dlpack(each[0]) for each in inputs])
        self._lanes = [_Lane(number, each, preprocess, networks, g, dtype) for number, each in enumerate(inputs)]
        self._turns = itertools.cycle(self._lanes)

    def warm_up(self) -> None:
        """Run each lane once on what lies in its input."""
        for lane in self._lanes:
            lane.run()

    def begin(self, image: Image, fmt: PixelFormat) -> Pending:
        """Queue one frame; its maps are waited for once."""
        return next(self._turns).begin(image, fmt)

    def infer(self, prepared: Prepared) -> tuple[FloatMap, FloatMap]:
        """Compute the raw maps of one prepared image, (map_height, map_width) each."""
        return self._lanes[0].infer(prepared)


class _Lane:
    """A stream with what lies along it: the networks' input, the graph, and the maps in pinned memory."""

    def __init__(
        self,
        number: int,
        network_input: Tensor,
        preprocess: CudaPreprocessor,
        networks: FoldedEfficientAD,
        geometry: Geometry,
        dtype: torch.dtype,
    ) -> None:
        self._number, self._input, self._preprocess = number, network_input, preprocess
        self._networks, self._geometry, self._dtype = networks, geometry, dtype
        g = geometry
        self._given = torch.zeros(1, 3, g.image_height, g.image_width, pin_memory=True)
        self._maps = torch.zeros(2, g.map_height, g.map_width, pin_memory=True)
        self._stream = _FREE.pop() if _FREE else torch.cuda.Stream()  # type: ignore[no-untyped-call]
        weakref.finalize(self, _FREE.append, self._stream)
        self._borrowed = cupy.cuda.ExternalStream(self._stream.cuda_stream)
        self._arrived = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._prepared = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # What was filled on the default stream is there before our own streams, which do not wait by themselves.
        torch.cuda.current_stream().synchronize()
        capturing = _CAPTURING.submit(self._capture)
        try:
            self._graph = capturing.result(_CAPTURED_WITHIN_S)
        except TimeoutError:
            capturing.cancel()
            told = f"no CUDA graph was captured within {_CAPTURED_WITHIN_S:g} s: the GPU hangs, restart the daemon"
            raise TimeoutError(told) from None

    def run(self) -> None:
        """Run once on what lies in the input."""
        with self._queueing():
            self._replay()
        self._stream.synchronize()

    def begin(self, image: Image, fmt: PixelFormat) -> Pending:
        """Queue one frame."""
        start_ns = time.perf_counter_ns()
        with self._queueing():
            self._arrived.record()
            self._preprocess(image, fmt, self._number)
            self._prepared.record()
            self._replay()

        def finish() -> RawMaps:
            maps = self._take_maps()
            took_ns = time.perf_counter_ns() - start_ns
            preprocess_ns = round(self._arrived.elapsed_time(self._prepared) * 1e6)
            return RawMaps(maps[0], maps[1], preprocess_ns=preprocess_ns, infer_ns=took_ns - preprocess_ns)

        return finish

    def infer(self, prepared: Prepared) -> tuple[FloatMap, FloatMap]:
        """Compute the raw maps of one prepared image."""
        self._given[0].copy_(torch.from_numpy(prepared))
        with self._queueing():
            self._input.copy_(self._given, non_blocking=True)
            self._replay()
        st, ae = self._take_maps()
        return st, ae

    @contextmanager
    def _queueing(self) -> Iterator[None]:
        # torch owns the stream, CuPy borrows it, so that both queue their work in one order.
        with torch.cuda.stream(self._stream), self._borrowed:
            yield

    def _replay(self) -> None:
        # Should a graph ever end without its copy, the part is INVALID and not judged by the maps before it.
        self._maps.fill_(torch.nan)
        self._graph.replay()

    def _take_maps(self) -> NDArray[np.float32]:
        self._stream.synchronize()
        return self._maps.numpy().copy()

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False):
            with torch.cuda.stream(self._stream):
                for _ in range(_RUNS_BEFORE_CAPTURE):
                    self._compute()
            self._stream.synchronize()
            # thread_local: while this one is captured, the present engine may go on in its thread.
            with _no_collection(), torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._compute()
        return graph

    @torch.inference_mode()
    def _compute(self) -> None:
        """Queue everything from the input to the maps in host memory on our streams."""
        networks, main = self._networks, self._stream
        beside, teaching = _side_streams(self._number)
        image = self._input.to(self._dtype, memory_format=torch.channels_last)
        beside.wait_stream(main)
        with torch.cuda.stream(beside):
            predicted = networks.predict(self._input)

        def tile_maps(tile: Tile) -> tuple[Tensor, Tensor]:
            piece = image[:, :, tile.y_px, tile.x_px]
            # Waits for the tile before as well: its features' memory may be used again.
            teaching.wait_stream(main)
            with torch.cuda.stream(teaching):
                described = networks.teacher(piece)
            student = networks.student(piece)
            main.wait_stream(teaching)
            main.wait_stream(beside)
            maps: tuple[Tensor, Tensor] = networks.tile_maps(described, student, predicted, tile)
            return maps

        both = maps_by_tiles(self._geometry, tile_maps)
        self._maps.copy_(torch.cat(both).float(), non_blocking=True)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep garbage from being collected: giving an old engine's memory back would end the capture in an error."""
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@lru_cache
def _side_streams(lane: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Return the streams beside a lane's own; only a capture needs them, so all engines share them.

    Libraries keep workspaces for each stream, which a graph remembers: lanes run at once, so each was captured
    beside streams of its own. A graph remembers priorities, too: all have the same, so that no frame's teacher
    comes before the student of the frame before it.
    """
    return torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
