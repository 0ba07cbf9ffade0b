from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from calibrate.augment import augment, natural_image
from calibrate.dataset import ImageCache, PreparedImages
from calibrate.layouts import DatasetError, ImageFile
from calibrate.normalize import (
    choose_threshold,
    level_ranges,
    map_quantiles,
    promised_false_reject_rate,
    ranges_in,
    score_maps,
)
from calibrate.teacher import channel_statistics, random_teacher, teacher_features
from drivers.replay import list_images
from pipeline.engine import RawMaps
from pipeline.geometry import Geometry
from pipeline.preprocess import Preprocessor, PreprocessSpec
from pipeline.scoring import Scorer
from tests.pipeline import reference


def random_maps(rng, count, side=56):
    return [RawMaps(*rng.random((2, side, side)).astype(np.float32), 0, 0) for _ in range(count)]


def test_quantiles_are_exact_over_all_raw_maps_before_padding(rng):
    maps = random_maps(rng, 5)
    got = map_quantiles(maps, Scorer(Geometry()))
    st = np.sort(np.concatenate([m.student_teacher.ravel() for m in maps]))
    at = 0.9 * (st.size - 1)
    wanted = st[int(at)] + (at - int(at)) * (st[int(at) + 1] - st[int(at)])
    assert got.st_a == pytest.approx(wanted, rel=1e-6)
    assert got.ae_b == pytest.approx(np.quantile([m.autoencoder for m in maps], 0.995), rel=1e-6)


def test_no_held_out_image_is_a_clear_error():
    with pytest.raises(DatasetError, match="no held-out good image is left"):
        map_quantiles([], Scorer(Geometry()))


def test_flat_maps_cannot_be_normalised():
    flat = RawMaps(np.ones((56, 56), np.float32), np.ones((56, 56), np.float32), 0, 0)
    with pytest.raises(DatasetError, match="cannot be normalised"):
        map_quantiles([flat], Scorer(Geometry()))


def test_scores_against_the_papers_formula(rng):
    maps, scorer = random_maps(rng, 3), Scorer(Geometry())
    q = map_quantiles(maps, scorer)
    wanted = [
        reference.score(m.student_teacher, m.autoencoder, (q.st_a, q.st_b, q.ae_a, q.ae_b), 4, 256) for m in maps
    ]
    np.testing.assert_allclose(score_maps(maps, scorer, q), wanted, rtol=1e-5)


def test_quantiles_of_relative_maps(rng):
    scorer = Scorer(Geometry())
    maps = [RawMaps(*(c * rng.uniform(1, 2, (2, 56, 56))).astype(np.float32), 0, 0) for c in (0.5, 1.0, 4.0)]
    ranges = level_ranges(maps, scorer)
    st_range, ae_range = ranges
    assert st_range == scorer.relative_maps.range_of(m.student_teacher for m in maps)
    assert ae_range == scorer.relative_maps.range_of(m.autoencoder for m in maps)
    got = map_quantiles(maps, scorer, ranges=ranges)
    for a, b, levels, raw in (
        (got.st_a, got.st_b, st_range, [m.student_teacher for m in maps]),
        (got.ae_a, got.ae_b, ae_range, [m.autoencoder for m in maps]),
    ):
        assert (a, b) == pytest.approx(
            tuple(np.quantile([scorer.relative_maps(r, levels) for r in raw], [0.9, 0.995]))
        )
    assert (got.st_levels, got.ae_levels) == ranges
    alone = map_quantiles(maps, scorer, autoencoder=False, ranges=ranges)
    assert (alone.st_levels, alone.ae_levels, alone.st_a, alone.ae_a) == (st_range, None, got.st_a, None)


def test_a_precision_takes_off_what_its_rounding_adds(rng):
    scorer = Scorer(Geometry())
    exact = [RawMaps(*(c * rng.uniform(1, 2, (2, 56, 56))).astype(np.float32), 0, 0) for c in (0.2, 1.0, 4.0)]
    noise = rng.normal(0.1, 0.01, (3, 2, 56, 56)).astype(np.float32)
    noise[:, 1] += 0.3
    rounded = [
        RawMaps(e.student_teacher + n[0], e.autoencoder + n[1], 0, 0) for e, n in zip(exact, noise, strict=True)
    ]
    q = map_quantiles(exact, scorer, ranges=level_ranges(exact, scorer))
    st, ae = ranges_in(q, rounded, exact, scorer)
    assert (st.floor, ae.floor) == pytest.approx((noise[:, 0].mean(), noise[:, 1].mean()), rel=1e-4)
    assert (replace(st, floor=0.0), replace(ae, floor=0.0)) == (q.st_levels, q.ae_levels)
    ours = map_quantiles(rounded, scorer, ranges=(st, ae))
    np.testing.assert_allclose(score_maps(rounded, scorer, ours), score_maps(exact, scorer, q), atol=0.01)
    plain = map_quantiles(exact, scorer, autoencoder=False)
    assert ranges_in(plain, rounded, exact, scorer) == (None, None)


