from __future__ import annotations

import numpy as np
import pytest
import torch

from calibrate.losses import efficientad_losses, hard_feature_loss
from calibrate.options import LossOptions
from pipeline.geometry import Geometry
from pipeline.networks import EfficientAD


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("size", [1, 11, 1000, 4321])
def test_hard_feature_loss_is_the_mean_at_or_above_the_quantile(quantile, size, rng):
    values = rng.random(size)
    wanted = values[values >= np.quantile(values, quantile)].mean()
    got = hard_feature_loss(torch.from_numpy(values), quantile)
    assert float(got) == pytest.approx(wanted, rel=1e-12)


def test_hard_feature_loss_takes_more_elements_than_torch_quantile_does():
    values = torch.zeros(2**24 + 10)
    values[:100] = 1.0
    assert float(hard_feature_loss(values, 1 - 99 / (2**24 + 9))) == pytest.approx(1.0)


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(1)
    model = EfficientAD("small", Geometry(96, 96)).eval()  # dropout off: every term can be recomputed
    return model, *torch.randn(3, 1, 3, 96, 96)


def losses_of(model, image, augmented, natural, tile, options, **more):
    with torch.no_grad():
        described = model.describe(image[:, :, tile.y_px, tile.x_px])
    return efficientad_losses(model, described, image, augmented, natural, tile, options, **more)


@pytest.mark.parametrize("batched", [True, False])
def test_terms_against_the_papers_formulas(parts, batched):
    model, image, augmented, natural = parts
    (tile,) = model.geometry.tiles()
    with torch.no_grad():
        losses = losses_of(model, image, augmented, natural, tile, LossOptions(0.999), batched=batched)
        student, teacher = model.student(image), model.describe(image)
        difference = (teacher - student[:, :384]).square().numpy()
        assert float(losses.hard) == pytest.approx(difference[difference >= np.quantile(difference, 0.999)].mean())
        assert float(losses.penalty) == pytest.approx(float(model.student(natural)[:, :384].square().mean()))
        predicted = model.autoencode(augmented)
        wanted = (model.describe(augmented) - predicted).square().mean()
        assert float(losses.autoencoder) == pytest.approx(float(wanted))
        wanted = (predicted - model.student(augmented)[:, 384:]).square().mean()
        assert float(losses.student_autoencoder) == pytest.approx(float(wanted))
        total = sum(getattr(losses, n) for n in ("hard", "penalty", "autoencoder", "student_autoencoder"))
        assert float(losses.total) == pytest.approx(float(total))


def test_gradients_reach_student_and_autoencoder_but_never_the_teacher(parts):
    model, image, augmented, natural = parts
    (tile,) = model.geometry.tiles()
    model.zero_grad()
    losses_of(model, image, augmented, natural, tile, LossOptions()).student_autoencoder.backward()
    assert model.autoencoder[0].weight.grad.abs().sum() > 0, "not detached, as in the public reference"
    assert model.student[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.teacher.parameters())


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        (LossOptions(penalty=False), {"penalty"}),
        (LossOptions(autoencoder=False), {"autoencoder", "student_autoencoder"}),
    ],
)
def test_ablations_switch_terms_off(parts, options, absent):
    model, image, augmented, natural = parts
    with torch.no_grad():
        losses = losses_of(model, image, augmented, natural, model.geometry.tiles()[0], options)
    values = {n: float(getattr(losses, n)) for n in ("hard", "penalty", "autoencoder", "student_autoencoder")}
    assert {name for name, value in values.items() if value == 0} == absent


def test_a_tiles_losses_come_from_that_tile_and_the_whole_image_for_the_autoencoder():
    torch.manual_seed(1)
    geometry = Geometry(128, 128, tile_rows=2, tile_columns=2)
    model = EfficientAD("small", geometry).eval()
    image = torch.randn(1, 3, 128, 128)
    tile = geometry.tiles()[3]
    with torch.no_grad():
        losses = losses_of(model, image, image, None, tile, LossOptions(0))
        whole = (model.describe(image) - model.student(image)[:, :384]).square()
        assert float(losses.hard) == pytest.approx(float(whole[:, :, tile.rows, tile.columns].mean()), rel=1e-4)
        both = (model.describe(image) - model.autoencode(image)).square()
        wanted = float(both[:, :, tile.rows, tile.columns].mean())
        assert float(losses.autoencoder) == pytest.approx(wanted, rel=1e-4)
