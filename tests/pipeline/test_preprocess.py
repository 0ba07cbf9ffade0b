from __future__ import annotations

import numpy as np
import pytest

from drivers.bayer import mosaic
from drivers.frame import PixelFormat
from pipeline.preprocess import FormatMismatch, Preprocessor, PreprocessSpec, check_correction, flat_field_gain
from pipeline.scoring import FrameArea
from tests.pipeline import reference

TOLERANCE = 1e-5
"""Both paths against float64, in units of ImageNet standard deviations."""


def random_image(fmt: PixelFormat, rng: np.random.Generator, height: int = 47, width: int = 61) -> np.ndarray:
    shape = (height, width, 3) if fmt.channels == 3 else (height, width)
    return rng.integers(0, fmt.max_value + 1, shape).astype(fmt.dtype)


def spec_with_everything(rng: np.random.Generator, height: int = 47, width: int = 61) -> PreprocessSpec:
    ignore = np.zeros((height, width), bool)
    ignore[10:17, 20:33] = True
    return PreprocessSpec(
        width=24,
        height=36,
        roi=FrameArea(5, 3, 50, 41),
        dark=rng.integers(0, 9, (height, width)).astype(np.float32),
        flat=rng.integers(90, 250, (height, width)).astype(np.float32),
        ignore=ignore,
    )


def expected(spec: PreprocessSpec, image: np.ndarray, fmt: PixelFormat) -> np.ndarray:
    roi = None if spec.roi is None else (spec.roi.x, spec.roi.y, spec.roi.width, spec.roi.height)
    return reference.preprocess(
        image, fmt, spec.width, spec.height, roi=roi, dark=spec.dark, flat=spec.flat, ignore=spec.ignore
    )


@pytest.mark.parametrize("fmt", list(PixelFormat))
@pytest.mark.parametrize("size", [(32, 24), (61, 47), (96, 80), (32, 96)])
def test_every_pixel_format_against_numpy(fmt, size, rng):
    image, spec = random_image(fmt, rng), PreprocessSpec(*size)
    assert np.abs(Preprocessor(spec)(image, fmt) - expected(spec, image, fmt)).max() < TOLERANCE


@pytest.mark.parametrize("fmt", list(PixelFormat))
def test_roi_dark_flat_and_mask_against_numpy(fmt, rng):
    image, spec = random_image(fmt, rng), spec_with_everything(rng)
    # At 16 bits float32 may round a corrected value to the neighbouring integer: one step of the format.
    tolerance = TOLERANCE + (1 / fmt.max_value / reference.STD.min() if fmt.bits == 16 else 0)
    assert np.abs(Preprocessor(spec)(image, fmt) - expected(spec, image, fmt)).max() < tolerance


