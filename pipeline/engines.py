"""Which engine runs a model on this machine, and in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from pipeline.bundle import Bundle, Model
from pipeline.engine import Engine, Precision

DeviceChoice = Literal["auto", "cpu", "cuda"]
PrecisionChoice = Literal["auto", "fp32", "bf16", "int8"]


class EngineUnavailable(Exception):
    """The configured engine cannot be had on this machine; the message says what to do."""


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
        precision: of the CPU engine; `auto` is the fastest that this processor has and whose scores stayed within
            the tolerance when the bundle was calibrated. CUDA computes in float32.
        pin_threads: bind each of the CPU engine's threads to a core of its own.

    Raises EngineUnavailable when what is asked for cannot be had.
    """
    on_cuda, because = resolve_device(device)
    if on_cuda:
        if precision not in ("auto", "fp32"):
            raise EngineUnavailable(f"precision: {precision} is one of the CPU engine; CUDA computes in fp32")
        return EngineChoice(_cuda_engine(bundle.model), because)
    chosen, why = _precision(bundle, precision)
    return EngineChoice(
        _cpu().CpuEngine(bundle.model, threads, chosen, pin_threads=pin_threads), f"{because}; {chosen}: {why}"
    )


def make_float_engine(model: Model, device: DeviceChoice = "auto") -> Engine:
    """Make the float32 engine of a model that need not be calibrated. Raises EngineUnavailable."""
    on_cuda, _ = resolve_device(device)
    engine: Engine = _cuda_engine(model) if on_cuda else _cpu().CpuEngine(model)
    return engine


def _cuda_engine(model: Model) -> Engine:
    from pipeline.engine_cuda import CudaEngine

    return CudaEngine(model)


def _cpu() -> Any:
    try:
        from pipeline import engine_cpu
    except ImportError as error:
        raise EngineUnavailable(f"the CPU engine needs OpenVINO ({error}): pip install openvino") from error
    return engine_cpu


def resolve_device(wanted: DeviceChoice) -> tuple[bool, str]:
    """Tell whether CUDA is to be used, and why. Raises EngineUnavailable."""
    missing = None if wanted == "cpu" else _why_no_cuda()
    if missing is not None and wanted == "cuda":
        raise EngineUnavailable(f"device: cuda was asked for, but {missing}")
    if wanted != "auto":
        return wanted == "cuda", "configured"
    return missing is None, missing or "a CUDA device was found"


def _precision(bundle: Bundle, wanted: PrecisionChoice) -> tuple[Precision, str]:
    able = _cpu().cpu_precisions()
    calibrated = {n: f for n, f in bundle.precisions.items() if n != "int8" or bundle.model.ranges}
    if wanted == "auto":
        fit = (name for name, found in calibrated.items() if found.trusted and name in able)
        return next(fit, "fp32"), "the fastest here that the calibration trusts"
    if wanted not in able:
        raise EngineUnavailable(f"precision: {wanted} was asked for, but this processor has {', '.join(able)} only")
    if wanted != "fp32" and wanted not in calibrated:
        raise EngineUnavailable(
            f"precision: {wanted} was asked for, but the bundle is not calibrated for it; train anew, or take fp32"
        )
    trusted = wanted == "fp32" or calibrated[wanted].trusted
    return wanted, "configured" if trusted else "configured, though the calibration does not trust it"


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
