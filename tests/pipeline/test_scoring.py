from __future__ import annotations

import numpy as np
import pytest

from pipeline.geometry import Geometry
from pipeline.resample import axis_weights, resize, shrink_rows
from pipeline.scoring import MAX_REGIONS, FrameArea, Quantiles, Scorer
from tests.pipeline import reference

AREA = FrameArea(100, 50, 512, 1024)


def test_combined_map_is_the_mean_of_both_normalised(rng):
    st, ae = rng.random((2, 56, 56)).astype(np.float32)
    got = Scorer(Geometry()).combine(st, ae, Quantiles(0.2, 0.7, 0.1, 0.9))
    np.testing.assert_allclose(got, 0.05 * ((st - 0.2) / 0.5 + (ae - 0.1) / 0.8), atol=1e-6)


@pytest.mark.parametrize(("geometry", "pad"), [(Geometry(), 4), (Geometry(padded=True), 0)])
def test_stretch_pads_with_zeros_and_interpolates_bilinearly(geometry, pad, rng):
    values = rng.normal(0, 1, (geometry.map_height, geometry.map_width)).astype(np.float32)
    wanted = reference.bilinear(np.pad(values, pad).astype(np.float64), 256, 256)
    np.testing.assert_allclose(Scorer(geometry).stretch(values), wanted, atol=1e-5)


def test_score_size_is_fixed_whatever_the_camera():
    geometry = Geometry(512, 384, score_width=256, score_height=192)
    stretched = Scorer(geometry).stretch(np.zeros((geometry.map_height, geometry.map_width), np.float32))
    assert stretched.shape == (192, 256)


def test_ignored_areas_count_neither_in_score_nor_regions_nor_quantiles():
    ignore = np.zeros((1024, 512), bool)
    ignore[:, :256] = True
    scorer = Scorer(Geometry(), ignore)
    values = np.zeros((56, 56), np.float32)
    values[20:24, 5:9] = 9.0  # left: ignored
    stretched = scorer.stretch(values)
    assert stretched.max() == 0.0
    assert scorer.regions(stretched, 0.5, AREA) == []
    assert scorer.counted_values(values).max() == 0.0
    assert scorer.counted_values(values).size == 56 * 28
    values[20:24, 45:49] = 3.0  # right: counts
    assert scorer.stretch(values).max() == pytest.approx(3.0)


def test_a_strip_thinner_than_a_cell_does_not_vanish_from_the_mask():
    ignore = np.zeros((2048, 2048), bool)
    ignore[1000:1004] = True
    scorer = Scorer(Geometry(), ignore)
    assert scorer.ignored_score.any(axis=1).sum() == 1
    assert scorer.ignored_cells.any(axis=1).sum() == 1
    values = np.zeros((56, 56), np.float32)
    values[scorer.ignored_cells] = 5.0
    assert scorer.stretch(values).max() == scorer.counted_values(values).max() == scorer.blank(values).max() == 0


def test_without_an_autoencoder_the_map_is_the_student_teacher_map_alone(rng):
    st, ae = rng.random((2, 56, 56)).astype(np.float32)
    got = Scorer(Geometry()).combine(st, ae, Quantiles(0.2, 0.7, None, None))
    np.testing.assert_allclose(got, 0.1 * (st - 0.2) / 0.5, atol=1e-6)


def test_mask_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="leaves nothing"):
        Scorer(Geometry(), np.ones((64, 64), bool))


