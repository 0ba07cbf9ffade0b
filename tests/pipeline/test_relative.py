from __future__ import annotations

import json

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


def by_hand(raw, counted, levels=None):
    """Divide by the levels, within their range."""
    values = np.sort(raw[counted])
    image = values[int(np.ceil(values.size / 4)) - 1]
    wanted = np.full(raw.shape, np.nan)
    for y, x in np.argwhere(counted):
        around = window_mean(raw, counted, y, x, 7, mirrored=False)
        if levels is not None:
            around = min(max(around, levels.around_low), levels.around_high)
            image = min(max(image, levels.image_low), levels.image_high)
        wanted[y, x] = window_mean(raw, counted, y, x, 1, mirrored=True) / np.sqrt(image * around)
    return wanted


WIDE = LevelRange(1e-6, 1e6, 1e-6, 1e6)


@pytest.mark.parametrize("levels", [WIDE, LevelRange(2.5, 9.0, 1.0, 4.0), LevelRange(0.1, 1.0, 5.5, 9.0)])
def test_relative_map_against_a_calculation_cell_by_cell(levels, rng):
    raw = (rng.uniform(1, 9, (20, 24)) * np.linspace(0.5, 1.5, 24)).astype(np.float32)
    counted = np.ones(raw.shape, bool)
    np.testing.assert_allclose(RelativeMaps(counted)(raw, levels), by_hand(raw, counted, levels), rtol=1e-5)


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
    assert relative.range_of(maps) == LevelRange(
        min(images), max(images), float(np.min(arounds)), float(np.max(arounds))
    )
    with pytest.raises(ValueError, match="no range of positive numbers"):
        relative.range_of([*maps, np.zeros((20, 20), np.float32)])


def test_an_image_that_differs_all_over_is_not_excused():
    """More contrast is no defect, as far as good images show it; beyond that it is."""
    scorer = Scorer(Geometry())
    good = np.full((56, 56), 1.5, np.float32)
    good[20:30, 20:30] = 4.5
    q = Quantiles(1.0, 2.0, None, None, LevelRange(0.5, 2.0, 0.5, 8.0))

    def score(raw):
        return scorer.stretch(scorer.combine(raw, raw, q)).max()

    assert score(np.float32(1.2) * good) == pytest.approx(score(good)), "the same picture"
    everywhere = np.full((56, 56), 40.0, np.float32)
    assert score(everywhere) == pytest.approx(0.1 * (40 / (2 * 8) ** 0.5 - 1)), "more than good images ever show"
    assert score(everywhere) > 4 * score(good)


def test_levels_survive_json_and_nonsense_is_refused():
    q = Quantiles(0.2, 0.7, 0.1, 0.9, LevelRange(0.5, 0.8, 0.4, 2.0), LevelRange(0.1, 0.1, 0.1, 0.1))
    assert Quantiles.from_json(json.loads(json.dumps(q.to_json()))) == q
    before = Quantiles.from_json({"st_a": 0.2, "st_b": 0.7, "ae_a": None, "ae_b": None})
    assert before == Quantiles(0.2, 0.7, None, None), "of bundles from before there were levels"
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, float("inf")), (float("nan"), 1.0)):
        for bad in ((low, high, 1.0, 2.0), (1.0, 2.0, low, high)):
            with pytest.raises(ValueError, match="no range of positive numbers"):
                LevelRange(*bad)
