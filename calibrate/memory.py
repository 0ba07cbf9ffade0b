"""How training uses memory: what is freed is kept, and images lie as the processor's convolutions like them."""

from __future__ import annotations

import ctypes

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_TOP_PAD_BYTES = 256 << 20


def convolution_layout(device: torch.device) -> torch.memory_format:
    """Return the order of dimensions in which a device learns fastest.

    Without AVX-512, the gradients of convolutions over whole images take up to twice as long where the channels
    come last; over pretraining's small patches they do not.
    """
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return torch.contiguous_format
    return torch.channels_last


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to reuse large blocks; each would otherwise be mapped, zeroed and unmapped anew.

    A step's large tensors come and go all the time: on two cores a fifth of it went into page faults. Returns False
    where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = {
        _M_ARENA_MAX: 1,
        _M_MMAP_MAX: 0,
        _M_TRIM_THRESHOLD: 2**31 - 1,
        _M_TOP_PAD: _TOP_PAD_BYTES,
    }
    return all(mallopt(option, value) for option, value in settings.items())
