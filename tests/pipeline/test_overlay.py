from __future__ import annotations

import numpy as np
import pytest

from drivers.bayer import mosaic
from drivers.frame import PixelFormat
from pipeline.geometry import Geometry
from pipeline.overlay import lay_over, overlay_of, to_bgr


@pytest.mark.parametrize("name", ["RGB8", "BGR8", "BayerRG8", "BayerGB12"])
def test_colours_are_shown_as_they_are(name):
    fmt, rgb = PixelFormat(name), np.full((16, 16, 3), (200, 120, 40), np.uint16)
    image = rgb if fmt.colour_order == "RGB" else rgb[..., ::-1]
    if fmt.bayer:
        image = mosaic((rgb << (fmt.bits - 8)).astype(fmt.dtype), fmt.bayer)
    shown = to_bgr(np.ascontiguousarray(image, fmt.dtype), fmt)
    assert (shown == (40, 120, 200)).all()


@pytest.mark.parametrize(("name", "value"), [("Mono8", 77), ("Mono12", 77 << 4), ("Mono16", 77 << 8)])
def test_grey_stays_grey(name, value):
    fmt = PixelFormat(name)
    assert (to_bgr(np.full((4, 5), value, fmt.dtype), fmt) == 77).all()


def test_heat_grows_with_the_map_and_begins_below_the_threshold():
    photograph = np.full((1, 5, 3), 100, np.uint8)
    anomaly = np.array([[-np.inf, 0.0, 0.25, 0.5, 9.0]], np.float32)
    brightness = lay_over(photograph, anomaly, 0.5).sum(axis=2)[0].astype(int)
    assert brightness[0] == brightness[1]
    assert (np.diff(brightness[1:]) > 0).all()


def test_a_map_lies_where_its_region_of_interest_is():
    geometry = Geometry(64, 64)
    anomaly_map = np.zeros((geometry.map_height, geometry.map_width), np.float32)
    anomaly_map[0, 0] = 5.0  # one cell within the padding's corner
    roi = {"x": 100, "y": 40, "width": 64, "height": 32}
    picture = overlay_of(
        np.full((120, 200), 90, np.uint8), PixelFormat.MONO8, anomaly_map, {**geometry.to_json(), "roi": roi}, 0.5
    )
    changed = np.argwhere((picture != picture[0, 0]).any(axis=2))
    (top, left), (bottom, right) = changed.min(axis=0), changed.max(axis=0)
    cell_px = (64 / (geometry.map_width + 2 * geometry.padding_cells), 32 / (geometry.map_height + 8))
    assert left >= 100
    assert top >= 40
    assert right < 100 + 6 * cell_px[0]
    assert bottom < 40 + 6 * cell_px[1]
