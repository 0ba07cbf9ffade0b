"""Turn a colour picture into the raw mosaic that a Bayer sensor would have delivered."""

from __future__ import annotations

import numpy as np

from drivers.frame import BayerPattern, Image


def mosaic(rgb: Image, pattern: BayerPattern) -> Image:
    """Sample each pixel's own colour from an RGB picture.

    Args:
        rgb: (height, width, 3), channels in the order R, G, B.
        pattern: colours of the top-left 2×2 pixels, row by row.

    Returns:
        (height, width), same type.
    """
    raw = np.empty(rgb.shape[:2], rgb.dtype)
    for index, colour in enumerate(pattern):
        row, column = divmod(index, 2)
        raw[row::2, column::2] = rgb[row::2, column::2, "RGB".index(colour)]
    return raw
