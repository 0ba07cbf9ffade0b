from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from calibrate.layouts import Defect
from calibrate.metrics import Curve, PixelTally, Rate, image_metrics, score_edges


def brute_force_pro(images, limit, weight_area=None):
    """AU-PRO and AU-sPRO from their definitions: every score a threshold, trapezoids by hand."""
    thresholds = np.unique(np.concatenate([values.ravel() for values, _ in images]))[::-1]
    normal = np.concatenate([values[~np.any([d.mask for d in defects] or [np.zeros(values.shape, bool)], axis=0)]
                             for values, defects in images])  # fmt: skip
    points = [(0.0, 0.0)]
    for threshold in thresholds:
        overlaps = [
            min((values[d.mask] >= threshold).sum() / (d.saturation_px if weight_area else d.mask.sum()), 1)
            for values, defects in images
            for d in defects
        ]
        points.append(((normal >= threshold).mean(), np.mean(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 >= limit:
            break
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def regions_of(mask):
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    return [Defect(labels == k, float((labels == k).sum())) for k in range(1, count)]


def some_images(rng, ties):
    images = []
    for index in range(6):
        values = rng.normal(size=(14, 17)).astype(np.float32)
        mask = np.zeros((14, 17), bool)
        if index % 3:
            mask[2:6, 3 : 5 + index] = True
            mask[9:12, 12:14] = True
            values[mask] += 1.0
        if ties:
            values = np.round(values * 2) / 2
        images.append((values.astype(np.float32), regions_of(mask)))
    return images


def tally_of(images, saturating=()):
    tally = PixelTally(score_edges(values for values, _ in images))
    for index, (values, defects) in enumerate(images):
        tally.add("spot" if defects else "good", values, defects, saturating[index] if saturating else ())
    return tally


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_against_its_definition(rng, ties, limit):
    images = some_images(rng, ties)
    metrics = tally_of(images).metrics(["good", "spot"])
    assert metrics.pro.area(limit) == pytest.approx(brute_force_pro(images, limit), abs=1e-9)


@pytest.mark.parametrize("ties", [False, True])
def test_auspro_against_its_definition(rng, ties):
    images = some_images(rng, ties)
    saturating = [[Defect(d.mask, 0.4 * d.mask.sum()) for d in defects] for _, defects in images]
    metrics = tally_of(images, saturating).metrics(["good", "spot"])
    wanted = brute_force_pro(list(zip([v for v, _ in images], saturating, strict=True)), 0.05, weight_area=True)
    assert metrics.auspro == pytest.approx(wanted, abs=1e-9)
    assert metrics.auspro > metrics.pro.area(0.05), "a saturated defect counts as found earlier"


def test_pixel_auroc_and_ap_are_scikit_learns(rng):
    images = some_images(rng, ties=True)
    truth = np.concatenate(
        [np.any([d.mask for d in ds] or [np.zeros(v.shape, bool)], axis=0).ravel() for v, ds in images]
    )
    values = np.concatenate([v.ravel() for v, _ in images])
    metrics = tally_of(images).metrics(["good", "spot"])
    assert metrics.auroc == pytest.approx(roc_auc_score(truth, values), abs=1e-12)
    assert metrics.ap == pytest.approx(average_precision_score(truth, values), abs=1e-12)


def test_a_perfect_map_has_one_and_a_constant_map_a_half(rng):
    mask = np.zeros((10, 10), bool)
    mask[2:5, 2:5] = True
    perfect = tally_of([(mask.astype(np.float32), regions_of(mask))]).metrics(["spot"])
    assert (perfect.auroc, perfect.aupro) == (pytest.approx(1), pytest.approx(1))
    flat = tally_of([(np.zeros((10, 10), np.float32), regions_of(mask))]).metrics(["spot"])
    assert flat.auroc == pytest.approx(0.5)
    assert flat.aupro == pytest.approx(0.15), "the diagonal up to 0.3, divided by 0.3"


def test_without_defects_or_without_normal_pixels_there_are_no_pixel_metrics():
    assert tally_of([(np.zeros((5, 5), np.float32), [])]).metrics(["good"]) is None
    everything = np.ones((5, 5), bool)
    assert tally_of([(np.zeros((5, 5), np.float32), regions_of(everything))]).metrics(["spot"]) is None
    assert tally_of([(np.zeros((5, 5), np.float32), regions_of(~everything))]).metrics(["good"]) is None


def test_ignored_pixels_do_not_count(rng):
    values = rng.normal(size=(12, 12)).astype(np.float32)
    mask = np.zeros((12, 12), bool)
    mask[3:6, 3:6] = True
    ignored = values.copy()
    ignored[:, 8:] = -np.inf
    cut = (values[:, :8], regions_of(mask[:, :8]))
    a = tally_of([(ignored, regions_of(mask))]).metrics(["spot"])
    b = tally_of([cut]).metrics(["spot"])
    assert (a.auroc, a.aupro) == (pytest.approx(b.auroc), pytest.approx(b.aupro))


def test_too_many_values_are_told_apart_finely_enough(rng):
    values = rng.normal(size=(400, 400)).astype(np.float32)
    mask = np.zeros(values.shape, bool)
    mask[100:150, 100:150] = True
    values[mask] += 1.5
    assert len(np.unique(values)) > 1 << 16
    metrics = tally_of([(values, regions_of(mask))]).metrics(["spot"])
    assert metrics.auroc == pytest.approx(roc_auc_score(mask.ravel(), values.ravel()), abs=1e-4)
    assert metrics.ap == pytest.approx(average_precision_score(mask.ravel(), values.ravel()), abs=1e-4)


def test_a_curve_is_cut_between_its_points():
    assert Curve(np.array([0.0, 1.0]), np.array([0.0, 1.0])).area(0.3) == pytest.approx(0.15)
    assert Curve(np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0])).area(0.3) == pytest.approx(1.0)


def test_image_metrics_against_hand_counts():
    defective = np.array([False, False, True, True])
    metrics = image_metrics(defective, np.array([0.1, 0.4, 0.35, 0.8]))
    assert metrics.auroc == pytest.approx(0.75)
    assert metrics.ap == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert metrics.f1_max == pytest.approx(0.8)


def test_wilsons_interval():
    low, high = Rate(0, 172).interval
    z2 = 1.959964**2
    assert (low, high) == (pytest.approx(0, abs=1e-12), pytest.approx(z2 / (172 + z2), rel=1e-5))
    assert Rate(0, 0).interval is None
    assert Rate(0, 0).rate is None
