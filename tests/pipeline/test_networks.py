from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.architecture import weight_shapes
from pipeline.geometry import Geometry, GeometryError
from pipeline.networks import EfficientAD, Expected, pdn, weights_of
from pipeline.scoring import Quantiles, Scorer
from tests.pipeline import reference


def seeded_model(size="small", geometry=None, seed=0, *, expects=False):
    torch.manual_seed(seed)
    model = EfficientAD(size, geometry or Geometry())
    model.teacher_mean.copy_(torch.randn(384) * 0.01)
    model.teacher_std.copy_(torch.rand(384) * 0.1 + 0.05)
    if expects:
        model.expected = Expected(384, 1)
        with torch.no_grad():  # what all channels have in common, positive in half of the cells
            features = model.describe(torch.randn(1, 3, 128, 128))[0].flatten(1)
            weight = torch.cov(features).sum(dim=1)
            weight /= 16 * (weight @ features).std()
            model.expected.weight.copy_(weight.view(1, 384, 1, 1))
            model.expected.bias.fill_(-(weight @ features).mean())
            model.expected.largest.fill_(0.1)
    return model.eval()


def layers(network: nn.Sequential):
    convolutions = [layer for layer in network if isinstance(layer, nn.Conv2d)]
    return [(c.weight.detach().double().numpy(), c.bias.detach().double().numpy()) for c in convolutions]


@pytest.mark.parametrize(("size", "padded"), [("small", False), ("small", True), ("medium", False)])
def test_maps_and_score_against_the_papers_formulas(size, padded, rng):
    model = seeded_model(size, Geometry(padded=padded))
    image = rng.normal(0, 1, (3, 256, 256)).astype(np.float32)
    with torch.inference_mode():
        st, ae = (m[0].numpy() for m in model(torch.from_numpy(image)[None]))
    wanted_st, wanted_ae = reference.raw_maps(
        image.astype(np.float64),
        layers(model.teacher),
        layers(model.student),
        layers(model.autoencoder),
        model.teacher_mean.double().numpy(),
        model.teacher_std.double().numpy(),
        size,
        padded,
    )
    side = 64 if padded else 56
    assert st.shape == ae.shape == (side, side)
    np.testing.assert_allclose(st, wanted_st, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ae, wanted_ae, rtol=1e-5, atol=1e-5)

    levels = [*np.quantile(wanted_st, (0.9, 0.995)), *np.quantile(wanted_ae, (0.9, 0.995))]
    scorer = Scorer(model.geometry)
    got = scorer.stretch(scorer.combine(st, ae, Quantiles(*levels))).max()
    wanted = reference.score(wanted_st, wanted_ae, levels, 0 if padded else 4, 256)
    assert got == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_a_map_relative_to_what_is_expected(rng):
    plain, expecting = seeded_model(), seeded_model(expects=True)
    image = torch.from_numpy(rng.normal(0, 1, (1, 3, 256, 256)).astype(np.float32))
    with torch.inference_mode():
        (st, ae), (divided, same) = plain(image), expecting(image)
        features = plain.describe(image)[0].double().numpy()
    weight, bias = (getattr(expecting.expected, name).detach().double().numpy() for name in ("weight", "bias"))
    expected = np.tensordot(weight[0, :, 0, 0], features, 1) + bias
    assert expected.min() < -0.1 < 0.1 < expected.max(), "some cells are divided, some are not, some by the most"
    np.testing.assert_allclose(divided[0], st[0].numpy() / (1 + np.clip(expected, 0, 0.1)), rtol=1e-4)
    assert torch.equal(same, ae)


@pytest.mark.parametrize(
    ("size", "shapes"),
    [
        (
            "small",
            {"0": (128, 3, 4, 4), "3": (256, 128, 4, 4), "6": (256, 256, 3, 3), "8": (384, 256, 4, 4)},
        ),
        (
            "medium",
            {
                "0": (256, 3, 4, 4),
                "3": (512, 256, 4, 4),
                "6": (512, 512, 1, 1),
                "8": (512, 512, 3, 3),
                "10": (384, 512, 4, 4),
                "12": (384, 384, 1, 1),
            },
        ),
    ],
)
def test_state_dict_keys_are_the_public_references(size, shapes):
    weights = {k: tuple(v.shape) for k, v in pdn(size, 384, padded=False).state_dict().items() if "weight" in k}
    assert weights == {f"{index}.weight": shape for index, shape in shapes.items()}


@pytest.mark.parametrize("expects", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("size", ["small", "medium"])
def test_a_model_keeps_all_that_its_networks_know(size, padded, expects):
    networks = seeded_model(size, Geometry(padded=padded), expects=expects)
    state = {name: tuple(tensor.shape) for name, tensor in networks.state_dict().items()}
    assert weight_shapes(size, networks.geometry, expects=expects) == state
    networks = networks.to(memory_format=torch.channels_last)
    for name, array in weights_of(networks).items():
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, networks.state_dict()[name])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("width", "height"), [(256, 256), (64, 64), (512, 384), (260, 100), (132, 76)])
def test_geometry_predicts_the_networks_output(width, height, padded):
    geometry = Geometry(width, height, padded)
    with torch.inference_mode():
        out = pdn("small", 384, padded=padded)(torch.zeros(1, 3, height, width))
    assert out.shape[-2:] == (geometry.map_height, geometry.map_width)
    assert geometry.map_width + 2 * geometry.padding_cells == width // 4


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (2, 2), (2, 3), (3, 1)])
def test_tiles_give_the_same_map_as_the_whole_image(rows, columns):
    whole, tiled = Geometry(192, 160), Geometry(192, 160, tile_rows=rows, tile_columns=columns)
    model, pieces = seeded_model(geometry=whole), EfficientAD("small", tiled).eval()
    pieces.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 160, 192)
    with torch.inference_mode():
        for a, b in zip(model(image), pieces(image), strict=True):
            assert a.shape == (1, whole.map_height, whole.map_width)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    sizes = {(t.y_px.stop - t.y_px.start, t.x_px.stop - t.x_px.start) for t in tiled.tiles()}
    assert len(sizes) == 1, "tiles must be equal in size"


def test_autoencoder_sees_the_whole_image_at_256_px_whatever_its_size(rng):
    model = seeded_model(geometry=Geometry(512, 384))
    with torch.inference_mode():
        out = model.autoencode(torch.randn(1, 3, 384, 512))
    assert out.shape == (1, 384, 88, 120)


def test_teacher_never_learns_and_dropout_is_off_at_inference():
    model = seeded_model().train()
    assert not model.teacher.training
    assert model.student.training
    assert not any(p.requires_grad for p in model.teacher.parameters())
    model.eval()
    image = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        torch.testing.assert_close(model(image), model(image), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_width": 250}, "not a multiple of 4: take 248 or 252"),
        ({"image_height": 32}, "too small"),
        ({"padded": True, "tile_rows": 2}, "tiles need the unpadded geometry"),
        ({"tile_columns": 20}, "too many"),
        ({"tile_rows": 0}, "at least 1x1"),
    ],
)
def test_impossible_geometry_is_refused_with_what_would_work(arguments, message):
    with pytest.raises(GeometryError, match=message):
        Geometry(**arguments)
