"""The CUDA side of `pipeline.preprocess`: the same steps and numbers in one kernel, one thread a pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from drivers.frame import Image, PixelFormat
from pipeline.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FormatMismatch,
    PreprocessSpec,
    correction_for,
    ignored_value,
    shifted_pattern,
)
from pipeline.resample import axis_weights

KERNEL = r"""
// Pixel formats: MONO one sample a pixel, BAYER one sample a pixel behind a colour filter, COLOUR three.
enum { MONO = 0, BAYER = 1, COLOUR = 2 };

struct Frame {
    const sample_t* raw;            // region of interest, contiguous
    const float* dark;            // same layout, or null
    const float* gain;
    const unsigned char* ignored; // one byte a pixel, or null
    int width, height, kind;
    int colours;                  // BAYER: two bits for each position of the 2x2 pattern, 0 R, 1 G, 2 B
    int is_bgr;
    float max_value, ignored_value;
};

__device__ static float sample(const Frame& f, int y, int x, int c) {
    const int pixel = y * f.width + x;
    if (f.ignored && f.ignored[pixel]) return f.ignored_value;
    const int at = f.kind == COLOUR ? pixel * 3 + (f.is_bgr ? 2 - c : c) : pixel;
    float value = (float)f.raw[at];
    if (f.gain) {
        value = rintf((value - f.dark[at]) * f.gain[at]);
        value = fminf(fmaxf(value, 0.0f), f.max_value);
    }
    return value;
}

__device__ static int colour_at(const Frame& f, int y, int x) {
    return (f.colours >> (2 * ((y & 1) * 2 + (x & 1)))) & 3;
}

// Bilinear demosaicing with rounding; the outermost pixels repeat their inner neighbours.
__device__ static void demosaic(const Frame& f, int y, int x, float* rgb) {
    y = min(max(y, 1), f.height - 2);
    x = min(max(x, 1), f.width - 2);
    const int own = colour_at(f, y, x);
    const bool red_beside = colour_at(f, y, x + 1) == 0;
    const float across = sample(f, y, x - 1, 0) + sample(f, y, x + 1, 0);
    const float along = sample(f, y - 1, x, 0) + sample(f, y + 1, x, 0);
    const float centre = sample(f, y, x, 0);
    if (own == 1) {
        const float beside_it = floorf((across + 1.0f) * 0.5f), below_it = floorf((along + 1.0f) * 0.5f);
        rgb[0] = red_beside ? beside_it : below_it;
        rgb[1] = centre;
        rgb[2] = red_beside ? below_it : beside_it;
    } else {
        const float corners = floorf((sample(f, y - 1, x - 1, 0) + sample(f, y - 1, x + 1, 0)
                                    + sample(f, y + 1, x - 1, 0) + sample(f, y + 1, x + 1, 0) + 2.0f) * 0.25f);
        rgb[0] = own == 0 ? centre : corners;
        rgb[1] = floorf((across + along + 2.0f) * 0.25f);
        rgb[2] = own == 0 ? corners : centre;
    }
}

extern "C" __global__ void preprocess(
    const sample_t* raw, const float* dark, const float* gain, const unsigned char* ignored,
    int width, int height, int kind, int colours, int is_bgr, float max_value, float ignored_value,
    const int* start_y, const float* weights_y, int taps_y,
    const int* start_x, const float* weights_x, int taps_x,
    const float* scale, const float* offset,
    float* out, int out_width, int out_height)
{
    const int ox = blockIdx.x * blockDim.x + threadIdx.x;
    const int oy = blockIdx.y * blockDim.y + threadIdx.y;
    if (ox >= out_width || oy >= out_height) return;
    const Frame f = {raw, dark, gain, ignored, width, height,
                     kind, colours, is_bgr, max_value, ignored_value};
    float sums[3] = {0.0f, 0.0f, 0.0f};
    for (int ky = 0; ky < taps_y; ++ky) {
        const float wy = weights_y[oy * taps_y + ky];
        if (wy == 0.0f) continue;
        const int y = start_y[oy] + ky;
        float row[3] = {0.0f, 0.0f, 0.0f};
        for (int kx = 0; kx < taps_x; ++kx) {
            const float wx = weights_x[ox * taps_x + kx];
            if (wx == 0.0f) continue;
            const int x = start_x[ox] + kx;
            float pixel[3];  // all indices are constants, so that it stays in registers
            if (kind == BAYER) demosaic(f, y, x, pixel);
            else for (int c = 0; c < 3; ++c) pixel[c] = kind == COLOUR || c == 0 ? sample(f, y, x, c) : pixel[0];
            for (int c = 0; c < 3; ++c) row[c] += wx * pixel[c];
        }
        for (int c = 0; c < 3; ++c) sums[c] += wy * row[c];
    }
    for (int c = 0; c < 3; ++c) {
        const float shade = sums[c] / max_value;
        out[(c * out_height + oy) * out_width + ox] = shade * scale[c] - offset[c];
    }
}
"""

_BLOCK = (16, 16)
_KINDS = {"mono": 0, "bayer": 1, "colour": 2}


def kernel_source(bits: int) -> str:
    """Return the kernel's source for samples in 8-bit bytes or 16-bit words."""
    return f"typedef unsigned {'char' if bits == 8 else 'short'} sample_t;\n{KERNEL}"


