"""What training computes on, and in which precision."""

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
