"""Independent calculations, straight from the specification and the paper's formulas, in plain NumPy."""

from __future__ import annotations

import numpy as np

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
PATTERNS = {"RG": "RGGB", "GR": "GRBG", "GB": "GBRG", "BG": "BGGR"}


def demosaic(raw, pattern):
    """Bilinear, rounded half up, outermost pixels copied from their inner neighbours; one pixel at a time."""
    height, width = raw.shape
    colour = lambda y, x: "RGB".index(pattern[(y % 2) * 2 + x % 2])
    out = np.zeros((height, width, 3), np.int64)
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            for c in range(3):
                if colour(y, x) == c:
                    out[y, x, c] = raw[y, x]
                    continue
                around = [
                    int(raw[y + dy, x + dx])
                    for dy in (-1, 0, 1)
                    for dx in (-1, 0, 1)
                    if (dy or dx) and colour(y + dy, x + dx) == c
                ]
                out[y, x, c] = (sum(around) + len(around) // 2) // len(around)
    out[0], out[-1] = out[1], out[-2]
    out[:, 0], out[:, -1] = out[:, 1], out[:, -2]
    return out


def resize_axis(image, outputs):
    """Area average when shrinking, linear between centres when growing, along axis 0."""
    inputs = image.shape[0]
    scale = inputs / outputs
    rows = []
    for i in range(outputs):
        if outputs < inputs:
            low, high = i * scale, (i + 1) * scale
            shares = np.clip(np.minimum(np.arange(inputs) + 1, high) - np.maximum(np.arange(inputs), low), 0, 1)
            rows.append(np.tensordot(shares / shares.sum(), image, 1))
        else:
            at = np.clip((i + 0.5) * scale - 0.5, 0, inputs - 1)
            first = min(int(at), inputs - 2) if inputs > 1 else 0
            share = at - first
            rows.append(image[first] * (1 - share) + image[min(first + 1, inputs - 1)] * share)
    return np.stack(rows)


def preprocess(image, fmt, width, height, *, roi=None, dark=None, flat=None, ignore=None):
    """Crop, correct, paint, demosaic, scale, resize, normalise, in float64 unless rounding is specified."""
    name = fmt.value
    bits = int("".join(ch for ch in name if ch.isdigit()))
    top = 2**bits - 1
    x0, y0, w, h = roi or (0, 0, image.shape[1], image.shape[0])
    cut = (slice(y0, y0 + h), slice(x0, x0 + w))
    raw = image[cut].astype(np.float64)
    if dark is not None or flat is not None:
        full_dark = np.zeros(image.shape[:2]) if dark is None else dark.astype(np.float64)
        gain = np.ones(image.shape[:2])
        if flat is not None:
            signal = flat.astype(np.float64) - full_dark
            if name.startswith("Bayer"):
                for i in (0, 1):
                    for j in (0, 1):
                        part = signal[i::2, j::2]
                        gain[i::2, j::2] = part.mean() / part
            else:
                gain = signal.mean() / signal
        offset, factor = full_dark[cut], gain[cut]
        if raw.ndim == 3:
            offset, factor = offset[..., None], factor[..., None]
        raw = np.clip(np.rint((raw - offset) * factor), 0, top)
    if ignore is not None:
        raw[ignore[cut]] = round(0.449 * top)
    if name.startswith("Bayer"):
        pattern = PATTERNS[name[5:7]]
        grid = np.array(list(pattern)).reshape(2, 2)
        grid = np.roll(grid, (-(y0 % 2), -(x0 % 2)), (0, 1))
        raw = demosaic(raw.astype(np.int64), "".join(grid.ravel())).astype(np.float64)
    elif name.startswith("BGR"):
        raw = raw[..., ::-1]
    elif name.startswith("Mono"):
        raw = np.repeat(raw[..., None], 3, 2)
    small = resize_axis(raw / top, height)
    small = resize_axis(small.swapaxes(0, 1), width).swapaxes(0, 1)
    return ((small - MEAN) / STD).transpose(2, 0, 1)