def kernel_arguments(spec: PreprocessSpec, fmt: PixelFormat, frame_width: int, frame_height: int) -> dict[str, Any]:
    """Compute everything the kernel needs besides the pixels, as NumPy arrays and numbers.

    Raises FormatMismatch as `Preprocessor` does.
    """
    area = spec.area(frame_width, frame_height)
    correction = correction_for(spec, fmt, area)
    ignored = spec.ignored_in_roi()
    pattern = shifted_pattern(fmt.bayer, area.x, area.y) if fmt.bayer else ""
    std = np.array(IMAGENET_STD, np.float32)
    y, x = axis_weights(area.height, spec.height), axis_weights(area.width, spec.width)
    return {
        "dark": None if correction is None else correction.dark,
        "gain": None if correction is None else correction.gain,
        "ignored": None if ignored is None else np.ascontiguousarray(ignored, np.uint8),
        "width": area.width,
        "height": area.height,
        "kind": _KINDS["bayer" if fmt.bayer else "colour" if fmt.colour_order else "mono"],
        "colours": sum("RGB".index(colour) << (2 * i) for i, colour in enumerate(pattern)),
        "is_bgr": int(fmt.colour_order == "BGR"),
        "max_value": np.float32(fmt.max_value),
        "ignored_value": np.float32(ignored_value(fmt)),
        "start_y": y.start,
        "weights_y": y.weights,
        "taps_y": y.weights.shape[1],
        "start_x": x.start,
        "weights_x": x.weights,
        "taps_x": x.weights.shape[1],
        "scale": (1.0 / std).astype(np.float32),
        "offset": (np.array(IMAGENET_MEAN, np.float32) / std).astype(np.float32),
    }


class KernelNotCompiled(Exception):
    """CuPy finds no compiler, or not what that needs."""


class CudaPreprocessor:
    """Run the kernel on the current CuPy stream, into buffers that are allocated once."""

    def __init__(self, spec: PreprocessSpec, outs: Sequence[Any]) -> None:
        """Prepare.

        Args:
            spec: what the bundle says.
            outs: a CuPy array for each lane, (3, height, width) float32, contiguous.

        Raises KernelNotCompiled.
        """
        import cupy

        self._cupy = cupy
        self._spec = spec
        self._outs = outs
        # Compiled here, so that a compiler that fails does so at start and not at the first part.
        self._kernels = {
            bits: cupy.RawKernel(kernel_source(bits), "preprocess", options=("--fmad=false",)) for bits in (8, 16)
        }
        try:
            for kernel in self._kernels.values():
                kernel.compile()
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # of the driver, which may be well again
                raise
            raise KernelNotCompiled(f"the preprocessing kernel cannot be compiled: {error}") from error
        self._prepared: dict[tuple[PixelFormat, tuple[int, ...]], tuple[Any, list[Any], list[Any]]] = {}

    def __call__(self, image: Image, fmt: PixelFormat, lane: int = 0) -> None:
        """Queue copy and kernel for a frame, which must stay as it is until then; overwrites a lane's buffer.

        Raises FormatMismatch.
        """
        if not fmt.fits(image):
            raise FormatMismatch(f"{image.shape} {image.dtype} is not {fmt.value}")
        key = (fmt, image.shape)
        if key not in self._prepared:
            self._prepared[key] = self._prepare(image, fmt)
        kernel, raws, arguments = self._prepared[key]
        raw, out = raws[lane], self._outs[lane]
        area = self._spec.area(image.shape[1], image.shape[0])
        whole = np.ascontiguousarray(image)
        # From row to row, so that a region of interest is not copied together on the host first.
        row_bytes = raw.nbytes // area.height
        self._cupy.cuda.runtime.memcpy2DAsync(
            raw.data.ptr,
            row_bytes,
            whole[area.y :, area.x :].ctypes.data,
            whole.strides[0],
            row_bytes,
            area.height,
            self._cupy.cuda.runtime.memcpyHostToDevice,
            self._cupy.cuda.get_current_stream().ptr,
        )
        height, width = out.shape[1:]
        grid = (-(-width // _BLOCK[0]), -(-height // _BLOCK[1]))
        kernel(grid, _BLOCK, (raw, *arguments, out, np.int32(width), np.int32(height)))

    def _prepare(self, image: Image, fmt: PixelFormat) -> tuple[Any, list[Any], list[Any]]:
        cupy = self._cupy
        values = kernel_arguments(self._spec, fmt, image.shape[1], image.shape[0])
        kernel = self._kernels[8 if fmt.bits == 8 else 16]
        arguments: list[Any] = []
        for value in values.values():
            if value is None:
                arguments.append(np.uintp(0))
            elif isinstance(value, np.ndarray):
                arguments.append(cupy.asarray(value))
            else:
                arguments.append(np.int32(value) if isinstance(value, int) else value)
        shape = (values["height"], values["width"]) + ((3,) if fmt.channels == 3 else ())
        cupy.cuda.get_current_stream().synchronize()  # other lanes' streams use them, too
        return kernel, [cupy.empty(shape, fmt.dtype) for _ in self._outs], arguments