@pytest.mark.parametrize("fmt", [f for f in PixelFormat if f.bayer or f.colour_order])
def test_known_colours_come_out_in_their_channels(fmt):
    # Left half pure red, right half pure blue, through the mosaic that the format's name promises.
    rgb = np.zeros((32, 64, 3), fmt.dtype)
    rgb[:, :32, 0] = fmt.max_value
    rgb[:, 32:, 2] = fmt.max_value
    if fmt.bayer:
        image = mosaic(rgb, fmt.bayer)
    else:
        image = rgb if fmt.colour_order == "RGB" else np.ascontiguousarray(rgb[..., ::-1])
    out = Preprocessor(PreprocessSpec(16, 8))(image, fmt)
    shades = out * reference.STD[:, None, None] + reference.MEAN[:, None, None]
    np.testing.assert_allclose(shades[:, 4, 2], [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(shades[:, 4, 13], [0, 0, 1], atol=1e-6)


@pytest.mark.parametrize(("fmt", "value"), [("Mono10", 1023), ("Mono12", 4095), ("Mono16", 65535)])
def test_range_is_the_formats_not_the_images(fmt, value):
    dark_image = np.full((40, 40), value // 8, np.uint16)
    out = Preprocessor(PreprocessSpec(8, 8))(dark_image, PixelFormat(fmt))
    shade = out[0, 4, 4] * reference.STD[0] + reference.MEAN[0]
    assert shade == pytest.approx((value // 8) / value, abs=1e-6)


def test_resize_is_antialiased():
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 255  # finer than the output can show: must come out as an even grey
    out = Preprocessor(PreprocessSpec(64, 64))(stripes, PixelFormat.MONO8)
    assert np.ptp(out[0]) < 1e-5


def test_what_lies_under_the_mask_does_not_matter(rng):
    spec = spec_with_everything(rng)
    for fmt in (PixelFormat.MONO8, PixelFormat.BAYER_RG8, PixelFormat.BGR8):
        image = random_image(fmt, rng)
        changed = image.copy()
        changed[spec.ignore] = 255 - changed[spec.ignore]
        np.testing.assert_array_equal(Preprocessor(spec)(image, fmt), Preprocessor(spec)(changed, fmt))


def test_flat_field_makes_an_uneven_lamp_even_and_keeps_colour():
    lamp = np.linspace(0.5, 1.0, 32, dtype=np.float32)[None, :].repeat(32, 0)
    colour = np.tile(np.array([[200, 120], [120, 60]], np.float32), (16, 16))
    flat = colour * lamp
    levelled = flat * flat_field_gain(flat, 0.0, is_bayer=True)
    for i in (0, 1):
        for j in (0, 1):
            plane = levelled[i::2, j::2]
            assert np.ptp(plane) < 1e-3
            assert plane.mean() == pytest.approx(flat[i::2, j::2].mean(), rel=1e-5)


def test_flat_field_no_brighter_than_dark_is_left_alone():
    flat = np.array([[100, 5], [100, 100]], np.float32)
    assert flat_field_gain(flat, np.full((2, 2), 5, np.float32), is_bayer=False)[0, 1] == 1.0


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1.0, np.nan]]), "not finite"),
        (np.zeros(5), "must be grey or R, G, B"),
        (np.zeros((4, 4, 4)), "must be grey or R, G, B"),
    ],
)
def test_correction_frames_that_cannot_be_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        check_correction(array.astype(np.float32))


def test_frames_that_do_not_fit_are_refused(rng):
    image = random_image(PixelFormat.MONO8, rng)
    with pytest.raises(FormatMismatch, match="reaches beyond"):
        Preprocessor(PreprocessSpec(8, 8, roi=FrameArea(40, 0, 40, 40)))(image, PixelFormat.MONO8)
    with pytest.raises(FormatMismatch, match="ignore mask is 10×10"):
        Preprocessor(PreprocessSpec(8, 8, ignore=np.zeros((10, 10), bool)))(image, PixelFormat.MONO8)
    with pytest.raises(FormatMismatch, match="is not RGB8"):
        Preprocessor(PreprocessSpec(8, 8))(image, PixelFormat.RGB8)
    spec = PreprocessSpec(8, 8, dark=np.zeros((47, 61, 3), np.float32))
    with pytest.raises(FormatMismatch, match="in colour"):
        Preprocessor(spec)(image, PixelFormat.MONO8)


@pytest.mark.parametrize("there", [False, pytest.param(True, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("fmt", list(PixelFormat))
def test_cuda_gives_the_cpu_paths_numbers(fmt, there, rng, request):
    if not there:  # the kernel's own source, compiled for the host: its numbers are checked on every machine
        request.getfixturevalue("fake_cuda")
    import cupy

    from pipeline.preprocess_cuda import CudaPreprocessor

    image = random_image(fmt, rng)
    for spec in (PreprocessSpec(32, 24), PreprocessSpec(96, 32), spec_with_everything(rng)):
        out = cupy.zeros((3, spec.height, spec.width), cupy.float32)
        CudaPreprocessor(spec, [out])(image, fmt)
        assert np.abs(cupy.asnumpy(out) - Preprocessor(spec)(image, fmt)).max() < TOLERANCE
