from __future__ import annotations

import numpy as np
import pytest
import torch

from calibrate.expected import expect_difference
from calibrate.layouts import DatasetError
from pipeline.geometry import Geometry
from pipeline.networks import EfficientAD
from tests.pipeline.test_networks import seeded_model


def images_of(rng, geometry, count):
    sides = (geometry.image_height, geometry.image_width)
    return [torch.from_numpy(rng.normal(0, 1 + i, (1, 3, *sides)).astype(np.float32)) for i in range(count)]


def all_cells(geometry):
    return np.ones((geometry.map_height, geometry.map_width), bool)


def test_the_expected_difference_is_that_of_a_regression(rng):
    networks = seeded_model(geometry=Geometry(128, 96))
    images, counted = images_of(rng, networks.geometry, 3), all_cells(networks.geometry)
    counted[:5, 3:9] = False
    expect_difference(networks, lambda: images, counted)
    rows, wanted = [], []
    with torch.inference_mode():
        for image in images:
            features = networks.describe(image)[0].double().numpy()
            missed = features - networks.student(image)[0, :384].double().numpy()
            for y, x in np.argwhere(counted):
                rows.append([*features[:, y, x], 1.0])
                wanted.append(np.mean(missed[:, y, x] ** 2))
    x, mean = np.array(rows), np.mean(wanted)
    # Ridge regression as least squares with one more row for each weight.
    penalty = np.sqrt(1e-3 * np.mean((x**2).sum(axis=0))) * np.eye(385)
    fitted = np.linalg.lstsq(np.vstack([x, penalty]), np.concatenate([wanted, np.zeros(385)]), rcond=None)[0]
    state = networks.state_dict()
    ours = np.append(state["expected.weight"].numpy().ravel(), state["expected.bias"].numpy()) * 2 * mean
    np.testing.assert_allclose(x @ ours, x @ fitted, rtol=1e-3, atol=1e-3 * mean)
    assert np.corrcoef(x @ ours, wanted)[0, 1] > 0.7, "it foretells something"
    assert state["expected.largest"].item() == pytest.approx((x @ ours).max() / (2 * mean), rel=1e-3)


def test_tiles_count_each_cell_once(rng):
    whole, tiled = Geometry(192, 160), Geometry(192, 160, tile_rows=2, tile_columns=2)
    one, pieces = seeded_model(geometry=whole), EfficientAD("small", tiled).eval()
    pieces.load_state_dict(one.state_dict())
    images = images_of(rng, whole, 2)
    for networks in (one, pieces):
        expect_difference(networks, lambda: images, all_cells(whole))
    for name in ("expected.weight", "expected.bias", "expected.largest"):
        torch.testing.assert_close(one.state_dict()[name], pieces.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_student_without_a_difference_expects_nothing(value, rng):
    networks = seeded_model(geometry=Geometry(64, 64))
    with torch.no_grad():
        for last in (networks.teacher[-1], networks.student[-1]):
            last.weight.zero_()
            last.bias.zero_()
        networks.teacher_mean.zero_()
        networks.student[-1].bias.fill_(value)
    with pytest.raises(DatasetError, match=f"student and teacher differ by {value}"):
        expect_difference(networks, lambda: images_of(rng, networks.geometry, 1), all_cells(networks.geometry))
