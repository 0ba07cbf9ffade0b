"""The CPU engine: OpenCV preprocessing and PyTorch, for PCs without a GPU."""

from __future__ import annotations

import time

import numpy as np
import torch

from drivers.frame import Image, PixelFormat
from pipeline.bundle import Model
from pipeline.engine import RawMaps
from pipeline.preprocess import Preprocessor


class CpuEngine:
    """PyTorch on the CPU, float32, channels last."""

    def __init__(self, model: Model, threads: int | None = None) -> None:
        """Load the networks.

        Args:
            model: networks and preprocessing.
            threads: intra-op threads of the whole process; None leaves PyTorch's choice.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = "cpu"
        self._preprocess = Preprocessor(model.preprocess)
        self._geometry = model.geometry
        self._networks = model.networks().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def warm_up(self) -> None:
        """Run once on an empty picture."""
        g = self._geometry
        with torch.inference_mode():
            self._networks(torch.zeros(1, 3, g.image_height, g.image_width))

    def raw_maps(self, image: Image, fmt: PixelFormat) -> RawMaps:
        """Compute the raw maps of one frame."""
        start_ns = time.perf_counter_ns()
        tensor = torch.from_numpy(self._preprocess(image, fmt))[None]
        ready_ns = time.perf_counter_ns()
        with torch.inference_mode():
            st, ae = self._networks(tensor.to(memory_format=torch.channels_last))
        maps = np.asarray(st[0].numpy()), np.asarray(ae[0].numpy())
        return RawMaps(*maps, preprocess_ns=ready_ns - start_ns, infer_ns=time.perf_counter_ns() - ready_ns)
