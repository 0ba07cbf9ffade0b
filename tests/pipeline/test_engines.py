from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import openvino as ov
import pytest
import torch
import torch.nn.functional as F
from openvino import opset13 as op
from torch import nn

from drivers.frame import PixelFormat
from pipeline import engine_cpu, engines
from pipeline.bundle import Bundle, Model, PrecisionCalibration, read_bundle
from pipeline.engine import LARGEST_INT8_WEIGHT
from pipeline.engine_cpu import CpuEngine, compile_options, cpu_precisions, observe_ranges
from pipeline.engines import EngineUnavailable, make_engine, reduced_precisions
from pipeline.folded import Filters, fold
from pipeline.folded_networks import FoldedEfficientAD
from pipeline.geometry import Geometry
from pipeline.inspect import Inspector
from pipeline.networks import weights_of
from pipeline.openvino_graph import antialiased_weights, build_graph, convolution_names, quantised_convolution
from pipeline.preprocess import PreprocessSpec
from pipeline.scoring import Quantiles
from tests.pipeline.test_networks import seeded_model

GEOMETRIES = [
    Geometry(),
    Geometry(padded=True),
    Geometry(320, 192),
    Geometry(320, 384, tile_rows=2, tile_columns=2),
]
EACH = pytest.mark.parametrize(
    ("size", "geometry", "expects"),
    [
        ("medium", GEOMETRIES[0], False),
        *(("small", geometry, False) for geometry in GEOMETRIES),
        ("medium", GEOMETRIES[0], True),
        ("small", GEOMETRIES[-1], True),
    ],
    ids=str,
)


def model_of(networks):
    g = networks.geometry
    return Model(networks.size, g, PreprocessSpec(g.image_width, g.image_height), weights_of(networks))


def folded_networks(networks):
    return FoldedEfficientAD(fold(networks.size, networks.geometry, weights_of(networks)))


def random_image(rng, geometry):
    return rng.normal(0, 1, (3, geometry.image_height, geometry.image_width)).astype(np.float32)


def maps_by_torch(networks, image):
    with torch.inference_mode():
        return [m[0].numpy() for m in networks(torch.from_numpy(image)[None])]


@EACH
def test_folding_is_exact(size, geometry, expects):
    networks = seeded_model(size, geometry, expects=expects).double()
    image = torch.randn(1, 3, geometry.image_height, geometry.image_width, dtype=torch.float64)
    with torch.inference_mode():
        for folded, plain in zip(folded_networks(networks)(image), networks(image), strict=True):
            torch.testing.assert_close(folded, plain, rtol=1e-11, atol=1e-11)


def test_folding_leaves_the_networks_as_they_are():
    networks = seeded_model()
    before = {name: tensor.clone() for name, tensor in networks.state_dict().items()}
    folded_networks(networks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in networks.state_dict().items())


@EACH
def test_float32_gives_the_networks_own_maps(size, geometry, expects, rng):
    networks = seeded_model(size, geometry, expects=expects)
    image = random_image(rng, geometry)
    engine = CpuEngine(model_of(networks), threads=2)
    for ours, plain in zip(engine.infer(image), maps_by_torch(networks, image), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-6 * plain.max())


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@EACH
def test_fewer_bits_stay_near_float32(size, geometry, expects, precision, rng):
    if precision not in cpu_precisions():
        pytest.skip(f"this processor has no {precision}")
    networks = seeded_model(size, geometry, expects=expects)
    image = random_image(rng, geometry)
    model = model_of(networks)
    model = replace(model, ranges=observe_ranges(model, [image]))
    for ours, plain in zip(
        CpuEngine(model, 2, precision).infer(image), maps_by_torch(networks, image), strict=True
    ):
        assert np.abs(ours - plain).max() < 0.02 * plain.max()


