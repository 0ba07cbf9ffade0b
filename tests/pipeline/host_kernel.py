"""The CUDA kernel's own source, compiled for the host: one thread after the other, the same numbers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.preprocess_cuda import kernel_source

_ON_HOST = """
#include <algorithm>
#include <cmath>
using std::min; using std::max;
#define __device__
#define __global__
struct Dim { int x, y; };
static Dim blockIdx, threadIdx, blockDim;
%s
extern "C" void run(
    Dim grid, Dim block,
    const sample_t* raw, const float* dark, const float* gain, const unsigned char* ignored,
    int width, int height, int kind, int colours, int is_bgr, float max_value, float ignored_value,
    const int* sy, const float* wy, int ty, const int* sx, const float* wx, int tx,
    const float* scale, const float* offset, float* out, int ow, int oh) {
    blockDim = block;
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
            for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y)
                for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x)
                    preprocess(raw, dark, gain, ignored, width, height, kind, colours, is_bgr, max_value,
                               ignored_value, sy, wy, ty, sx, wx, tx, scale, offset, out, ow, oh);
}
"""


class Dim(ctypes.Structure):
    """How many, each way."""

    _fields_ = (("x", ctypes.c_int), ("y", ctypes.c_int))


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[..., None]]:
    """The kernel by its source, compiled for the host."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the CUDA kernel's source for the host")
    folder = tmp_path_factory.mktemp("kernel")
    return {
        source: _compiled(compiler, folder / f"k{n}", source)
        for n, source in enumerate(map(kernel_source, (8, 16)))
    }


def _compiled(compiler: str, path: Path, source: str) -> Callable[..., None]:
    path.with_suffix(".cpp").write_text(_ON_HOST % source)
    options = ["-O1", "-ffp-contract=off", "-shared", "-fPIC", "-o", str(path.with_suffix(".so"))]
    subprocess.run([compiler, *options, str(path.with_suffix(".cpp"))], check=True)
    return ctypes.CDLL(str(path.with_suffix(".so"))).run