def test_a_map_of_zeros_has_no_level():
    blank = RawMaps(*np.zeros((2, 56, 56), np.float32), 0, 0)
    with pytest.raises(DatasetError, match="cannot be divided by their levels"):
        level_ranges([blank], Scorer(Geometry()))


def test_threshold_keeps_the_false_reject_rate_over_many_draws(rng):
    rejected = []
    for _ in range(4000):
        scores = rng.normal(0, 1, 100)
        chosen = choose_threshold(scores[:-1], 0.05)
        assert chosen.false_reject_bound <= 0.05
        rejected.append(scores[-1] > chosen.value)
    assert np.mean(rejected) == pytest.approx(0.05, abs=0.012)


def test_too_few_scores_take_the_largest_and_say_what_that_promises():
    chosen = choose_threshold(np.array([3.0, 1.0, 2.0]), 0.01)
    assert (chosen.value, chosen.false_reject_bound, chosen.held_out) == (3.0, 0.25, 3)


def test_channel_statistics_against_float64(good_parts):
    geometry = Geometry(64, 64, tile_rows=2, tile_columns=1)  # overlapping tiles: each cell counts once
    files = [ImageFile(*pair) for pair in list_images(good_parts)][:5]
    images = PreparedImages(files, ImageCache(Preprocessor(PreprocessSpec(64, 64)), None, 0))
    teacher = random_teacher("small", seed=4)
    with torch.no_grad():
        pieces = [
            p for i in range(5) for p in teacher_features(teacher, torch.from_numpy(images[i])[None], geometry)
        ]
        mean, std = channel_statistics(pieces)
        whole = np.stack([teacher(torch.from_numpy(images[i])[None])[0].double().numpy() for i in range(5)])
    np.testing.assert_allclose(mean, whole.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(std, whole.std((0, 2, 3)), rtol=1e-4)


def test_random_teacher_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    a, b = (random_teacher("small", seed=1).state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(before, torch.random.get_rng_state())
    other = random_teacher("small", seed=2).state_dict()
    assert not torch.equal(a["0.weight"], other["0.weight"])


class FixedDraw:
    """A generator that draws what it was told."""

    def __init__(self, which, strength, grey=1.0):
        self.which, self.strength, self.grey = which, strength, grey

    def integers(self, _high):
        return self.which

    def uniform(self, low, high):
        assert (low, high) == (0.8, 1.2)
        return self.strength

    def random(self):
        return self.grey


@pytest.mark.parametrize("which", [0, 1, 2])
def test_augmentations_are_torchvisions(which, rng):
    mean, std = reference.MEAN[:, None, None], reference.STD[:, None, None]
    shades, strength = rng.random((3, 8, 8)), 1.15
    luma = (shades * np.array([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    other = [0.0, luma.mean(), luma][which]  # brightness, contrast, saturation
    wanted = np.clip(strength * shades + (1 - strength) * other, 0, 1)
    got = augment(((shades - mean) / std).astype(np.float32), FixedDraw(which, strength))
    np.testing.assert_allclose(got * std + mean, wanted, atol=1e-5)


def test_natural_images_are_enlarged_cropped_and_sometimes_grey(rng):
    picture = rng.integers(0, 256, (40, 60, 3)).astype(np.uint8)
    colour = natural_image(picture, 32, 24, FixedDraw(0, 0, grey=0.9))
    shades = reference.resize_axis(picture[..., ::-1] / 255, 48)
    shades = reference.resize_axis(shades.swapaxes(0, 1), 64).swapaxes(0, 1)
    wanted = ((shades - reference.MEAN) / reference.STD)[12:36, 16:48].transpose(2, 0, 1)
    np.testing.assert_allclose(colour, wanted, atol=1e-4)
    grey = natural_image(picture, 32, 24, FixedDraw(0, 0, grey=0.1))
    grey_shades = grey * reference.STD[:, None, None] + reference.MEAN[:, None, None]
    assert np.abs(grey_shades - grey_shades[:1]).max() < 1e-5


def test_a_bound_is_promised_only_where_it_is_one():
    """Two maps that one held-out image weighs: a new image's mean of both is above its own more often than not."""
    rng = np.random.default_rng(0)
    held_out, new = np.exp(rng.normal(0, 0.5, (2, 20_000, 2)))
    relative = new / held_out
    assert (relative[:, 0] > 1).mean() == pytest.approx(0.5, abs=0.02)
    assert (relative.mean(axis=1) > 1).mean() > 0.55
    for ae_a, promised in ((None, "at most 1.64%"), (0.1, "about 1.64%")):
        bundle = SimpleNamespace(quantiles=SimpleNamespace(ae_a=ae_a), calibration={"false_reject_bound": 1 / 61})
        assert promised_false_reject_rate(bundle) == promised
