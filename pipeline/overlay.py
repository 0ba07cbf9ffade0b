"""Pictures for people: a frame in colour, and its anomaly map laid over it."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from drivers.frame import Image, PixelFormat
from pipeline.geometry import Geometry
from pipeline.preprocess import demosaic
from pipeline.scoring import FloatMap, FrameArea, Scorer

Pixels = NDArray[np.uint8]

_FULL_AT = 3.0
"""Colour begins well below the threshold and is full at so many times it."""
_PHOTOGRAPH, _HEAT = 0.35, 0.65


def to_bgr(image: Image, fmt: PixelFormat) -> Pixels:
    """Show a frame as a person would see it: (height, width, 3), 8 bits, B, G, R."""
    shown = np.asarray(image >> (fmt.bits - 8), np.uint8)
    if fmt.bayer:
        return np.ascontiguousarray(demosaic(shown, fmt.bayer)[..., ::-1], np.uint8)
    if fmt.colour_order == "RGB":
        return np.ascontiguousarray(shown[..., ::-1])
    return np.asarray(cv2.cvtColor(shown, cv2.COLOR_GRAY2BGR) if shown.ndim == 2 else shown, np.uint8)


def lay_over(photograph: Pixels, anomaly: FloatMap, threshold: float) -> Pixels:
    """Colour a photograph by its anomaly map.

    Args:
        photograph: (height, width, 3), B, G, R.
        anomaly: (height, width), normalised; −inf where nothing is inspected.
        threshold: of the scores.
    """
    heat = np.clip(np.where(np.isfinite(anomaly), anomaly, 0) / max(_FULL_AT * threshold, 1e-6), 0, 1)
    coloured = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    grey = cv2.cvtColor(cv2.cvtColor(photograph, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    return np.asarray(cv2.addWeighted(grey, _PHOTOGRAPH, coloured, _HEAT, 0), np.uint8)


def overlay_of(
    image: Image, fmt: PixelFormat, anomaly_map: FloatMap, geometry: dict[str, Any], threshold: float
) -> Pixels:
    """Lay a published map over its frame, as docs/protocol.md describes: (height, width, 3), B, G, R.

    Args:
        image: the whole frame.
        fmt: its pixel format.
        anomaly_map: (map_height, map_width), normalised.
        geometry: of the map's message, `roi` included.
        threshold: of the verdict.
    """
    photograph = to_bgr(image, fmt)
    height, width = photograph.shape[:2]
    roi = geometry["roi"]
    area = FrameArea(0, 0, width, height) if roi is None else FrameArea(**roi)
    stretched = Scorer(Geometry.from_json(geometry)).stretch(anomaly_map)
    whole = np.zeros((height, width), np.float32)
    inspected = cv2.resize(stretched, (area.width, area.height), interpolation=cv2.INTER_LINEAR)
    whole[area.y : area.y + area.height, area.x : area.x + area.width] = inspected
    return lay_over(photograph, whole, threshold)
