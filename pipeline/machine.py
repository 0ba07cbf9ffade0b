"""What a measurement was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_VERSIONS = {
    "inspectord": "inspectord",
    "openvino": "openvino",
    "cupy": "cupy-cuda13x",
    "numpy": "numpy",
    "opencv": "opencv-python-headless",
}


def describe_machine(device: str = "cpu") -> dict[str, str | int]:
    """Name processor, versions and, for `cuda`, the GPU; `threads` are PyTorch's in this process."""
    import torch

    versions = {}
    for name, distribution in _VERSIONS.items():
        try:
            versions[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": platform.machine(),
        "processor": _of_processor("model name") or platform.processor(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def available_memory_mib() -> int:
    """Return how much memory can be had without swapping; a terabyte where it is not told.

    A container, or a unit with `MemoryMax=`, may have less than the machine.
    """
    value = _told("/proc/meminfo", "MemAvailable").split()
    free_mib = int(value[0]) // 1024 if value else 1 << 20
    return min([free_mib, *_left_to_groups_mib()])


def _left_to_groups_mib(root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Yield what is left to each control group (version 2) that this process is in, where it has a limit."""
    own = root / _told("/proc/self/cgroup", "0:").lstrip(":/")
    for group in (own, *own.parents):
        with suppress(KeyError, OSError, ValueError):  # no such file, or `max`
            limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = int(stat["inactive_file"]) + int(stat["active_file"])  # files, that make room
            yield max(0, limit - used + cached) >> 20
        if group == root:
            return


def _of_processor(field: str) -> str:
    return _told("/proc/cpuinfo", field)


def _told(path: str, field: str) -> str:
    """Return the value of the first line `field: value`; empty where there is none."""
    try:
        lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
