"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def describe_machine(device: str = "cpu") -> dict[str, str | int]:
    """Name processor, threads, versions and, for `cuda`, the GPU."""
    return {
        "machine": platform.machine(),
        "processor": _of_processor("model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def processor_flags() -> set[str]:
    """Return the processor's instruction sets, by Linux's names; empty where they are not told."""
    return set(_of_processor("flags").split())


def _of_processor(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
