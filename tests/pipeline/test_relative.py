from __future__ import annotations

import json
from dataclasses import astuple, replace

import numpy as np
import pytest

from pipeline.geometry import Geometry
from pipeline.relative import LevelRange, RelativeMaps
from pipeline.scoring import Quantiles, Scorer


def window_mean(values, counted, y, x, reach, *, mirrored):
    """Average what counts in a square around a cell, cell by cell."""
    height, width = values.shape
    total = count = 0.0
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            ny, nx = y + dy, x + dx
            if mirrored:
                ny, nx = height - 1 - abs(height - 1 - abs(ny)), width - 1 - abs(width - 1 - abs(nx))
            if 0 <= ny < height and 0 <= nx < width and counted[ny, nx]:
                total, count = total + values[ny, nx], count + 1
    return total / count


def by_hand(raw, counted, within=None):
    """Divide by the levels, within their range."""
    values = np.sort(raw[counted])
    image = values[int(np.ceil(values.size / 4)) - 1]
    wanted = np.full(raw.shape, np.nan)
    for y, x in np.argwhere(counted):
        beside = window_mean(raw, counted, y, x, 1, mirrored=True)
        around = window_mean(raw, counted, y, x, 7, mirrored=False)
        if within is None:
            wanted[y, x] = beside / np.sqrt(image * around)
        else:
            image = max(image, within.image_low)
            multiple = min(max(around / image, within.around_low), within.around_high)
            wanted[y, x] = beside / (min(image, within.image_high) * np.sqrt(multiple))
    return wanted


WIDE = LevelRange(1e-6, 1e6, 1e-6, 1e6)


@pytest.mark.parametrize(
    "within", [WIDE, LevelRange(3.5, 9.0, 1.0, 1.4), LevelRange(0.1, 1.0, 1.9, 9.0), LevelRange(0.1, 9.0, 0.1, 1.2)]
)
def test_relative_map_against_a_calculation_cell_by_cell(within, rng):
    raw = (rng.uniform(1, 9, (20, 24)) * np.linspace(0.5, 1.5, 24)).astype(np.float32)
    counted = np.ones(raw.shape, bool)
    np.testing.assert_allclose(RelativeMaps(counted)(raw, within), by_hand(raw, counted, within), rtol=1e-5)


def test_ignored_cells_count_nowhere(rng):
    raw = rng.uniform(1, 9, (24, 40)).astype(np.float32)
    counted = np.ones(raw.shape, bool)
    counted[:, 12:] = False  # some of them with nothing else around
    counted[5:9, 3:6] = False
    wanted = by_hand(raw, counted)
    for nonsense in (0.0, 1e6):
        spoilt = np.where(counted, raw, np.float32(nonsense))
        got = RelativeMaps(counted)(spoilt, WIDE)
        np.testing.assert_allclose(got[counted], wanted[counted], rtol=1e-5)
        assert np.isfinite(got).all()
        assert RelativeMaps(counted).range_of([spoilt]) == RelativeMaps(counted).range_of([raw])


def test_maps_smaller_than_the_surroundings(rng):
    raw = rng.uniform(1, 9, (8, 8)).astype(np.float32)
    counted = np.ones(raw.shape, bool)
    np.testing.assert_allclose(RelativeMaps(counted)(raw, WIDE), by_hand(raw, counted), rtol=1e-5)


def test_the_range_is_that_of_all_maps(rng):
    maps = [(c * rng.uniform(1, 2, (20, 20))).astype(np.float32) for c in (1.0, 3.0, 0.5)]
    relative = RelativeMaps(np.ones((20, 20), bool))
    images, arounds = zip(*(relative.levels(raw) for raw in maps), strict=True)
    multiples = [around / image for image, around in zip(images, arounds, strict=True)]
    wanted = [float(f(of)) for of in (images, multiples) for f in (np.min, np.max)]
    assert astuple(relative.range_of(maps)) == pytest.approx((*wanted, 0.0))
    zeros, with_nan, with_inf = (np.array(maps[0]) for _ in range(3))
    zeros[:], with_nan[3, 3], with_inf[3, 3] = 0, np.nan, np.inf
    for bad in (zeros, with_nan, with_inf):
        for order in ([*maps, bad], [bad, *maps]):
            with pytest.raises(ValueError, match="no range of positive numbers"):
                relative.range_of(order)


