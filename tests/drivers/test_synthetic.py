from __future__ import annotations

import numpy as np
import pytest

from drivers.camera import CameraInfo, EndOfStream
from drivers.frame import PixelFormat
from drivers.synthetic import DEFECT_KINDS, PartRenderer, SyntheticCamera, SyntheticOptions


def renderer(**options):
    return PartRenderer(SyntheticOptions(seed=5, width=160, height=128, **options))


def test_the_same_seed_and_index_give_the_same_part():
    a, b = renderer().render(7), renderer().render(7)
    np.testing.assert_array_equal(a.rgb, b.rgb)
    assert not np.array_equal(a.rgb, renderer().render(8).rgb)


@pytest.mark.parametrize("kind", DEFECT_KINDS)
def test_the_mask_is_where_the_defect_changed_the_picture(kind):
    good, bad = renderer().render(3, "good"), renderer().render(3, kind)
    assert not good.mask.any()
    assert 20 < bad.mask.sum() < 0.1 * bad.mask.size
    difference = np.abs(good.rgb.astype(int) - bad.rgb.astype(int)).max(axis=2)
    assert difference[bad.mask].mean() > 20
    assert (difference > 30).sum() < 2 * bad.mask.sum()


def test_defects_come_at_the_configured_rate_and_kinds():
    line = renderer(defect_rate=0.25, defects=("stain", "extra_hole"))
    kinds = [line.kind_of(i) for i in range(2000)]
    assert 0.2 < sum(k != "good" for k in kinds) / 2000 < 0.3
    assert set(kinds) == {"good", "stain", "extra_hole"}


@pytest.mark.parametrize("fmt", list(PixelFormat))
def test_every_pixel_format(fmt):
    options = SyntheticOptions(width=96, height=64, pixel_format=fmt, frames=1)
    camera = SyntheticCamera(options)
    camera.open()
    (frame,) = camera.grab(0.1)
    assert fmt.fits(frame.image)
    assert fmt.max_value // 4 < frame.image.max() <= fmt.max_value
    with pytest.raises(EndOfStream):
        camera.grab(0.1)


def test_truth_travels_in_the_source():
    camera = SyntheticCamera(SyntheticOptions(width=96, height=64, frames=3, defect_rate=1, first_index=40))
    camera.open()
    sources = [camera.grab(0.1)[0].source for _ in range(3)]
    assert [s.split("/")[1] for s in sources] == ["000040", "000041", "000042"]
    assert all(s.split("/")[0] in DEFECT_KINDS for s in sources)


@pytest.mark.parametrize("fmt", [PixelFormat.MONO8, PixelFormat.BAYER_RG12, PixelFormat.BGR8])
def test_room_for_a_frame_is_known_before_it_comes(fmt):
    camera = SyntheticCamera(SyntheticOptions(seed=1, width=96, height=64, pixel_format=fmt))
    size = camera.open().frame_bytes
    (frame,) = camera.grab(60)
    assert frame.image.nbytes == size
    assert CameraInfo("folder", "12 image files").frame_bytes == 0
