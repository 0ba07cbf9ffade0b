from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

os.environ["PYLON_CAMEMU"] = "2"  # two emulated Basler cameras, before pypylon enumerates
# Whatever the machine sets: servers on loopback are reached directly, messages are plain and whole, and no systemd
# but the tests' own is told anything.
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "*"
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"], os.environ["TERMINAL_WIDTH"] = "1", "200"
for _name in (
    "FORCE_COLOR",
    "PY_COLORS",
    "RUNTIME_DIRECTORY",
    "STATE_DIRECTORY",
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "CREDENTIALS_DIRECTORY",
):
    os.environ.pop(_name, None)

# Where tests run beside one another, PyTorch takes each process's share of the processor and does not spin.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _share = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _share)))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

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
def no_collection() -> Iterator[None]:
    """No circle of objects goes: the collector seldom runs in a daemon, which makes no rubbish."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(scope="session")
def good_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve good parts of the simulated line, 96×96 px, as PNG files."""
    import cv2

    from drivers.synthetic import PartRenderer, SyntheticOptions

    folder = tmp_path_factory.mktemp("good")
    renderer = PartRenderer(SyntheticOptions(seed=3, width=96, height=96, defect_rate=0))
    for index in range(12):
        cv2.imwrite(str(folder / f"good_{index}.png"), renderer.render(index).raw)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(good_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle trained for four steps at 64×64 px: quick to run, good for nothing."""
    from calibrate.options import TrainOptions
    from calibrate.train import train
    from pipeline.geometry import Geometry
    from pipeline.preprocess import PreprocessSpec

    out = tmp_path_factory.mktemp("bundle") / "tiny"
    train(
        TrainOptions(
            dataset=good_parts,
            out=out,
            geometry=Geometry(64, 64),
            preprocess=PreprocessSpec(64, 64),
            steps=4,
            held_out_share=0.25,
            precision="fp32",
        )
    )
    return out
