from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("PYLON_CAMEMU", "2")  # two emulated Basler cameras, before pypylon enumerates

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def _why_no_gpu() -> str | None:
    try:
        import cupy
        import torch
    except ImportError as error:
        return f"no GPU libraries: {error}"
    if not cupy.cuda.is_available() or not torch.cuda.is_available():
        return "no CUDA device"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if any(item.get_closest_marker("gpu") for item in items):
        reason = _why_no_gpu()
        if reason:
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
