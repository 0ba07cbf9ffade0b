"""The engine: one object that owns a device and turns a frame's pixels into the two raw maps."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from drivers.frame import Image, PixelFormat
from pipeline.bundle import Model
from pipeline.preprocess import Preprocessor
from pipeline.scoring import FloatMap

DeviceChoice = Literal["auto", "cpu", "cuda"]


class EngineUnavailable(Exception):
    """The device that the configuration asks for is not there; the message says what to do."""


@dataclass(frozen=True, slots=True)
class RawMaps:
    """What an engine returns, with the time of its stages."""

    student_teacher: FloatMap
    """(map_height, map_width)"""
    autoencoder: FloatMap
    """(map_height, map_width), autoencoder against student"""
    preprocess_ns: int
    infer_ns: int


class Engine(Protocol):
    """Preprocessing and networks on one device. Used by a single thread."""

    device: str
    """`cpu`, or the CUDA device's name."""

    def warm_up(self) -> None:
        """Run once on nothing, so that the first part is not the slowest."""
        ...

    def raw_maps(self, image: Image, fmt: PixelFormat) -> RawMaps:
        """Compute the raw maps of one frame. Raises FormatMismatch, or the device's own errors."""
        ...


class CpuEngine:
    """PyTorch on the CPU, float32, channels last."""

    def __init__(self, model: Model, threads: int | None = None) -> None:
        """Load the networks.

        Args:
            model: networks and preprocessing.
            threads: intra-op threads of the whole process; None leaves PyTorch's choice.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = "cpu"
        self._preprocess = Preprocessor(model.preprocess)
        self._geometry = model.geometry
        self._networks = model.networks().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def warm_up(self) -> None:
        """Run once on an empty picture."""
        g = self._geometry
        with torch.inference_mode():
            self._networks(torch.zeros(1, 3, g.image_height, g.image_width))

    def raw_maps(self, image: Image, fmt: PixelFormat) -> RawMaps:
        """Compute the raw maps of one frame."""
        start_ns = time.perf_counter_ns()
        tensor = torch.from_numpy(self._preprocess(image, fmt))[None]
        ready_ns = time.perf_counter_ns()
        with torch.inference_mode():
            st, ae = self._networks(tensor.to(memory_format=torch.channels_last))
        maps = np.asarray(st[0].numpy()), np.asarray(ae[0].numpy())
        return RawMaps(*maps, preprocess_ns=ready_ns - start_ns, infer_ns=time.perf_counter_ns() - ready_ns)


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """Which engine was made and why."""

    engine: Engine
    because: str


def make_engine(model: Model, device: DeviceChoice = "auto", threads: int | None = None) -> EngineChoice:
    """Make the engine for a device.

    Raises EngineUnavailable when `cuda` is asked for and cannot be had; only `auto` falls back to the CPU.
    """
    if device == "cpu":
        return EngineChoice(CpuEngine(model, threads), "configured")
    missing = _why_no_cuda()
    if missing is None:
        from pipeline.engine_cuda import CudaEngine

        return EngineChoice(CudaEngine(model), "configured" if device == "cuda" else "a CUDA device was found")
    if device == "cuda":
        raise EngineUnavailable(f"device: cuda was asked for, but {missing}")
    return EngineChoice(CpuEngine(model, threads), missing)


def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device (driver missing, or a CPU build of torch)"
    try:
        import cupy
    except ImportError as error:
        return f"CuPy is not installed ({error}): pip install 'inspectord[gpu]'"
    if not cupy.cuda.is_available():
        return "CuPy finds no CUDA device"
    return None
