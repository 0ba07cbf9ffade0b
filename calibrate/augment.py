"""The autoencoder branch's augmentation, a part's other positions, and the pretraining penalty's images."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from calibrate.options import Turns
from drivers.replay import decode_image
from pipeline.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipeline.resample import resize

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_MEAN = np.array(IMAGENET_MEAN, np.float32)[:, None, None]
_STD = np.array(IMAGENET_STD, np.float32)[:, None, None]
_NATURAL_ENLARGEMENT = 2
_GREY_PROBABILITY = 0.3


def augment(image: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Change one of brightness, contrast and saturation by λ ~ U(0.8, 1.2) (paper, algorithm 1).

    Args:
        image: (3, height, width), ImageNet-normalised.
        rng: draws which one and how much.

    Returns:
        The same shape; shades are clipped to 0 … 1, as torchvision's adjustments do.
    """
    which, strength = int(rng.integers(3)), np.float32(rng.uniform(0.8, 1.2))
    shades = image * _STD + _MEAN
    if which == 0:
        other = np.zeros((1, 1, 1), np.float32)
    else:
        grey = np.tensordot(LUMA, shades, 1)[None]
        other = grey.mean(dtype=np.float64, keepdims=True).astype(np.float32) if which == 1 else grey
    changed = np.clip(strength * shades + (1 - strength) * other, 0, 1)
    return np.asarray((changed - _MEAN) / _STD, np.float32)


def turn(image: NDArray[np.float32], turns: Turns, rng: np.random.Generator) -> NDArray[np.float32]:
    """Flip and rotate an image as its part may also appear.

    Args:
        image: (3, height, width).
        turns: what may happen to it.
        rng: draws what does.

    Returns:
        The same shape; what comes in from outside is the image mirrored at its border.
    """
    if turns.flip_horizontal and rng.random() < 0.5:
        image = image[:, :, ::-1]
    if turns.flip_vertical and rng.random() < 0.5:
        image = image[:, ::-1]
    if turns.rotate_deg > 0:
        height, width = image.shape[1:]
        angle = float(rng.uniform(-turns.rotate_deg, turns.rotate_deg))
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1.0)
        last = np.ascontiguousarray(image.transpose(1, 2, 0))
        turned = cv2.warpAffine(last, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)
        image = np.asarray(turned.transpose(2, 0, 1), np.float32)
    return np.ascontiguousarray(image, np.float32)


def natural_image(
    data: NDArray[np.uint8], width: int, height: int, rng: np.random.Generator, *, enlarge: bool = True
) -> NDArray[np.float32]:
    """Prepare an image for the pretraining penalty: enlarge, grey by chance, crop the centre.

    Args:
        data: (h, w) or (h, w, 3) as BGR, 8 bits.
        width: of the result, px.
        height: of the result, px.
        rng: draws whether it turns grey (probability 0.3).
        enlarge: to twice the size before cropping, as the paper does; procedural images come in size.

    Returns:
        (3, height, width), ImageNet-normalised.
    """
    shades = data.astype(np.float32) / np.float32(255)
    shades = np.repeat(shades[..., None], 3, 2) if shades.ndim == 2 else shades[..., ::-1]
    large = np.asarray(np.ascontiguousarray(shades), np.float32)
    if enlarge:
        large = resize(large, _NATURAL_ENLARGEMENT * width, _NATURAL_ENLARGEMENT * height)
    if rng.random() < _GREY_PROBABILITY:
        large = np.asarray(np.repeat((large @ LUMA)[..., None], 3, 2), np.float32)
    top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
    crop = large[top : top + height, left : left + width].transpose(2, 0, 1)
    return np.ascontiguousarray((crop - _MEAN) / _STD, np.float32)


def read_natural_image(path: Path) -> NDArray[np.uint8]:
    """Read a natural image as 8 bits. Raises OSError or ValueError."""
    image = decode_image(path)
    return np.asarray(image if image.dtype == np.uint8 else image // 257, np.uint8)
