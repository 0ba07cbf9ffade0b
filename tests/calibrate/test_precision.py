from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from calibrate import precision as calibrating
from calibrate.dataset import ImageCache, PreparedImages
from calibrate.layouts import ImageFile
from calibrate.listener import Listener, TrainingStopped
from calibrate.normalize import score_maps
from calibrate.options import TrainOptions
from calibrate.precision import calibrate_precisions, check_precision, paste_anomaly
from calibrate.train import raw_maps
from drivers.replay import list_images
from pipeline.bundle import read_bundle
from pipeline.engine import RawMaps
from pipeline.engine_cpu import CpuEngine, cpu_precisions
from pipeline.preprocess import Preprocessor
from pipeline.scoring import Scorer

needs_int8 = pytest.mark.skipif("int8" not in cpu_precisions(), reason="this processor has no int8")


@pytest.fixture
def bundle(tiny_bundle):
    return read_bundle(tiny_bundle)


@pytest.fixture
def held_out(good_parts, bundle):
    files = [ImageFile(*pair) for pair in list_images(good_parts)][:4]
    return PreparedImages(files, ImageCache(Preprocessor(bundle.model.preprocess), None, 0))


def test_an_anomaly_changes_a_part_of_the_image_and_stays_an_image(rng):
    image = rng.normal(0, 1, (3, 96, 128)).astype(np.float32)
    touched = []
    for _ in range(60):
        changed = paste_anomaly(image, rng)
        touched.append((changed != image).any(axis=0).mean())
        assert changed.dtype == np.float32
        assert np.abs(changed).max() <= max(np.abs(image).max(), 2.7)
    assert 0 < np.median(touched) < 0.2
    assert max(touched) < 0.5


