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


def conv2d(x, weight, bias, stride=1, padding=0):
    """(C, H, W) by (O, C, kh, kw), cross-correlation as in every deep-learning paper."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    kh, kw = weight.shape[2:]
    windows = np.lib.stride_tricks.sliding_window_view(x, (kh, kw), axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("chwij,ocij->ohw", windows, weight, optimize=True) + bias[:, None, None]


def average_pool(x, padding):
    """2×2, stride 2, zeros counted."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    x = x[:, :height, :width]
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def bilinear(x, height, width):
    """(..., H, W) to (..., height, width), pixel centres aligned, edges clamped."""

    def weights(inputs, outputs):
        table = np.zeros((outputs, inputs))
        for i in range(outputs):
            at = max((i + 0.5) * inputs / outputs - 0.5, 0.0)
            first = min(int(at), inputs - 1)
            second = min(first + 1, inputs - 1)
            table[i, first] += 1 - (at - first)
            table[i, second] += at - first
        return table

    return weights(x.shape[-2], height) @ x @ weights(x.shape[-1], width).T


def relu(x):
    return np.maximum(x, 0)


def pdn(x, p, size, padded):
    """Tables 5 and 6 of the paper; `p` holds numbered weights and biases in the order of the layers."""
    wide, one = (3, 1) if padded else (0, 0)
    if size == "small":
        x = average_pool(relu(conv2d(x, *p[0], padding=wide)), one)
        x = average_pool(relu(conv2d(x, *p[1], padding=wide)), one)
        x = relu(conv2d(x, *p[2], padding=one))
        return conv2d(x, *p[3])
    x = average_pool(relu(conv2d(x, *p[0], padding=wide)), one)
    x = average_pool(relu(conv2d(x, *p[1], padding=wide)), one)
    x = relu(conv2d(x, *p[2]))
    x = relu(conv2d(x, *p[3], padding=one))
    x = relu(conv2d(x, *p[4]))
    return conv2d(x, *p[5])


def autoencoder(x, p, cells):
    """Table 7 of the paper, dropout off."""
    for layer in range(5):
        x = relu(conv2d(x, *p[layer], stride=2, padding=1))
    x = conv2d(x, *p[5])
    for layer, side in enumerate((3, 8, 15, 32, 63, 127), start=6):
        x = relu(conv2d(bilinear(x, side, side), *p[layer], padding=2))
    x = relu(conv2d(bilinear(x, cells, cells), *p[12], padding=1))
    return conv2d(x, *p[13], padding=1)


def raw_maps(image, teacher, student, ae, mean, std, size, padded):
    """Algorithm 3: the two maps before normalisation, for a 256×256 image."""
    t = (pdn(image, teacher, size, padded) - mean[:, None, None]) / std[:, None, None]
    s = pdn(image, student, size, padded)
    a = autoencoder(image, ae, 64 if padded else 56)
    return ((t - s[:384]) ** 2).mean(0), ((a - s[384:]) ** 2).mean(0)


def score(map_st, map_ae, quantiles, pad, out):
    """Algorithm 3: normalise, average, pad with zeros, upsample, take the maximum."""
    a_st, b_st, a_ae, b_ae = quantiles
    combined = 0.5 * 0.1 * (map_st - a_st) / (b_st - a_st) + 0.5 * 0.1 * (map_ae - a_ae) / (b_ae - a_ae)
    return bilinear(np.pad(combined, pad), out, out).max()