@pytest.fixture
def surface():
    """A good surface with something that stands out, and what judges it."""
    good = np.full((56, 56), 1.5, np.float32)
    good[20:24, 20:24] = 4.5
    relative = RelativeMaps(np.ones(good.shape, bool))
    within = relative.range_of(np.float32(contrast) * good for contrast in (0.5, 1.0, 2.0))
    return good, Quantiles(0.5, 1.0, None, None, within)


def score(raw, q, scorer=None):
    scorer = scorer or Scorer(Geometry())
    return float(scorer.stretch(scorer.combine(raw, raw, q)).max())


def test_more_contrast_is_no_defect_as_far_as_good_images_show_it(surface):
    good, q = surface
    for contrast in (0.5, 0.7, 1.9):
        assert score(np.float32(contrast) * good, q) == pytest.approx(score(good, q), rel=1e-5)
    assert score(np.float32(4) * good, q) == pytest.approx(0.2 * (2 * (score(good, q) * 5 + 0.5) - 0.5), rel=1e-5)
    assert score(np.float32(0.1) * good, q) < score(good, q)


def test_an_image_that_differs_all_over_is_not_excused(surface):
    good, q = surface
    raw = np.full(good.shape, 10.0, np.float32)  # a bit more than the largest value of any good image
    assert score(raw, q) > score(good, q)
    assert score(raw, q) == pytest.approx(0.2 * (10 / 3 - 0.5), rel=1e-5)
    assert score(np.full(good.shape, 1e30, np.float32), q) > 1e28


def test_what_rounding_adds_everywhere_is_taken_off_first(surface):
    good, q = surface
    noisy = replace(q, st_levels=replace(q.st_levels, floor=0.3))
    for contrast in (0.5, 1.0):
        raw = np.float32(contrast) * good
        assert score(raw + np.float32(0.3), noisy) == pytest.approx(score(raw, q), rel=1e-5)
        assert score(raw + np.float32(0.3), q) < score(raw, q), "without, it hides what stands out"
    assert np.isfinite(score(np.zeros(good.shape, np.float32), noisy)), "less than the floor is nothing"


def test_what_is_not_a_number_stays_so(surface):
    good, q = surface
    for value in (np.nan, np.inf):
        bad = good.copy()
        bad[5, 5] = value
        with np.errstate(invalid="ignore"):
            assert not np.isfinite(Scorer(Geometry()).combine(bad, bad, q)).all()
    assert np.isfinite(score(np.zeros(good.shape, np.float32), q))


def test_a_scorer_leaves_its_ignored_cells_out_of_the_levels(surface):
    good, q = surface
    ignore = np.zeros((256, 256), bool)
    ignore[:, 160:] = True
    scorer = Scorer(Geometry(), ignore)
    spoilt = np.where(scorer.ignored_cells, np.float32(50), good)
    assert score(spoilt, q, scorer) == score(good, q, scorer)
    assert score(spoilt, q) > 2 * score(good, q)


def test_levels_survive_json_and_nonsense_is_refused():
    q = Quantiles(0.2, 0.7, 0.1, 0.9, LevelRange(0.5, 0.8, 0.4, 2.0), LevelRange(0.1, 0.1, 0.1, 0.1, 0.02))
    assert Quantiles.from_json(json.loads(json.dumps(q.to_json()))) == q
    before = Quantiles.from_json({"st_a": 0.2, "st_b": 0.7, "ae_a": None, "ae_b": None})
    assert before == Quantiles(0.2, 0.7, None, None), "of bundles from before there were levels"
    assert before.to_json() == {"st_a": 0.2, "st_b": 0.7, "ae_a": None, "ae_b": None}
    one = LevelRange(0.5, 0.8, 0.4, 2.0)
    for bad in ((0.1, 0.9, one, None), (None, None, one, one), (None, None, None, one), (0.1, 0.9, None, one)):
        with pytest.raises(ValueError, match="levels belong to every map"):
            Quantiles(0.2, 0.7, *bad)
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, float("inf")), (float("nan"), 1.0), (1.0, 1e30)):
        for bad in ((low, high, 1.0, 2.0), (1.0, 2.0, low, high)):
            with pytest.raises(ValueError, match="no range of positive numbers"):
                LevelRange(*bad)
    with pytest.raises(ValueError, match="floor"):
        LevelRange(0.5, 0.8, 0.4, 2.0, float("nan"))