def test_pasting_is_repeatable():
    image = np.zeros((3, 64, 64), np.float32)
    once, again = (paste_anomaly(image, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(once, again)


@needs_int8
def test_ranges_that_cut_anomalies_off_are_found_out(bundle, held_out, monkeypatch):
    folder = held_out.files[0].path.parent
    observe = calibrating.observe_ranges

    def narrowed(*arguments):
        return {name: largest / 50 for name, largest in observe(*arguments).items()}

    options = TrainOptions(dataset=folder, out=folder)
    scorer = Scorer(bundle.model.geometry)
    maps = raw_maps(bundle.model, held_out, options, Listener())
    right = calibrate_precisions(bundle, held_out, maps, scorer, options).precisions["int8"]
    monkeypatch.setattr(calibrating, "observe_ranges", narrowed)
    wrong = calibrate_precisions(bundle, held_out, maps, scorer, options).precisions["int8"]
    assert 3 * right.largest_deviation < wrong.largest_deviation, "four steps of training are no model"
    assert not wrong.trusted


def test_an_engine_that_fails_costs_its_precision_and_not_the_training(bundle, held_out, monkeypatch):
    def broken(_model, _precision):
        raise RuntimeError("out of memory")

    folder = held_out.files[0].path.parent
    options = TrainOptions(dataset=folder, out=folder)
    monkeypatch.setattr(calibrating, "engine_of", broken)
    monkeypatch.setattr(calibrating, "reduced_precisions", lambda _device: ["fp16"])
    maps, said = raw_maps(bundle.model, held_out, options, Listener()), []
    found = calibrate_precisions(bundle, held_out, maps, Scorer(bundle.model.geometry), options, said.append)
    assert set(found.precisions) == {"fp32"}
    assert said == ["fp16 is left out: RuntimeError: out of memory"]


def test_float32_that_fails_here_costs_the_precisions_and_not_the_training(bundle, held_out, monkeypatch):
    def broken(_model):
        raise RuntimeError("no such instruction")

    folder = held_out.files[0].path.parent
    options = TrainOptions(dataset=folder, out=folder, device="cpu")
    maps, said = raw_maps(bundle.model, held_out, options, Listener()), []
    monkeypatch.setattr(calibrating, "CpuEngine", broken)
    monkeypatch.setattr(calibrating, "reduced_precisions", lambda _device: [])
    found = calibrate_precisions(bundle, held_out, maps, Scorer(bundle.model.geometry), options, said.append)
    assert found is bundle
    assert said == ["precisions are not calibrated: RuntimeError: no such instruction"]


@needs_int8
@pytest.mark.parametrize("images", [3, 15])
def test_it_stops_between_images_and_leaves_no_precision_out_for_that(bundle, held_out, images):
    folder = held_out.files[0].path.parent
    options = TrainOptions(dataset=folder, out=folder, device="cpu")
    maps, said, looks = raw_maps(bundle.model, held_out, options, Listener()), [], itertools.count(1)

    def go_on():
        if next(looks) == images:
            raise TrainingStopped("stopped")

    with pytest.raises(TrainingStopped):
        calibrate_precisions(bundle, held_out, maps, Scorer(bundle.model.geometry), options, said.append, go_on)
    assert next(looks) == images + 1
    assert not said


@needs_int8
def test_ranges_that_cannot_be_observed_cost_int8_and_not_the_training(bundle, held_out, monkeypatch):
    def broken(_model, _images):
        raise RuntimeError("out of memory")

    folder = held_out.files[0].path.parent
    options = TrainOptions(dataset=folder, out=folder, device="cpu")
    monkeypatch.setattr(calibrating, "observe_ranges", broken)
    maps, said = raw_maps(bundle.model, held_out, options, Listener()), []
    found = calibrate_precisions(bundle, held_out, maps, Scorer(bundle.model.geometry), options, said.append)
    assert set(found.precisions) == set(cpu_precisions()) - {"int8"}
    assert said == ["int8 is left out: RuntimeError: out of memory"]


@needs_int8
def test_the_check_on_another_machine_sees_what_differs_there(bundle, held_out):
    scorer = Scorer(bundle.model.geometry)
    engine = CpuEngine(bundle.model, precision="int8")
    maps = [RawMaps(*engine.infer(held_out[0]), 0, 0)]
    (judged,) = score_maps(maps, scorer, bundle.at("int8").quantiles)
    assert check_precision(bundle, engine, held_out[0], judged, scorer) < 1
    assert check_precision(bundle, engine, held_out[0], judged + 1, scorer) > 1, "it prepares the frame otherwise"
    assert np.isnan(check_precision(bundle, engine, held_out[0], np.nan, scorer))
    cut_off = {name: largest / 50 for name, largest in bundle.model.ranges.items()}
    other = CpuEngine(replace(bundle.model, ranges=cut_off), precision="int8")
    assert check_precision(bundle, other, held_out[0], judged, scorer) > 1


@needs_int8
def test_a_precision_is_proven_on_other_anomalies_than_its_ranges_come_from(bundle, held_out, monkeypatch):
    """Ranges that just fit what they were taken from would pass on the same images."""
    seen, observe, timed = [], calibrating.observe_ranges, calibrating._timed_maps

    def observing(model, images):
        taken = list(images)
        seen.append({image.tobytes() for image in taken})
        return observe(model, iter(taken))

    def proving(engine, images):
        taken = list(images)
        seen.append({image.tobytes() for image in taken})
        return timed(engine, taken)

    monkeypatch.setattr(calibrating, "observe_ranges", observing)
    monkeypatch.setattr(calibrating, "_timed_maps", proving)
    folder = held_out.files[0].path.parent
    options = TrainOptions(dataset=folder, out=folder)
    maps = raw_maps(bundle.model, held_out, options, Listener())
    calibrate_precisions(bundle, held_out, maps, Scorer(bundle.model.geometry), options)
    observed, in_float, *in_precisions = seen
    good = {image.tobytes() for image in held_out}
    assert good < observed
    assert len(in_float) == len(held_out)
    assert not in_float & observed
    assert all(proof == in_float | good for proof in in_precisions)
