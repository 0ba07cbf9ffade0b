"""Which engine runs a model on this machine, and in which precision."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.bundle import Bundle, Model
from pipeline.engine import CalibratedEngine, Engine, Precision

DeviceChoice = Literal["auto", "cpu", "cuda"]
PrecisionChoice = Literal["auto", "fp32", "bf16", "int8", "fp16"]


class EngineUnavailable(Exception):
    """The configured engine cannot be had on this machine; the message says what to do."""


class DeviceAbsent(EngineUnavailable):
    """The GPU that was asked for is not there; after a start of the machine perhaps not yet."""


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """Which engine was made and why."""

    engine: Engine
    because: str


def make_engine(
    bundle: Bundle,
    device: DeviceChoice = "auto",
    threads: int | None = None,
    precision: PrecisionChoice = "auto",
    *,
    pin_threads: bool = False,
) -> EngineChoice:
    """Make the engine for a bundle on a device.

    Args:
        bundle: with what its calibration found out about precisions.
        device: only `auto` falls back to the CPU.
        threads: of the CPU engine; None: one for each core.
        precision: of the convolutions; `auto` is the fastest that the device has and whose scores stayed within the
            tolerance when the bundle was calibrated; on CUDA float16 counts as faster than float32.
        pin_threads: bind each of the CPU engine's threads to a core of its own.

    Raises EngineUnavailable when what is asked for cannot be had.
    """
    on_cuda, because = resolve_device(device)
    able: list[Precision] = ["fp32", "fp16"] if on_cuda else _cpu().cpu_precisions()
    chosen, why = _precision(bundle, precision, able)
    engine = _engine(bundle.model, chosen, on_cuda, threads, pin_threads=pin_threads)
    return EngineChoice(engine, f"{because}; {chosen}: {why}")


def make_float_engine(model: Model, device: DeviceChoice = "auto") -> CalibratedEngine:
    """Make the float32 engine of a model that need not be calibrated. Raises EngineUnavailable."""
    on_cuda, _ = resolve_device(device)
    return _engine(model, "fp32", on_cuda)


def reduced_precisions(device: DeviceChoice = "auto") -> list[Precision]:
    """List what this machine computes in besides float32, on the CPU and, unless it is not wanted, on CUDA."""
    reduced = [precision for precision in _cpu().cpu_precisions() if precision != "fp32"]
    return [*reduced, "fp16"] if resolve_device(device)[0] else reduced


def engine_of(model: Model, precision: Precision) -> CalibratedEngine:
    """Make the engine that a reduced precision belongs to."""
    return _engine(model, precision, precision == "fp16")


def frame_memory(device: DeviceChoice) -> Callable[[int], NDArray[np.uint8]] | None:
    """Return what allocates the memory that an engine takes frames from, so many bytes; None: any memory will do.

    Where frames go to a GPU it is page-locked: the copy then runs at the bus's speed and beside the processor.

    Raises EngineUnavailable.
    """
    if not resolve_device(device)[0]:
        return None
    import torch

    return lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()


def _engine(
    model: Model, precision: Precision, on_cuda: bool, threads: int | None = None, *, pin_threads: bool = False
) -> CalibratedEngine:
    if on_cuda:
        from pipeline.engine_cuda import CudaEngine
        from pipeline.preprocess_cuda import KernelNotCompiled

        try:
            return CudaEngine(model, precision)
        except KernelNotCompiled as error:
            needs = "CuPy needs NVRTC and CUDA's headers (pip install 'cupy-cuda13x[ctk]'), or set device: cpu"
            raise EngineUnavailable(f"{error}. {needs}") from error
    engine: CalibratedEngine = _cpu().CpuEngine(model, threads, precision, pin_threads=pin_threads)
    return engine


def _cpu() -> Any:
    try:
        from pipeline import engine_cpu
    except ImportError as error:
        raise EngineUnavailable(f"the CPU engine needs OpenVINO ({error}): pip install openvino") from error
    return engine_cpu


def resolve_device(wanted: DeviceChoice) -> tuple[bool, str]:
    """Tell whether CUDA is to be used, and why. Raises EngineUnavailable."""
    if wanted == "cpu":
        return False, "configured"
    # Without a driver that is known at once; PyTorch takes seconds to load, and is asked where CUDA is insisted on.
    missing = (_why_no_driver() if wanted == "auto" else None) or _why_no_cuda()
    if wanted == "auto":
        return missing is None, "a CUDA device was found" if missing is None else str(missing)
    if missing is not None:
        raise type(missing)(f"device: cuda was asked for, but {missing}")
    return True, "configured"


def _precision(bundle: Bundle, wanted: PrecisionChoice, able: list[Precision]) -> tuple[Precision, str]:
    calibrated = {n: f for n, f in bundle.precisions.items() if n != "int8" or bundle.model.ranges}
    if wanted == "auto":
        fit = (name for name, found in calibrated.items() if found.trusted and name in able)
        return next(fit, "fp32"), "the fastest that the calibration trusts"
    if wanted not in able:
        raise EngineUnavailable(f"precision: {wanted} was asked for, but this device has {', '.join(able)} only")
    if wanted != "fp32" and wanted not in calibrated:
        raise EngineUnavailable(
            f"precision: {wanted} was asked for, but the bundle is not calibrated for it; train anew, or take fp32"
        )
    trusted = wanted == "fp32" or calibrated[wanted].trusted
    return wanted, "configured" if trusted else "configured, though the calibration does not trust it"


def _why_no_driver() -> EngineUnavailable | None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return DeviceAbsent(f"no NVIDIA driver was found ({error})")
    return None


def _why_no_cuda() -> EngineUnavailable | None:
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return EngineUnavailable("PyTorch finds no CUDA device: it is a CPU build of torch")
        return DeviceAbsent("PyTorch finds no CUDA device: is the driver there?")
    try:
        import cupy
    except ImportError as error:
        return EngineUnavailable(f"CuPy is not installed ({error}): pip install 'inspectord[gpu]'")
    if not cupy.cuda.is_available():
        return DeviceAbsent("CuPy finds no CUDA device")
    return None
