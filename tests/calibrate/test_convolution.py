from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from calibrate import convolution
from calibrate.convolution import convolve, use_winograd
from pipeline import winograd
from pipeline.networks import pdn


def gradients(function, *inputs):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    found = function(*inputs)
    torch.manual_seed(1)
    weighted = (found * torch.randn(found.shape).to(found)).sum()
    return found.detach(), torch.autograd.grad(weighted, inputs)


@pytest.fixture
def counted(monkeypatch):
    """Tell how often Winograd's algorithm was taken."""
    taken = []
    apply = convolution._Winograd.apply
    monkeypatch.setattr(convolution._Winograd, "apply", lambda *given: taken.append(1) or apply(*given))
    return taken


@pytest.mark.parametrize("band", [1, 2**24], ids=["a row of tiles each", "one band"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kernel_px", [3, 4])
@pytest.mark.parametrize("padding", [(0, 0), (1, 3)])
@pytest.mark.parametrize("shape", [(16, 16), (17, 22), (4, 9), (23, 5)])
def test_values_and_gradients_are_those_of_a_direct_convolution(
    shape, padding, kernel_px, layout, band, counted, monkeypatch
):
    """Summed in float64, in all sizes of what remains beside whole tiles."""
    monkeypatch.setattr(winograd, "LARGEST_BAND", band)
    torch.manual_seed(0)
    image = torch.randn(2, 128, *shape).contiguous(memory_format=layout)
    weight, bias = torch.randn(24, 128, kernel_px, kernel_px) / 40, torch.randn(24)
    found, grads = gradients(lambda *t: convolve(*t, padding), image, weight, bias)
    assert counted
    wanted, wanted_grads = gradients(
        lambda *t: F.conv2d(*t, padding=padding), image.double(), weight.double(), bias.double()
    )
    for ours, right in zip((found, *grads), (wanted, *wanted_grads), strict=True):
        np.testing.assert_allclose(ours, right, atol=3e-5 * float(right.abs().max()))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("size", ["small", "medium"])
def test_a_network_keeps_its_parameters_and_what_they_learn(size, padded, counted):
    torch.manual_seed(0)
    plain = pdn(size, 384, padded=padded)
    fast = pdn(size, 384, padded=padded)
    use_winograd(fast)
    fast.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 64, 64)
    results = []
    for network in (plain, fast):
        found = network(image)
        found.square().mean().backward()
        results.append([found.detach(), *(parameter.grad for parameter in network.parameters())])
    assert len(counted) == 3
    for right, ours in zip(*results, strict=True):
        # As a whole, and wide: rounding takes single values over a ReLU's edge.
        assert (ours - right).norm() < 2e-3 * right.norm()
    assert [name for name, _ in fast.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_it_stays_direct_where_that_is_faster_or_not_in_float32(counted):
    image, weight = torch.randn(1, 128, 8, 8), torch.randn(8, 128, 3, 3)
    others = [
        (image.double(), weight.double()),
        (image[:, :64], weight[:, :64]),
        (image, weight[:, :, :1, :1]),
    ]
    for given, kernel in others:
        torch.testing.assert_close(convolve(given, kernel, None), F.conv2d(given, kernel))
    with torch.autocast("cpu", torch.bfloat16):
        assert convolve(image, weight, None).dtype == torch.bfloat16
    assert not counted


@pytest.mark.parametrize("frozen", ["image", "weight", "bias"])
def test_what_is_frozen_has_no_gradient_and_the_others_theirs(frozen):
    torch.manual_seed(0)
    given = {"image": torch.randn(1, 128, 9, 9), "weight": torch.randn(8, 128, 3, 3), "bias": torch.randn(8)}
    results = []
    for function in (convolve, F.conv2d):
        inputs = {name: tensor.clone().requires_grad_(name != frozen) for name, tensor in given.items()}
        function(*inputs.values()).square().mean().backward()
        results.append({name: tensor.grad for name, tensor in inputs.items()})
    assert results[0].pop(frozen) is results[1].pop(frozen) is None
    for name, right in results[1].items():
        torch.testing.assert_close(results[0][name], right, rtol=1e-3, atol=1e-4)


def test_a_relu_may_work_in_place_behind_a_convolution_without_bias():
    image, weight = torch.randn(1, 128, 9, 9), torch.randn(8, 128, 3, 3, requires_grad=True)
    convolve(image, weight, None).relu_().sum().backward()
    assert weight.grad.isfinite().all()


def test_only_plain_convolutions_are_replaced():
    others = [nn.Conv2d(128, 8, 4, stride=2), nn.Conv2d(128, 8, 3, dilation=2), nn.Conv2d(128, 8, 3, groups=2)]
    network = nn.Sequential(*others, nn.Conv2d(8, 8, 3))
    use_winograd(network)
    assert [type(layer) for layer in network] == [nn.Conv2d] * 3 + [convolution.WinogradConv2d]
