from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
import torch
import torch.nn.functional as F
from openvino import opset13 as op
from torch import nn

from pipeline import winograd
from pipeline.engine_cpu import CORE, compile_options
from pipeline.folded import Filters
from pipeline.openvino_graph import winograd_convolution


def by_winograd(image, layer):
    filters = Filters(layer.weight.detach().numpy(), padding=layer.padding[0])
    given = op.parameter(list(image.shape), np.float32)
    graph = ov.Model([winograd_convolution(given, filters)], [given], "one")
    request = CORE.compile_model(graph, "CPU", compile_options("fp32", 1)).create_infer_request()
    (found,) = request.infer([image]).values()
    return found


@pytest.mark.parametrize("band", [1, 2**24], ids=["a row of tiles each", "one band"])
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("kernel_px", [3, 4])
@pytest.mark.parametrize("shape", [(16, 16), (17, 22), (4, 9), (23, 5)])
def test_every_pixel_is_that_of_a_direct_convolution(shape, kernel_px, padding, band, rng, monkeypatch):
    """In all sizes of what remains beside whole tiles, summed in float64."""
    monkeypatch.setattr(winograd, "LARGEST_BAND", band)
    layer = nn.Conv2d(32, 24, kernel_px, padding=padding, bias=False)
    image = rng.normal(0, 1, (1, 32, *shape)).astype(np.float32)
    wanted = F.conv2d(
        torch.from_numpy(image).double(), layer.weight.detach().double(), padding=layer.padding
    ).numpy()
    np.testing.assert_allclose(by_winograd(image, layer), wanted, atol=2e-5 * np.abs(wanted).max())


def test_what_is_beyond_the_edge_does_not_come_in(rng):
    """One strong pixel changes the outputs whose kernels see it, and those alone but for rounding."""
    layer = nn.Conv2d(128, 8, 4, bias=False)
    image = rng.normal(0, 1, (1, 128, 18, 18)).astype(np.float32)
    marked = image.copy()
    marked[..., 17, 17] += 100
    changed = np.abs(by_winograd(marked, layer) - by_winograd(image, layer)).max(axis=(0, 1))
    seen = np.zeros((15, 15), bool)
    seen[14, 14] = True
    assert changed[seen].min() > 1
    assert changed[~seen].max() < 1e-3


def test_other_kernels_have_no_transforms():
    with pytest.raises(KeyError):
        winograd.transforms(5)
