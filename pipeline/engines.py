"""Which engine runs a model on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pipeline.bundle import Model
from pipeline.engine import Engine
from pipeline.engine_cpu import CpuEngine

DeviceChoice = Literal["auto", "cpu", "cuda"]


class EngineUnavailable(Exception):
    """The device that the configuration asks for is not there; the message says what to do."""


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