def test_regions_against_a_flood_fill(rng):
    geometry = Geometry()
    values = rng.normal(0, 1, (56, 56)).astype(np.float32)
    scorer = Scorer(geometry)
    stretched, threshold = scorer.stretch(values), 1.4
    area = FrameArea(0, 0, 256, 256)
    got = scorer.regions(stretched, threshold, area)

    above, wanted = stretched > threshold, []
    while above.any():
        stack, members = [tuple(np.argwhere(above)[0])], []
        above[stack[0]] = False
        while stack:
            y, x = stack.pop()
            members.append((y, x))
            for ny in range(max(y - 1, 0), min(y + 2, 256)):
                for nx in range(max(x - 1, 0), min(x + 2, 256)):
                    if above[ny, nx]:
                        above[ny, nx] = False
                        stack.append((ny, nx))
        ys, xs = np.array(members).T
        peak = max(float(stretched[m]) for m in members)
        wanted.append((int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1, len(members), peak))
    wanted.sort(key=lambda r: -r[4])
    wanted = wanted[:MAX_REGIONS]
    found = [(r.x, r.y, r.width, r.height, r.area_px, r.peak) for r in got]
    assert [r[4] for r in found] == [r[4] for r in wanted]
    assert sorted(found) == sorted(wanted) or len(wanted) == MAX_REGIONS


def test_regions_lie_where_the_defect_lies_in_the_full_frame():
    # A cell's centre at map index i lies at 4·(i + 4) + 2 of 256 px, stretched over the region of interest.
    values = np.zeros((56, 56), np.float32)
    values[10, 30] = 1.0
    scorer = Scorer(Geometry())
    (region,) = scorer.regions(scorer.stretch(values), 0.5, AREA)
    centre_x, centre_y = region.x + region.width / 2, region.y + region.height / 2
    assert centre_x == pytest.approx(100 + (4 * 34 + 2) / 256 * 512, abs=2)
    assert centre_y == pytest.approx(50 + (4 * 14 + 2) / 256 * 1024, abs=4)
    assert region.peak == pytest.approx(scorer.stretch(values).max())


def test_regions_follow_tiles_crop_and_resize():
    geometry = Geometry(512, 256, tile_rows=1, tile_columns=2)
    values = np.zeros((geometry.map_height, geometry.map_width), np.float32)
    values[30, 100] = 1.0
    (region,) = Scorer(geometry).regions(Scorer(geometry).stretch(values), 0.5, FrameArea(7, 9, 1024, 512))
    assert region.x + region.width / 2 == pytest.approx(7 + (4 * 104 + 2) * 2, abs=2)
    assert region.y + region.height / 2 == pytest.approx(9 + (4 * 34 + 2) * 2, abs=2)


@pytest.mark.parametrize("bad", [(0.5, 0.5, 0.1, 0.2), (0.1, 0.2, 0.5, 0.4), (float("nan"), 1.0, 0.0, 1.0)])
def test_quantiles_that_cannot_normalise_are_refused(bad):
    with pytest.raises(ValueError, match="quantile"):
        Quantiles(*bad)


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(300, 256), (257, 256), (512, 256), (100, 256), (1025, 1024), (7, 7)]
)
def test_resize_tables_are_what_opencv_does(inputs, outputs, rng):
    line = rng.random((1, inputs), np.float32)
    table = axis_weights(inputs, outputs)
    taps = np.minimum(table.start[:, None] + np.arange(table.weights.shape[1]), inputs - 1)
    np.testing.assert_allclose(resize(line, outputs, 1)[0], (line[0][taps] * table.weights).sum(1), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(("inputs", "outputs"), [(2048, 256), (1200, 256), (257, 256), (100, 99), (7, 3), (3, 1)])
def test_rows_of_whole_numbers_are_averaged_by_the_same_weights(inputs, outputs, dtype, rng):
    image = rng.integers(0, np.iinfo(dtype).max, (inputs, 5, 3), endpoint=True).astype(dtype)
    table = axis_weights(inputs, outputs)
    wanted = np.zeros((outputs, 5, 3))
    for i, start in enumerate(table.start):
        for k, weight in enumerate(table.weights[i]):
            if weight:
                wanted[i] += float(weight) * image[start + k]
    np.testing.assert_allclose(shrink_rows(image, outputs), wanted, rtol=2e-6)
    np.testing.assert_allclose(shrink_rows(image[..., 0], outputs), wanted[..., 0], rtol=2e-6)