@pytest.mark.parametrize("geometry", [GEOMETRIES[0], GEOMETRIES[-1]], ids=str)
@pytest.mark.parametrize("precision", cpu_precisions())
def test_frames_at_once_keep_their_own_maps(geometry, precision, rng):
    networks = seeded_model("small", geometry)
    model = model_of(networks)
    if precision == "int8":
        model = replace(model, ranges=observe_ranges(model, [random_image(rng, geometry)]))
    engine = CpuEngine(model, precision=precision)
    assert engine.at_once == (1 if geometry.is_tiled else 2)
    frames = [rng.integers(0, 256, (200, 240)).astype(np.uint8) for _ in range(6)]
    alone = [engine.begin(frame, PixelFormat.MONO8)() for frame in frames]
    waiting, found = [], []
    for frame in frames:
        if len(waiting) == engine.at_once:
            found.append(waiting.pop(0)())
        waiting.append(engine.begin(frame, PixelFormat.MONO8))
    found += [finish() for finish in waiting]
    for ours, theirs in zip(found, alone, strict=True):
        np.testing.assert_array_equal(ours.student_teacher, theirs.student_teacher)
        np.testing.assert_array_equal(ours.autoencoder, theirs.autoencoder)
        assert min(ours.preprocess_ns, ours.infer_ns) > 0
    assert not np.array_equal(found[0].student_teacher, found[1].student_teacher)


@pytest.mark.parametrize("part", ["whole", "prediction", "tile"])
def test_the_image_is_not_rounded_to_integers(part):
    """Its fine grain is what tells good surfaces from bad ones."""
    networks = seeded_model(geometry=Geometry(320, 384, tile_rows=2, tile_columns=2))
    folded = fold("small", networks.geometry, weights_of(networks))
    graph = build_graph(folded, part, dict.fromkeys(convolution_names(folded), 1.0))
    convolutions = [node for node in graph.get_ops() if node.get_type_name() == "Convolution"]
    rounded = {
        node.output(0).get_shape()[1]
        for node in (convolution.input_value(0).get_node() for convolution in convolutions)
        if node.get_type_name() == "FakeQuantize"
    }
    in_float = [convolution for convolution in convolutions if convolution.input(0).get_shape()[1] == 3]
    assert 3 not in rounded
    assert len(in_float) == {"whole": 3, "prediction": 1, "tile": 2}[part]
    assert len(convolutions) > len(in_float)


@pytest.mark.skipif("int8" not in cpu_precisions(), reason="this processor has no int8")
def test_what_comes_after_the_differences_is_not_cut_off_in_integers(rng):
    """The map of an anomaly a hundred times as strong as anything seen keeps its size."""
    networks = seeded_model()
    image = random_image(rng, networks.geometry)
    model = model_of(networks)
    ranges = observe_ranges(model, [image])
    with torch.no_grad():  # the student is wrong everywhere by 100 σ: the features stay, the difference does not
        networks.student[-1].bias += 100.0
    wrong = replace(model, weights=weights_of(networks), ranges=ranges)
    (st, ae), (wanted_st, wanted_ae) = CpuEngine(wrong, 2, "int8").infer(image), maps_by_torch(networks, image)
    np.testing.assert_allclose(st, wanted_st, rtol=0.02)
    np.testing.assert_allclose(ae, wanted_ae, rtol=0.02)


