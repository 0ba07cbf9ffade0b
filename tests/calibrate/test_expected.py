from __future__ import annotations

import numpy as np
import pytest
import torch

from calibrate.expected import expect_difference
from calibrate.layouts import DatasetError
from calibrate.teacher import channel_statistics
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
    largest = expect_difference(networks, lambda: images, counted)
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
    assert largest == pytest.approx(1 + (x @ ours).max() / (2 * mean), rel=1e-3)
    assert state["expected.largest"].item() == pytest.approx(largest - 1)


def test_tiles_count_each_cell_once(rng):
    whole, tiled = Geometry(192, 160), Geometry(192, 160, tile_rows=3, tile_columns=3)
    assert sum(tile.rows.stop - tile.rows.start for tile in tiled.tiles()) > 3 * whole.map_height, "tiles overlap"
    one, pieces = seeded_model(geometry=whole), EfficientAD("small", tiled).eval()
    pieces.load_state_dict(one.state_dict())
    images = images_of(rng, whole, 2)
    for networks in (one, pieces):
        expect_difference(networks, lambda: images, all_cells(whole))
    with torch.inference_mode():
        divisors = [networks.expected(one.describe(images[0])) for networks in (one, pieces)]
    assert divisors[0].std() > 0.01
    torch.testing.assert_close(*divisors, rtol=1e-4, atol=0)


def test_what_is_expected_is_foretold_for_an_image_that_was_not_looked_at(rng):
    """A student that is off by what the teacher's first features say."""
    networks = seeded_model(geometry=Geometry(128, 128))
    images = images_of(rng, networks.geometry, 3)
    with torch.no_grad():
        statistics = channel_statistics(networks.teacher(image)[0].flatten(1) for image in images)
        networks.teacher_mean.copy_(statistics[0])
        networks.teacher_std.copy_(statistics[1])
        networks.student[:-1].load_state_dict(networks.teacher[:-1].state_dict())
        last, taught = networks.student[-1], networks.teacher[-1]
        std, mean = networks.teacher_std, networks.teacher_mean
        last.weight[:384] = taught.weight / std[:, None, None, None]
        last.bias[:384] = (taught.bias - mean) / std
        last.weight[:384] -= last.weight[0].clone()  # the difference is the first feature, in every channel
        last.bias[:384] -= last.bias[0].clone() + 30
        expect_difference(networks, lambda: images, all_cells(networks.geometry))
        (image,) = images_of(rng, networks.geometry, 1)
        missed = (networks.describe(image) - networks.student(image)[:, :384]).square().mean(dim=1)
        divisor = networks.expected(networks.describe(image))
    assert np.corrcoef(divisor.numpy().ravel(), missed.numpy().ravel())[0, 1] > 0.95


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
