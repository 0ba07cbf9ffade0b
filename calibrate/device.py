"""What training computes on, in which precision, and how its images lie in memory."""

from __future__ import annotations

import torch

from calibrate.listener import TrainingError
from calibrate.options import Precision


def device_of(choice: str) -> torch.device:
    """Resolve `auto`, `cpu` or `cuda`. Raises TrainingError."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    return torch.device("cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_precision(choice: Precision, device: torch.device) -> str:
    """Resolve `auto`: bfloat16 where the hardware multiplies it natively, else float32."""
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def convolution_layout(device: torch.device) -> torch.memory_format:
    """Return the order of dimensions in which to learn from whole images: channels last, as convolutions like it.

    Without AVX-512 (seen on a Zen 3) the gradients of convolutions take up to twice as long then; so not there.
    """
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return torch.contiguous_format
    return torch.channels_last
