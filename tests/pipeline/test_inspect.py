from __future__ import annotations

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from drivers.frame import Frame, FrameStatus, PixelFormat
from pipeline.bundle import read_bundle
from pipeline.engine import RawMaps
from pipeline.engine_cpu import CpuEngine
from pipeline.engines import EngineUnavailable, make_engine
from pipeline.inspect import Inspector, judge
from pipeline.inspection import Outcome, Reason
from pipeline.plausible import PlausibilityCheck, PlausibleLimits
from pipeline.relative import LevelRange
from pipeline.scoring import FrameArea, Quantiles


class CannedEngine:
    """Returns the maps it was given."""

    device, precision, at_once = "canned", "fp32", 1

    def __init__(self, st, ae):
        self.maps = RawMaps(st, ae, 1, 2)

    def warm_up(self):
        pass

    def begin(self, image, fmt):
        return lambda: self.maps


class BrokenEngine(CannedEngine):
    """Fails at every frame."""

    def __init__(self):
        pass

    def begin(self, image, fmt):
        raise RuntimeError("device lost")


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return read_bundle(tiny_bundle)


@pytest.fixture
def part(rng):
    image = rng.integers(40, 200, (96, 96, 3)).astype(np.uint8)
    return Frame(FrameStatus.COMPLETE, "part", image=image, pixel_format=PixelFormat.BGR8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_a_value_that_is_not_finite_anywhere_is_invalid_engine(bundle, part, value, which):
    maps = [np.zeros((8, 8), np.float32), np.zeros((8, 8), np.float32)]
    maps[which][3, 4] = value
    found = Inspector(bundle, CannedEngine(*maps)).inspect(part)
    assert (found.outcome, found.reason, found.score) == (Outcome.INVALID, Reason.ENGINE, None)


def test_finite_maps_that_overflow_on_the_way_are_invalid_engine(bundle, part):
    huge = np.full((8, 8), 3e38, np.float32)
    bundle = replace(bundle, quantiles=Quantiles(0.0, 1e-3, 0.0, 1e-3))
    found = Inspector(bundle, CannedEngine(huge, huge)).inspect(part)
    assert (found.outcome, found.reason) == (Outcome.INVALID, Reason.ENGINE)


def test_with_relative_maps_what_is_wrong_all_over_is_never_ok(bundle, part):
    levels = LevelRange(0.5, 2.0, 0.5, 4.0)
    relative = replace(bundle, threshold=0.1, quantiles=Quantiles(1.0, 2.0, 1.0, 2.0, levels, levels))
    for value, outcome in ((1.5, Outcome.OK), (9.0, Outcome.NG), (1e30, Outcome.NG), (3e38, Outcome.NG)):
        maps = np.full((8, 8), value, np.float32)
        assert Inspector(relative, CannedEngine(maps, maps)).inspect(part).outcome is outcome
    maps[2, 2] = np.nan
    assert Inspector(relative, CannedEngine(maps, maps)).inspect(part).outcome is Outcome.INVALID


def test_weights_gone_bad_in_memory_are_invalid_engine(bundle, part):
    weights = {name: array.copy() for name, array in bundle.model.weights.items()}
    weights["student.8.weight"][0, 0, 0, 0] = float("nan")  # no ReLU after it that would hide it
    found = Inspector(bundle, CpuEngine(replace(bundle.model, weights=weights))).inspect(part)
    assert (found.outcome, found.reason) == (Outcome.INVALID, Reason.ENGINE)


def test_an_exception_in_the_engine_is_invalid_engine_and_the_next_part_is_judged(bundle, part):
    inspector = Inspector(bundle, BrokenEngine())
    found = inspector.inspect(part)
    assert (found.outcome, found.reason) == (Outcome.INVALID, Reason.ENGINE)
    assert "device lost" in found.detail
    assert found.error is not None
    assert "RuntimeError: device lost" in "".join(found.error.format())
    inspector.engine = CpuEngine(bundle.model)
    assert inspector.inspect(part).outcome in (Outcome.OK, Outcome.NG)


@pytest.mark.parametrize("fails_in", ["begin", "finish"])
def test_a_failure_keeps_nothing_of_the_frame_which_may_lie_in_a_cameras_buffer(bundle, fails_in, no_collection):
    def fail():
        raise RuntimeError("device lost")

    class Broken(CannedEngine):
        def begin(self, image, fmt):
            return fail if fails_in == "finish" else fail()

    inspector = Inspector(bundle, Broken(None, None))
    images = [np.full((64, 64), 100 + i, np.uint8) for i in range(2)]
    frames = [Frame(FrameStatus.COMPLETE, "f", image=i, pixel_format=PixelFormat.MONO8) for i in images]
    kept = weakref.ref(images[0])
    found = [inspector.inspect(frame) for frame in frames]  # each is compared with the one before it
    assert [one.reason for one in found] == [Reason.ENGINE] * 2
    frames.clear(), images.clear()
    assert kept() is None


@pytest.mark.parametrize(
    ("score", "threshold", "outcome"),
    [
        (0.5, 0.5, "OK"),
        (np.nextafter(0.5, 1), 0.5, "NG"),
        (float("nan"), 0.5, "INVALID"),
        (float("inf"), 0.5, "INVALID"),
        (-float("inf"), 0.5, "INVALID"),
        (0.1, float("nan"), "INVALID"),
        (0.1, float("inf"), "INVALID"),
    ],
)
def test_ok_must_be_proven(score, threshold, outcome):
    assert judge(score, threshold) == outcome


@pytest.mark.parametrize("status", [s for s in FrameStatus if s is not FrameStatus.COMPLETE])
def test_every_bad_status_has_its_reason_word(bundle, status):
    found = Inspector(bundle, BrokenEngine()).inspect(Frame(status, "x", detail="why"))
    word = "timeout" if status is FrameStatus.PENDING else status.value  # a trigger whose frame never came
    assert (found.outcome, found.reason, found.detail) == (Outcome.INVALID, word, "why")


def test_ng_part_has_regions_in_the_full_frame_and_ok_part_has_none(bundle, part):
    engine = CpuEngine(bundle.model)
    strict, lenient = Inspector(bundle, engine, threshold=-1.0), Inspector(bundle, engine, threshold=1e9)
    ng, ok = strict.inspect(part), lenient.inspect(part)
    assert (ng.outcome, ok.outcome) == (Outcome.NG, Outcome.OK)
    assert ng.score == ok.score
    assert ng.regions[0].width <= 96
    assert max(r.peak for r in ng.regions) == pytest.approx(ng.score)
    assert ok.regions == []
    areas = [r.area_px for r in ng.regions]
    assert areas == sorted(areas, reverse=True)


def test_a_frame_that_does_not_fit_the_format_is_invalid_format(bundle, part):
    part.pixel_format = PixelFormat.MONO8
    found = Inspector(bundle, CpuEngine(bundle.model)).inspect(part)
    assert (found.outcome, found.reason) == (Outcome.INVALID, Reason.FORMAT)


def test_twelve_bits_called_sixteen_are_invalid_format_and_not_four_bits_too_dark(bundle, rng):
    trained = replace(bundle, training={"pixel_formats": ["Mono12"]})
    image = rng.integers(500, 4000, (96, 96)).astype(np.uint16)
    inspector = Inspector(trained, CpuEngine(bundle.model))
    found = inspector.inspect(Frame(FrameStatus.COMPLETE, "x", image=image, pixel_format=PixelFormat.MONO16))
    assert (found.outcome, found.reason) == (Outcome.INVALID, Reason.FORMAT)
    assert "trained on Mono12, this is Mono16; set pixel_format" in found.detail
    for shot, fmt in ((image, PixelFormat.MONO12), ((image // 16).astype(np.uint8), PixelFormat.MONO8)):
        found = inspector.inspect(Frame(FrameStatus.COMPLETE, "x", image=shot, pixel_format=fmt))
        assert found.outcome is not Outcome.INVALID


@pytest.mark.parametrize(
    ("trained", "shown", "fits"),
    [
        ("Mono8", "BayerRG8", False),
        ("BayerRG8", "Mono8", False),
        ("BayerRG8", "BayerRG8", True),
        ("BGR8", "BayerRG8", True),
        ("BGR8", "Mono8", True),
        ("Mono8", "BGR8", True),
    ],
)
def test_a_bayer_pattern_taken_for_grey_is_invalid_format(bundle, rng, trained, shown, fits):
    fmt = PixelFormat(shown)
    image = rng.integers(20, 200, (96, 96, 3)[: 3 if fmt.channels == 3 else 2]).astype(np.uint8)
    inspector = Inspector(replace(bundle, training={"pixel_formats": [trained]}), CpuEngine(bundle.model))
    found = inspector.inspect(Frame(FrameStatus.COMPLETE, "x", image=image, pixel_format=fmt))
    assert (found.reason is None) == fits
    assert fits or f"trained on {trained}, this is {shown}" in found.detail


# Plausible images


def check(limits=None):
    return PlausibilityCheck(limits or PlausibleLimits())


@pytest.mark.parametrize("fmt", [PixelFormat.MONO8, PixelFormat.MONO12])
def test_black_and_saturated_frames(fmt, rng):
    noise = rng.integers(0, fmt.max_value // 100, (64, 64)).astype(fmt.dtype)
    assert "black" in (check().problem(noise, fmt) or "")
    assert "saturated" in (check().problem(np.full((64, 64), fmt.max_value, fmt.dtype), fmt) or "")
    assert check().problem((noise + fmt.max_value // 2).astype(fmt.dtype), fmt) is None


@pytest.mark.parametrize("fmt", [f for f in PixelFormat if f.bayer and f.bits == 8])
@pytest.mark.parametrize("colour", ["R", "G", "B"])
def test_one_dark_or_bright_bayer_colour_makes_no_frame_implausible(fmt, colour):
    positions = np.array([c == colour for c in fmt.bayer]).reshape(2, 2)
    one = np.tile(positions, (32, 32))
    lit = np.where(one, 3, 150).astype(np.uint8)  # that colour is dark, the others are not
    assert check().problem(lit, fmt) is None
    blinding = np.where(one, 255, 60).astype(np.uint8)
    assert check().problem(blinding, fmt) is None


def test_a_few_hot_pixels_do_not_make_a_black_frame_plausible():
    image = np.zeros((400, 400), np.uint8)
    image[200, ::80] = 255
    assert "black" in (check().problem(image, PixelFormat.MONO8) or "")


def test_a_frame_of_another_format_ends_a_row_of_identical_ones(bundle, part):
    maps = np.zeros((8, 8), np.float32)
    bundle = replace(bundle, training={**bundle.training, "pixel_formats": ["Mono12"]})
    inspector = Inspector(bundle, CannedEngine(maps, maps), limits=PlausibleLimits(frozen_frames=2))
    other = replace(part, image=part.image[..., 0].astype(np.uint16), pixel_format=PixelFormat.MONO16)
    frames = [part, other, part, part]
    assert [inspector.inspect(frame).reason for frame in frames] == [None, Reason.FORMAT, None, Reason.IMAGE]


def test_frozen_frames_from_the_configured_repetition_on(rng):
    image = rng.integers(0, 255, (64, 64)).astype(np.uint8)
    checker = check(PlausibleLimits(frozen_frames=3))
    problems = [checker.problem(image.copy(), PixelFormat.MONO8) for _ in range(4)]
    assert [p is None for p in problems] == [True, True, False, False]
    image[1, 1] ^= 1  # one pixel that the quick look does not sample
    assert checker.problem(image, PixelFormat.MONO8) is None


def test_every_limit_can_be_switched_off():
    checker = check(PlausibleLimits(black_below=0, saturated_above=1, frozen_frames=0))
    for image in (np.zeros((8, 8), np.uint8), np.full((8, 8), 255, np.uint8)):
        for _ in range(3):
            assert checker.problem(image, PixelFormat.MONO8) is None


# Choosing the engine


@pytest.mark.parametrize(
    ("driver", "said"), [(False, "no NVIDIA driver was found"), (True, "PyTorch finds no CUDA device")]
)
def test_cuda_asked_for_and_missing_is_an_error_and_auto_says_why(driver, said, bundle, monkeypatch):
    def load(name):
        assert name == "libcuda.so.1"
        if not driver:
            raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("pipeline.engines.ctypes.CDLL", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineUnavailable, match="device: cuda was asked for, but PyTorch finds no CUDA device"):
        make_engine(bundle, "cuda")
    choice = make_engine(bundle, "auto")
    assert choice.engine.device == "cpu"
    assert said in choice.because


def test_what_a_first_frame_needs_is_prepared_before_it_comes(bundle, rng):
    seen = []

    class Watching(CannedEngine):
        def begin(self, image, fmt):
            seen.append((image.shape, image.dtype, fmt))
            return lambda: self.maps

    maps = np.zeros((8, 8), np.float32)
    plain = replace(bundle, training={**bundle.training, "pixel_formats": ["BayerRG12", "BGR8"]})
    spec = plain.model.preprocess
    size = (spec.height, spec.width)

    def warm_up(**changes):
        seen.clear()
        model = replace(plain.model, preprocess=replace(spec, **changes))
        Inspector(replace(plain, model=model), Watching(maps, maps)).warm_up()

    warm_up()
    assert seen == [(size, np.uint16, PixelFormat.BAYER_RG12), ((*size, 3), np.uint8, PixelFormat.BGR8)]
    warm_up(roi=FrameArea(10, 20, 30, 40))
    assert [shape[:2] for shape, _, _ in seen] == [(60, 40)] * 2
    warm_up(dark=rng.random((50, 60)).astype(np.float32))
    assert seen == [((50, 60), np.uint16, PixelFormat.BAYER_RG12), ((50, 60, 3), np.uint8, PixelFormat.BGR8)]


def test_what_the_engine_began_with_is_waited_for_though_the_image_is_no_part(bundle, part):
    waited = []

    class Counting(CannedEngine):
        def begin(self, image, fmt):
            return lambda: waited.append(image) or self.maps

    maps = np.zeros((8, 8), np.float32)
    inspector = Inspector(bundle, Counting(maps, maps))
    found = inspector.inspect(replace(part, image=np.zeros_like(part.image)))
    assert (found.outcome, found.reason) == (Outcome.INVALID, Reason.IMAGE)
    assert len(waited) == 1, "it would be in the way of the next frame"
    inspector.engine.begin = lambda _image, _fmt: lambda: 1 / 0
    assert inspector.inspect(replace(part, image=np.zeros_like(part.image))).reason is Reason.ENGINE
    assert inspector.inspect(part).reason is Reason.ENGINE


def test_a_check_that_fails_leaves_nothing_begun(bundle, part, monkeypatch):
    maps, waited = np.zeros((8, 8), np.float32), []
    engine = CannedEngine(maps, maps)
    engine.begin = lambda image, _fmt: lambda: waited.append(image) or engine.maps

    def fails(self, image, fmt):
        raise MemoryError("a sample")

    monkeypatch.setattr(PlausibilityCheck, "problem", fails)
    found = Inspector(bundle, engine).inspect(part)
    assert (found.reason, found.detail) == (Reason.ENGINE, "MemoryError: a sample")
    assert len(waited) == 1


def test_a_frame_is_not_compared_with_memory_that_was_given_back(bundle, part, rng):
    """The frame between the two was not looked at, so the first one's memory may hold the third by now."""

    class Once(CannedEngine):
        fails = False

        def begin(self, image, fmt):
            if self.fails:
                raise RuntimeError("device lost")
            return lambda: self.maps

    maps = np.zeros((8, 8), np.float32)
    engine = Once(maps, maps)
    inspector = Inspector(bundle, engine, limits=PlausibleLimits(frozen_frames=2))
    assert inspector.inspect(part).outcome is Outcome.OK
    engine.fails = True
    assert inspector.inspect(replace(part, image=part.image[::-1].copy())).reason is Reason.ENGINE
    engine.fails = False
    assert inspector.inspect(part).outcome is Outcome.OK
    assert inspector.inspect(part).reason is Reason.IMAGE, "this one is the one before"
