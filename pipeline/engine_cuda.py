"""The CUDA engine: CuPy preprocessing straight into the tensor that the networks read, on one stream."""

from __future__ import annotations

import time

import cupy
import numpy as np
import torch

from drivers.frame import Image, PixelFormat
from pipeline.bundle import Model
from pipeline.engine import Precision, Prepared, RawMaps
from pipeline.folded import FoldedEfficientAD
from pipeline.preprocess_cuda import CudaPreprocessor
from pipeline.scoring import FloatMap


class CudaEngine:
    """PyTorch on CUDA in float32 (no TF32), fed by the fused kernel without a copy in between."""

    def __init__(self, model: Model) -> None:
        self.device = torch.cuda.get_device_name()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.precision: Precision = "fp32"
        self._networks = FoldedEfficientAD(model.networks()).cuda()
        g = model.geometry
        self._input = torch.zeros(1, 3, g.image_height, g.image_width, device="cuda")
        self._preprocess = CudaPreprocessor(model.preprocess, cupy.from_dlpack(self._input[0]))
        # What was filled on the default stream is there before our own stream, which does not wait by itself.
        self._stream.wait_stream(torch.cuda.current_stream())
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False

    def warm_up(self) -> None:
        """Run once on an empty picture."""
        with torch.cuda.stream(self._stream), torch.inference_mode():
            self._networks(self._input)
        self._stream.synchronize()

    def raw_maps(self, image: Image, fmt: PixelFormat) -> RawMaps:
        """Compute the raw maps of one frame; waits once, for the maps."""
        start_ns = time.perf_counter_ns()
        # torch owns the stream, CuPy borrows it, so that both queue their work in one order.
        with torch.cuda.stream(self._stream), cupy.cuda.ExternalStream(self._stream.cuda_stream):
            self._preprocess(image, fmt)
            ready_ns = time.perf_counter_ns()
            with torch.inference_mode():
                st, ae = self._networks(self._input)
                both = torch.stack((st[0], ae[0])).cpu()
        maps = np.asarray(both.numpy())
        return RawMaps(
            maps[0], maps[1], preprocess_ns=ready_ns - start_ns, infer_ns=time.perf_counter_ns() - ready_ns
        )

    def infer(self, prepared: Prepared) -> tuple[FloatMap, FloatMap]:
        """Compute the raw maps of one prepared image, (map_height, map_width) each."""
        with torch.cuda.stream(self._stream), torch.inference_mode():
            self._input.copy_(torch.from_numpy(prepared)[None])
            st, ae = self._networks(self._input)
            both = torch.stack((st[0], ae[0])).cpu().numpy()
        return both[0], both[1]