@pytest.mark.skipif("int8" not in cpu_precisions(), reason="this processor has no int8")
@pytest.mark.parametrize("rectified", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
def test_integers_do_not_overflow_between_two_products(sign, rectified):
    """As they would at full weights and inputs on a processor that adds pairs in 16 bits."""
    assert np.iinfo(np.int16).max >= 2 * 255 * LARGEST_INT8_WEIGHT
    given = op.parameter([1, 64, 8, 8], np.float32)
    weight = np.full((64, 64, 3, 3), sign, np.float32)
    graph = ov.Model(
        [quantised_convolution(op.relu(given) if rectified else given, Filters(weight), 1.0)], [given], "full"
    )
    request = engine_cpu.CORE.compile_model(graph, "CPU", compile_options("int8", 1)).create_infer_request()
    (found,) = request.infer([np.ones((1, 64, 8, 8), np.float32)]).values()
    np.testing.assert_allclose(found, sign * 64 * 9, rtol=0.005)


@pytest.mark.skipif("int8" not in cpu_precisions(), reason="this processor has no int8")
def test_integers_keep_the_signs_of_the_autoencoders_bottleneck(rng):
    """No ReLU follows the bottleneck, and only the interpolation after it stands before the next convolution."""
    networks = seeded_model()
    for layer in networks.autoencoder:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # a living autoencoder, unlike one of small random weights
    image = random_image(rng, networks.geometry)
    model = model_of(networks)
    model = replace(model, ranges=observe_ranges(model, [image]))
    _, ours = CpuEngine(model, 2, "int8").infer(image)
    _, wanted = maps_by_torch(networks, image)
    assert np.sqrt(np.mean((ours - wanted) ** 2)) < 0.05 * np.sqrt(np.mean(wanted**2))


def test_pinned_threads_compute_the_same(rng):
    model = model_of(seeded_model(geometry=Geometry(64, 64)))
    image = random_image(rng, model.geometry)
    for free, pinned in zip(
        CpuEngine(model, 1).infer(image), CpuEngine(model, 1, pin_threads=True).infer(image), strict=True
    ):
        np.testing.assert_array_equal(free, pinned)


def test_ranges_are_the_largest_magnitudes_over_all_images(rng):
    networks = seeded_model()
    images = [random_image(rng, networks.geometry) * scale for scale in (1, 3, 2)]
    ranges = observe_ranges(model_of(networks), images)
    assert not {"teacher.0", "student.0", "autoencoder.0"} & ranges.keys(), "they read the image, in float"
    with torch.inference_mode():
        first = [networks.teacher[:3](torch.from_numpy(image)[None]).abs().max().item() for image in images]
        hidden = [networks.student[:8](torch.from_numpy(image)[None]).abs().max().item() for image in images]
    assert ranges["teacher.3"] == pytest.approx(max(first), rel=1e-4)
    assert ranges["difference.student"] == ranges["imitated"] == pytest.approx(max(hidden), rel=1e-4)


@pytest.mark.parametrize("largest_in", ["anywhere", "the last tile"])
def test_ranges_of_tiles_are_those_of_the_whole_image(largest_in, rng):
    whole, tiled = Geometry(320, 384), Geometry(320, 384, tile_rows=2, tile_columns=2)
    networks = seeded_model(geometry=whole)
    image = random_image(rng, whole)
    if largest_in == "the last tile":
        image[:, -60:-20, -60:-20] *= 5  # what lies at the very edge no cell may see
    model = model_of(networks)
    wanted = observe_ranges(model, [image])
    found = observe_ranges(replace(model, geometry=tiled), [image])
    assert found == pytest.approx(wanted, rel=1e-4)


def test_a_range_that_is_missing_is_an_error():
    with pytest.raises(KeyError):
        CpuEngine(model_of(seeded_model()), precision="int8")


def calibrated(deviation, threshold=0.5):
    return PrecisionCalibration(Quantiles(0.0, 1.0, None, None), threshold, deviation, 1.0)


@pytest.fixture
def bundle():
    networks = seeded_model(geometry=Geometry(64, 64))
    model = model_of(networks)
    ranges = observe_ranges(model, [np.ones((3, 64, 64), np.float32)])
    return Bundle(
        model=replace(model, ranges=ranges),
        quantiles=Quantiles(0.0, 1.0, None, None),
        threshold=0.1,
        precisions={"int8": calibrated(0.9, 0.2), "bf16": calibrated(0.2, 0.3), "fp32": calibrated(0.0, 0.1)},
        calibration_id="123456789abc",
    )


@pytest.mark.parametrize(
    ("able", "deviation", "chosen"),
    [
        (["fp32", "bf16", "int8"], 0.9, "int8"),
        (["fp32", "bf16", "int8"], 1.1, "bf16"),
        (["fp32", "int8"], 1.1, "fp32"),
        (["fp32"], 0.9, "fp32"),
    ],
)
def test_auto_is_the_fastest_that_is_trusted_and_there(bundle, monkeypatch, able, deviation, chosen):
    monkeypatch.setattr(engine_cpu, "cpu_precisions", lambda: able)
    bundle = replace(bundle, precisions={**bundle.precisions, "int8": calibrated(deviation, 0.2)})
    assert make_engine(bundle, "cpu").engine.precision == chosen


@pytest.mark.parametrize(
    ("deviation", "wanted", "chosen"), [(0.9, "auto", "fp16"), (1.1, "auto", "fp32"), (1.1, "fp16", "fp16")]
)
def test_cuda_takes_float16_where_the_calibration_trusts_it(bundle, monkeypatch, deviation, wanted, chosen):
    asked = []
    monkeypatch.setattr(engines, "resolve_device", lambda _device: (True, "found"))
    monkeypatch.setattr(
        engines, "_engine", lambda _model, precision, _cuda, *_rest, **_more: asked.append(precision)
    )
    bundle = replace(bundle, precisions={"fp16": calibrated(deviation), **bundle.precisions})
    make_engine(bundle, "cuda", precision=wanted)
    assert asked == [chosen]
    with pytest.raises(EngineUnavailable, match="bf16 was asked for, but this device has fp32, fp16 only"):
        make_engine(bundle, "cuda", precision="bf16")


def test_a_precision_that_cannot_be_had_is_refused_with_what_can(bundle, monkeypatch):
    monkeypatch.setattr(engine_cpu, "cpu_precisions", lambda: ["fp32", "bf16"])
    with pytest.raises(EngineUnavailable, match="not calibrated for it; train anew, or take fp32"):
        make_engine(replace(bundle, precisions={}), "cpu", precision="bf16")
    monkeypatch.setattr(engine_cpu, "cpu_precisions", lambda: ["fp32"])
    with pytest.raises(EngineUnavailable, match="int8 was asked for, but this device has fp32 only"):
        make_engine(bundle, "cpu", precision="int8")


@pytest.mark.skipif("int8" not in cpu_precisions(), reason="this processor has no int8")
def test_each_precision_judges_by_its_own_threshold_and_says_so(bundle):
    by_float = Inspector(bundle, make_engine(bundle, "cpu", precision="fp32").engine)
    by_integers = Inspector(bundle, make_engine(bundle, "cpu", precision="int8").engine)
    assert (by_float.threshold, by_integers.threshold) == (0.1, 0.2)
    assert by_float.bundle.calibration_id == "123456789abc" != by_integers.bundle.calibration_id


def test_a_trained_bundle_knows_the_precisions_of_the_machine(tiny_bundle):
    bundle = read_bundle(tiny_bundle)
    assert set(bundle.precisions) == {"fp32", *reduced_precisions()}
    times = [found.infer_ms for found in bundle.precisions.values()]
    assert times == sorted(times)
    own = bundle.precisions["fp32"]
    assert (own.quantiles, own.threshold, own.largest_deviation) == (bundle.quantiles, bundle.threshold, 0.0)


_WITHOUT_TORCH = """
import sys
from pathlib import Path
import daemon.cli, daemon.station
from pipeline.bundle import read_bundle
from pipeline.engines import make_engine, reduced_precisions, resolve_device
bundle = read_bundle(Path(sys.argv[1]))
for precision in ("fp32", *reduced_precisions("cpu")):
    make_engine(bundle, "cpu", 1, precision).engine.warm_up()
if "no NVIDIA driver" in resolve_device("auto")[1]:
    make_engine(bundle, "auto", 1)
print(sorted({"torch", "calibrate.train"} & sys.modules.keys()))
"""


def test_a_line_on_the_cpu_starts_without_pytorch(tiny_bundle):
    """Loading it takes seconds in which a daemon that was killed judges nothing."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, tiny_bundle],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize("inputs", [64, 200, 256, 320, 1024, 1500])
def test_the_autoencoders_picture_is_pytorchs_antialiased_one(inputs, rng):
    line = rng.normal(0, 1, inputs).astype(np.float32)
    wanted = F.interpolate(
        torch.from_numpy(line)[None, None, None].double(), size=(1, 256), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(antialiased_weights(inputs, 256) @ line, wanted[0, 0, 0], atol=1e-5)


_SIGNALS = """
import os, signal
from pipeline.bundle import Model
from pipeline.engine_cpu import CpuEngine, cpu_precisions
from pipeline.geometry import Geometry
from pipeline.preprocess import PreprocessSpec
from pipeline.networks import weights_of
from tests.pipeline.test_networks import seeded_model
networks = seeded_model(geometry=Geometry(64, 64))
model = Model("small", networks.geometry, PreprocessSpec(64, 64), weights_of(networks))
engines = [CpuEngine(model, 1, precision) for precision in cpu_precisions() if precision != "int8"]
engines.append(CpuEngine(model, 1))
for engine in engines:
    engine.warm_up()
del engine
while engines:
    engines.pop(0)
signal.signal(signal.SIGINT, lambda *_: print("heard", flush=True))
os.kill(os.getpid(), signal.SIGINT)
print("alive")
"""


def test_signals_are_heard_after_engines_have_come_and_gone():
    done = subprocess.run(
        [sys.executable, "-c", _SIGNALS], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (0, "heard\nalive\n"), done.stderr
