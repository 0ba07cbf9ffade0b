from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import astuple, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from calibrate import dataset
from calibrate.augment import turn
from calibrate.checkpoint import FILE, CheckpointError, read_progress
from calibrate.dataset import ImageCache, PreparedImages, load_good_images
from calibrate.device import resolve_precision
from calibrate.evaluate import evaluate
from calibrate.layouts import DatasetError, ImageFile, load_test_set
from calibrate.listener import Listener, TrainingError, TrainingStopped
from calibrate.options import LossOptions, TrainOptions, Turns
from calibrate.teacher import find_teacher, layout_share
from calibrate.train import tell_of_threshold, train
from calibrate.trainer import Trainer
from drivers.frame import PixelFormat
from drivers.replay import decode_contents, decode_image, list_images, read_image
from pipeline.bundle import MANIFEST, read_bundle
from pipeline.geometry import Geometry
from pipeline.preprocess import Preprocessor, PreprocessSpec
from pipeline.scoring import FrameArea


class Notes(Listener):
    """Remembers what training said, and stops it after a given step."""

    def __init__(self, stop_after=None):
        self.said, self.steps, self.stop_after = [], [], stop_after

    def say(self, message):
        self.said.append(message)

    def step(self, done, total, losses):
        self.steps.append((done, losses))

    def should_stop(self):
        return self.stop_after is not None and bool(self.steps) and self.steps[-1][0] >= self.stop_after


@pytest.fixture
def options(good_parts, tmp_path):
    return TrainOptions(
        dataset=good_parts,
        out=tmp_path / "out",
        geometry=Geometry(64, 64),
        preprocess=PreprocessSpec(64, 64),
        steps=5,
        precision="fp32",
        held_out_share=0.25,
    )


def same_weights(a, b):
    return all(np.array_equal(a.model.weights[k], v) for k, v in b.model.weights.items())


def test_the_same_seed_gives_the_same_bundle_and_another_seed_another(options, tmp_path):
    first = train(options)
    assert same_weights(first, train(replace(options, out=tmp_path / "again")))
    assert not same_weights(first, train(replace(options, out=tmp_path / "other", seed=1)))


@pytest.mark.parametrize(
    ("relative", "value", "why"),
    [
        (False, 1.0, "upper quantile, 1, must lie above the lower one, 1"),
        (True, 0.0, "divided by their levels"),
    ],
)
def test_a_look_at_networks_that_have_learnt_nothing_does_not_end_the_training(
    options, monkeypatch, relative, value, why
):
    flat = np.full((8, 8), value, np.float32)
    monkeypatch.setattr(Trainer, "maps", lambda _trainer, _image: (flat, flat))
    notes = Notes()
    train(replace(options, relative_map=relative), notes)
    looks = [said for said in notes.said if said.startswith("step ")]
    assert len(looks) == 4
    assert all("no scores yet" in said and why in said for said in looks), looks


def test_stopped_and_resumed_is_the_same_as_never_stopped(options, tmp_path):
    whole = train(replace(options, out=tmp_path / "whole"))
    with pytest.raises(TrainingStopped, match="stopped at step 3 of 5"):
        train(options, Notes(stop_after=3))
    notes = Notes()
    resumed = train(options, notes)
    assert "resuming from the checkpoint at step 3 of 5" in notes.said
    assert [done for done, _ in notes.steps] == [4, 5]
    assert same_weights(whole, resumed)
    assert resumed.threshold == whole.threshold
    assert not (options.out / FILE).exists()
    reports = [(folder / "report" / "losses.png").read_bytes() for folder in (options.out, tmp_path / "whole")]
    assert reports[0] == reports[1], "the report shows the losses of all steps"


def test_a_checkpoint_of_another_run_is_refused_unless_told_to_restart(options):
    with pytest.raises(TrainingStopped):
        train(options, Notes(stop_after=2))
    with pytest.raises(CheckpointError, match="different: seed, steps"):
        train(replace(options, steps=6, seed=2))
    assert read_progress(options.out).step == 2
    notes = Notes()
    train(replace(options, steps=6, restart=True), notes)
    assert notes.steps[0][0] == 1


def test_a_checkpoint_without_losses_is_gone_on_from(options):
    """As the version before wrote them."""
    with pytest.raises(TrainingStopped):
        train(options, Notes(stop_after=3))
    with safe_open(options.out / FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = {name: value for name, value in file.metadata().items() if name != "losses"}
    save_file(tensors, options.out / FILE, header)
    notes = Notes()
    train(options, notes)
    assert [done for done, _ in notes.steps] == [4, 5]


def test_a_damaged_checkpoint_says_what_to_do(options):
    options.out.mkdir(exist_ok=True)
    (options.out / FILE).write_bytes(b"half a checkpoint")
    with pytest.raises(CheckpointError, match="--restart"):
        train(options)


def test_a_full_disk_leaves_the_last_checkpoint_whole(options, monkeypatch):
    with pytest.raises(TrainingStopped):
        train(options, Notes(stop_after=2))
    before = (options.out / FILE).read_bytes()

    def no_space(_fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match=rf"step 3 was not written: .*No space left.*{FILE}.*before it is whole"):
        train(replace(options, checkpoint_s=0))
    assert (options.out / FILE).read_bytes() == before
    assert [p.name for p in options.out.iterdir()] == [FILE]


def test_a_finished_bundle_is_not_overwritten_by_accident(options):
    train(options)
    with pytest.raises(TrainingError, match="--overwrite"):
        train(options)
    train(replace(options, overwrite=True))


def test_two_trainings_do_not_write_to_one_folder(options):
    class Second(Notes):
        def say(self, message):
            super().say(message)
            if len(self.said) == 1:  # while the first is under way
                with pytest.raises(TrainingError, match="another training writes to"):
                    train(replace(options, restart=True, seed=7))

    first = Second()
    assert train(options, first).training["seed"] == options.seed
    assert first.said


def test_a_training_that_came_to_nothing_leaves_no_folder(options, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(options.dataset, photos)
    with pytest.raises(DatasetError):
        train(replace(options, dataset=photos, out=photos / "test"))
    train(replace(options, dataset=photos, steps=1))


def test_the_learning_rate_drops_at_95_percent_of_the_steps(options, monkeypatch):
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    train(replace(options, steps=20, learning_rate=1e-4))
    assert rates == pytest.approx([1e-4] * 19 + [1e-5])


def test_losses_fall(options):
    notes = Notes()
    train(replace(options, steps=25, learning_rate=1e-3, teacher="random"), notes)
    hard = [losses["hard"] for _, losses in notes.steps]
    assert np.mean(hard[-5:]) < 0.7 * np.mean(hard[:5])


def test_the_penalty_is_never_silently_off(options):
    notes = Notes()
    train(replace(options, steps=2), notes)
    assert notes.steps[0][1]["penalty"] > 0
    assert any("procedural images for the penalty" in line for line in notes.said)


def test_natural_images_of_ones_own(options, tmp_path, rng):
    folder = tmp_path / "natural"
    folder.mkdir()
    cv2.imwrite(str(folder / "n.png"), rng.integers(0, 256, (80, 80, 3)).astype(np.uint8))
    notes = Notes()
    train(replace(options, natural=folder, steps=2), notes)
    assert notes.steps[0][1]["penalty"] > 0
    assert any("natural images for the penalty" in line for line in notes.said)


def test_medium_padded_tiled_and_larger_images_train_too(options, tmp_path):
    for name, geometry, size in (
        ("tiled", Geometry(128, 96, tile_rows=1, tile_columns=2), "small"),
        ("padded", Geometry(64, 64, padded=True), "small"),
        ("medium", Geometry(64, 64), "medium"),
    ):
        spec = PreprocessSpec(geometry.image_width, geometry.image_height)
        out = tmp_path / name
        train(replace(options, out=out, geometry=geometry, preprocess=spec, size=size, steps=1, teacher="random"))
        assert read_bundle(out).model.geometry == geometry


def test_without_autoencoder_the_bundle_scores_with_the_student_teacher_map_alone(options):
    bundle = train(replace(options, losses=LossOptions(autoencoder=False), steps=2))
    assert (bundle.quantiles.ae_a, bundle.quantiles.ae_b) == (None, None)
    assert read_bundle(options.out).quantiles == bundle.quantiles


def test_quantile_levels_are_options_and_recorded(options):
    bundle = train(replace(options, quantile_levels=(0.5, 0.99), steps=1))
    assert bundle.calibration["quantile_levels"] == [0.5, 0.99]
    usual = train(replace(options, out=options.out.with_name("usual"), steps=1))
    assert bundle.quantiles.st_a < usual.quantiles.st_a


def test_an_image_that_does_not_fit_is_named_before_training_held_out_or_not(options, good_parts, tmp_path):
    folder = tmp_path / "parts"
    shutil.copytree(good_parts, folder)
    spec = replace(options.preprocess, roi=FrameArea(0, 0, 96, 96))
    for name in [f.name for f in load_good_images(folder, 0.25, 0).held_out][:1]:
        cv2.imwrite(str(folder / name), np.full((80, 96, 3), 99, np.uint8))
        notes = Notes()
        with pytest.raises(DatasetError, match=rf"{name}: .*reaches beyond the frame"):
            train(replace(options, dataset=folder, preprocess=spec), notes)
        assert notes.steps == []


def test_unreadable_natural_images_are_skipped_and_said(options, tmp_path, rng):
    folder = tmp_path / "natural"
    folder.mkdir()
    cv2.imwrite(str(folder / "n.png"), rng.integers(0, 256, (80, 80, 3)).astype(np.uint8))
    (folder / "broken.png").write_bytes(b"no image")
    notes = Notes()
    train(replace(options, natural=folder, steps=6), notes)
    assert sum("skipped natural image broken.png" in line for line in notes.said) == 1
    assert all(losses["penalty"] > 0 for _, losses in notes.steps)
    (folder / "n.png").unlink()
    with pytest.raises(DatasetError, match="natural images in a row cannot be read"):
        train(replace(options, natural=folder, overwrite=True))


def test_the_random_teacher_is_announced(options):
    notes = Notes()
    train(replace(options, steps=1, teacher="random"), notes)
    assert any("random weights" in line for line in notes.said)
    assert read_bundle(options.out).teacher["origin"].startswith("random weights")


def test_mask_that_ignores_everything_is_said_before_training(options):
    spec = replace(options.preprocess, ignore=np.ones((96, 96), bool))
    notes = Notes()
    with pytest.raises(TrainingError, match="leaves nothing to inspect"):
        train(replace(options, preprocess=spec), notes)
    assert notes.steps == []


def test_a_region_beyond_the_mask_is_said_before_training(options):
    spec = replace(options.preprocess, ignore=np.zeros((96, 96), bool), roi=FrameArea(500, 0, 50, 50))
    with pytest.raises(TrainingError, match=r"x=500.* reaches beyond the frame of 96×96 px"):
        train(replace(options, preprocess=spec))


def test_a_bundle_is_not_written_among_the_images_but_in_a_folder_of_its_own(options, tmp_path):
    parts = shutil.copytree(options.dataset, tmp_path / "parts")
    options = replace(options, dataset=parts, steps=1)
    with pytest.raises(DatasetError, match=r"holds images of the data set \(good_\d+\.png\)"):
        train(replace(options, out=parts))
    assert {path.suffix for path in parts.iterdir()} == {".png"}
    digests = [train(replace(options, out=parts / "m", overwrite=True)).training["digests"] for _ in range(2)]
    assert digests[0] == digests[1], "its own pictures are no data"


def test_images_that_do_not_fit_the_region_are_named(options):
    spec = replace(options.preprocess, ignore=np.zeros((10, 10), bool))
    with pytest.raises(DatasetError, match=r"good_\d+\.png: .*ignore mask is 10×10"):
        train(replace(options, preprocess=spec))


# Data sets


def test_split_is_seeded_disjoint_and_complete(good_parts):
    a, b = load_good_images(good_parts, 0.25, 1), load_good_images(good_parts, 0.25, 1)
    assert (a.train, a.held_out) == (b.train, b.held_out)
    assert len(a.held_out) == 3
    assert {f.name for f in a.train} | {f.name for f in a.held_out} == {p.name for p in good_parts.iterdir()}
    assert not set(a.train) & set(a.held_out)
    assert load_good_images(good_parts, 0.25, 2).held_out != a.held_out


def test_mvtec_trees_are_found(good_parts, tmp_path):
    shutil.copytree(good_parts, tmp_path / "train" / "good")
    assert len(load_good_images(tmp_path, 0.1, 0).train) == 11


def test_zero_and_one_image_are_errors(tmp_path, good_parts):
    with pytest.raises(DatasetError, match="0 different usable images"):
        load_good_images(tmp_path, 0.1, 0)
    shutil.copy(good_parts / "good_0.png", tmp_path)
    with pytest.raises(DatasetError, match=r"1 different usable images .* at least 2"):
        load_good_images(tmp_path, 0.1, 0)
    with pytest.raises(DatasetError, match="no such folder"):
        load_good_images(tmp_path / "missing", 0.1, 0)


def test_corrupt_files_are_listed_and_more_than_5_percent_are_an_error(good_parts, tmp_path):
    for copy in range(2):
        shutil.copytree(good_parts, tmp_path / str(copy))
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert [name for name, _ in load_good_images(tmp_path, 0.1, 0).corrupt] == ["bad.png"]
    (tmp_path / "bad2.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"2 of 26 files cannot be read[\s\S]*bad\.png"):
        load_good_images(tmp_path, 0.1, 0)


def test_a_share_that_fails_is_no_corrupt_file(good_parts, monkeypatch):
    read, number = Path.read_bytes, errno.EIO

    def fail(path):
        if path.name == "good_3.png":
            raise OSError(number, os.strerror(number), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output error"):
        load_good_images(good_parts, 0.1, 0)
    number = errno.EACCES
    with pytest.raises(DatasetError, match="1 of 12 files cannot be read"):
        load_good_images(good_parts, 0.1, 0)


def test_the_split_follows_from_the_names_and_not_from_the_order_of_the_folder(good_parts, tmp_path, monkeypatch):
    for i in range(6):
        shutil.copy(good_parts / f"good_{i}.png", tmp_path / f"{i}.png")
        shutil.copy(good_parts / f"good_{i + 6}.png", tmp_path / f"0{i}.png")
    found, walk = load_good_images(tmp_path, 0.3, 0), os.walk

    def backwards(*arguments, **options):
        for folder, below, names in walk(*arguments, **options):
            yield folder, below, sorted(names, reverse=names == sorted(names))

    monkeypatch.setattr(os, "walk", backwards)
    again = load_good_images(tmp_path, 0.3, 0)
    assert (again.held_out, again.train) == (found.held_out, found.train)


@pytest.fixture
def test_tree(tmp_path, good_parts):
    from drivers.synthetic import PartRenderer, SyntheticOptions

    (tmp_path / "test" / "good").mkdir(parents=True)
    line = PartRenderer(SyntheticOptions(seed=3, width=96, height=96))
    for i in range(12):
        cv2.imwrite(str(tmp_path / "test" / "good" / f"{i}.png"), line.render(700 + i, "good").raw)
    for kind in ("stain", "scratch"):
        (tmp_path / "test" / kind).mkdir()
        (tmp_path / "ground_truth" / kind).mkdir(parents=True)
        for i in range(3):
            part = line.render(500 + i, kind)
            cv2.imwrite(str(tmp_path / "test" / kind / f"{i}.png"), part.raw)
            cv2.imwrite(str(tmp_path / "ground_truth" / kind / f"{i}_mask.png"), part.mask.astype(np.uint8) * 255)
    return tmp_path


def test_evaluate_prints_what_a_ranking_by_hand_gives(test_tree, tiny_bundle):
    bundle = read_bundle(tiny_bundle)
    result = evaluate(bundle, test_tree, "cpu")
    from calibrate.dataset import read_frame
    from pipeline.engine_cpu import CpuEngine
    from pipeline.scoring import Scorer

    engine, scorer = CpuEngine(bundle.model), Scorer(bundle.model.geometry)
    scores = {}
    for file, kind, _masks in load_test_set(test_tree).images:
        frame = read_frame(file)
        raw = engine.begin(frame.image, frame.pixel_format)()
        combined = scorer.combine(raw.student_teacher, raw.autoencoder, bundle.quantiles)
        scores.setdefault(kind, []).append(scorer.stretch(combined).max())
    pairs = [(g < d) + 0.5 * (g == d) for g in scores["good"] for k in ("stain", "scratch") for d in scores[k]]
    assert result.image.auroc == pytest.approx(np.mean(pairs))
    assert result.false_rejects.count == sum(s > bundle.threshold for s in scores["good"])
    assert {k: v.escapes.of for k, v in result.kinds.items()} == {"scratch": 3, "stain": 3}


def test_the_pixel_format_declared_in_training_is_used_again(tmp_path, options, rng):
    for name in ("good", "stain"):
        (tmp_path / name).mkdir()
        for i in range(4):
            image = rng.integers(500, 3500, (96, 96)).astype(np.uint16)
            cv2.imwrite(str(tmp_path / name / f"{i}.png"), image)
    declared = replace(options, dataset=tmp_path / "good", pixel_format=PixelFormat.MONO12, steps=1)
    bundle = train(declared)
    assert read_bundle(options.out).training["pixel_format"] == "Mono12"
    for i in range(4):  # others than training saw: those would be left out
        shutil.move(tmp_path / "good" / f"{i}.png", tmp_path / "seen.png")
        cv2.imwrite(str(tmp_path / "good" / f"{i}.png"), rng.integers(500, 3500, (96, 96)).astype(np.uint16))
    shutil.rmtree(options.out)
    assert evaluate(bundle, tmp_path, "cpu").false_rejects.of == 4
    shutil.copy(tmp_path / "good" / "0.png", tmp_path / "good" / "8bit.png")
    cv2.imwrite(str(tmp_path / "good" / "8bit.png"), np.zeros((96, 96), np.uint8))
    with pytest.raises(DatasetError, match=r"8bit\.png: .* is not Mono12"):
        evaluate(bundle, tmp_path, "cpu")


def test_layouts_that_cannot_be_evaluated(tmp_path, good_parts):
    with pytest.raises(DatasetError, match="0 good and 0 defective"):
        load_test_set(tmp_path)
    shutil.copytree(good_parts, tmp_path / "good")
    with pytest.raises(DatasetError, match="12 good and 0 defective"):
        load_test_set(tmp_path)


def test_an_output_folder_that_cannot_be_written_is_said_before_training(options, tmp_path):
    (tmp_path / "file").write_text("")
    notes = Notes()
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        train(replace(options, out=tmp_path / "file" / "below"), notes)
    assert notes.said == []


def test_duplicates_stay_on_one_side_of_the_split_and_are_said(good_parts, tmp_path):
    shutil.copytree(good_parts, tmp_path / "a")
    for i in range(12):
        shutil.copy(tmp_path / "a" / f"good_{i}.png", tmp_path / "a" / f"copy_{i}.png")
    good = load_good_images(tmp_path / "a", 0.25, 0)
    assert len(good.duplicates) == 12
    assert len(good.held_out) == 3
    assert len(good.train) == 18, "copies of a held-out image are not learnt from"
    held_out = {f.path.read_bytes() for f in good.held_out}
    assert not held_out & {f.path.read_bytes() for f in good.train}


def photographed_thrice(good_parts, folder):
    """Each part in the light of three lamps."""
    folder.mkdir()
    for path in sorted(good_parts.iterdir()):
        image = cv2.imread(str(path))
        for lamp in range(3):
            name = f"part{path.stem.removeprefix('good_')}_lamp{lamp}.png"
            cv2.imwrite(str(folder / name), np.clip(image.astype(int) + 2 * lamp, 0, 255).astype(np.uint8))
    return folder


def test_photographs_of_one_part_stay_on_one_side_and_count_once(good_parts, tmp_path):
    folder, part = photographed_thrice(good_parts, tmp_path / "parts"), re.compile(r"part(\d+)_")
    good = load_good_images(folder, 0.25, 0, part=part)
    learnt = Counter(part.search(file.name)[1] for file in good.train)
    held_out = [part.search(file.name)[1] for file in good.held_out]
    assert set(learnt.values()) == {3}
    assert (len(learnt), len(held_out), good.left_out) == (9, 3, 6)
    assert not learnt.keys() & set(held_out)
    assert len(set(held_out)) == 3
    assert len(good.digests) == 36, "an evaluation knows those that were left out, too"
    assert good.held_out == load_good_images(folder, 0.25, 0, part=part).held_out
    lamps = {
        file.name[-5] for seed in range(8) for file in load_good_images(folder, 0.25, seed, part=part).held_out
    }
    assert lamps == {"0", "1", "2"}, "any of a part's photographs"
    assert load_good_images(good_parts, 0.25, 0).left_out == 0


def test_parts_that_cannot_be_told_apart_are_an_error(good_parts, tmp_path):
    folder = photographed_thrice(good_parts, tmp_path / "parts")
    with pytest.raises(DatasetError, match=r"--part tile\(\\d\+\) is found in no name, such as part0_lamp0\.png"):
        load_good_images(folder, 0.25, 0, part=re.compile(r"tile(\d+)"))
    with pytest.raises(DatasetError, match="all photographs show one part, lamp"):
        load_good_images(folder, 0.25, 0, part=re.compile(r"(lamp)"))


def test_a_data_sets_own_validation_images_are_held_out(good_parts, tmp_path):
    shutil.copytree(good_parts, tmp_path / "train" / "good")
    (tmp_path / "validation" / "good").mkdir(parents=True)
    shutil.move(tmp_path / "train" / "good" / "good_1.png", tmp_path / "validation" / "good" / "x.png")
    good = load_good_images(tmp_path, 0.5, 0)
    assert [f.name for f in good.held_out] == ["validation/good/x.png"]
    assert len(good.train) == 11


def test_parts_that_validation_images_show_are_not_learnt_from(good_parts, tmp_path):
    photographed_thrice(good_parts, tmp_path / "parts")
    for side, names in {"train/good": "part[2-9]_*.png", "validation/good": "part[01]_*.png"}.items():
        (tmp_path / "set" / side).mkdir(parents=True)
        for path in (tmp_path / "parts").glob(names):
            shutil.copy(path, tmp_path / "set" / side)
    shutil.move(tmp_path / "set/validation/good/part0_lamp0.png", tmp_path / "set/train/good")
    good = load_good_images(tmp_path / "set", 0.5, 0, part=re.compile(r"part(\d+)_"))
    assert sorted(re.findall(r"part\d+", " ".join(f.name for f in good.held_out))) == ["part0", "part1"]
    assert all(f.name.startswith("validation/good/") for f in good.held_out)
    assert not [f.name for f in good.train if "part0" in f.name or "part1" in f.name]
    assert (len(good.train), good.left_out) == (24, 4), "one photograph of each counts, the one in train/ never"
    with pytest.raises(DatasetError, match="no image to learn from: the validation images show every part"):
        load_good_images(tmp_path / "set", 0.5, 0, part=re.compile(r"lamp(\d)"))
    for pattern in (r"^part(\d+)_", "(.+)_lamp"):
        again = load_good_images(tmp_path / "set", 0.5, 0, part=re.compile(pattern))
        assert (again.train, again.left_out) == (good.train, 4), "names begin in their own folder"
    (tmp_path / "set/validation/good/part1_lamp0.png").rename(tmp_path / "set/validation/good/one_lamp0.png")
    for name in ("part0_lamp1", "part0_lamp2", "part1_lamp1", "part1_lamp2"):
        (tmp_path / f"set/validation/good/{name}.png").unlink()
    with pytest.raises(DatasetError, match=r"found in no name of the validation images, such as .*one_lamp0\.png"):
        load_good_images(tmp_path / "set", 0.5, 0, part=re.compile(r"part(\d+)_"))


def test_mixed_sizes_and_few_images_are_said(options, good_parts, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in range(4):
        image = cv2.imread(str(good_parts / f"good_{i}.png"))
        cv2.imwrite(str(folder / f"{i}.png"), image[: 96 - i] if i else cv2.cvtColor(image, cv2.COLOR_BGR2GRAY))
    notes = Notes()
    train(replace(options, dataset=folder, steps=1), notes)
    said = "\n".join(notes.said)
    assert "images of 4 sizes, 96x93 to 96x96 px" in said
    assert "pixel formats are mixed: BGR8, Mono8" in said
    assert "only 4 different images: expect" in said


@pytest.mark.parametrize(("rank", "expected"), [(-1, True), (-2, False)])
def test_one_image_that_makes_the_threshold_alone_is_named(tiny_bundle, rank, expected):
    notes, scores = Notes(), np.array([0.2, 0.9, 0.3])
    bundle = replace(read_bundle(tiny_bundle), threshold=float(np.sort(scores)[rank]))
    tell_of_threshold(bundle, scores, ["a.png", "odd.png", "b.png"], notes)
    told = [line for line in notes.said if "score of odd.png alone (the next highest is 0.3000)" in line]
    assert len(told) == len(notes.said) == expected


def test_a_bundle_is_finished_also_when_its_report_cannot_be_written(options):
    options.out.mkdir()
    (options.out / "report").write_text("in the way")
    with pytest.raises(OSError, match="is finished and can be used, but its report was not written"):
        train(options)
    assert read_bundle(options.out).training["steps"] == 5


def test_a_bundle_is_a_folder(options, tmp_path):
    (tmp_path / "there").write_text("mine")
    with pytest.raises(TrainingError, match="there is a file; name the folder of a bundle"):
        train(replace(options, out=tmp_path / "there"))
    assert (tmp_path / "there").read_text() == "mine"


@pytest.mark.parametrize("after", ["reading the images", "before the first step"])
def test_stopping_before_the_first_step_writes_nothing(options, after):
    class Impatient(Notes):
        def should_stop(self):
            return after == "reading the images" or any("teacher's features" in line for line in self.said)

    with pytest.raises(TrainingStopped, match=after):
        train(options, Impatient())
    assert not options.out.exists()


def test_parts_are_not_turned_under_areas_that_stay_where_they_are(options):
    spec = replace(options.preprocess, ignore=np.eye(96, dtype=bool))
    with pytest.raises(TrainingError, match="--flip and --rotate would turn the ignored areas"):
        train(replace(options, preprocess=spec, turns=Turns(flip_vertical=True)))


def test_a_full_gpu_says_what_to_change(options, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("calibrate.trainer.Trainer.step", full)
    with pytest.raises(TrainingError, match="Try --tiles 2x2, --size small"):
        train(options)


def test_progress_shows_the_held_out_scores(options):
    notes = Notes()
    train(replace(options, steps=5), notes)
    looks = [line for line in notes.said if "held-out images" in line and line.startswith("step")]
    assert len(looks) == 4
    assert "|" in looks[0]


def test_cached_features_change_nothing(options, tmp_path):
    options = replace(options, steps=6, precision=resolve_precision("auto", torch.device("cpu")))
    with_cache = train(options)
    assert same_weights(with_cache, train(replace(options, cache_mib=0, out=tmp_path / "b")))


def test_the_teacher_describes_an_unaugmented_image_once(options):
    """Layout, whitening, statistics and steps share what comes before its last convolution."""
    good = load_good_images(options.dataset, 0.25, 0)
    teacher = find_teacher(None, "small", 0)
    looked = {}  # steps show the teacher augmented images, too: those do not count
    for budget_mib in (256, 0):
        cache = ImageCache(Preprocessor(options.preprocess), None, budget_mib)
        trainer = Trainer(options, good, cache, torch.device("cpu"), "fp32")
        seen: list[bytes] = []

        def remember(_layer, given, _result, seen=seen):
            seen.append(given[0].numpy().tobytes())

        trainer.model.teacher[0].register_forward_hook(remember)
        trainer.layout_share(teacher)
        trainer.prepare_teacher(teacher, whiten=True)
        losses = [float(trainer.step(step).hard.detach()) for step in range(len(good.train) + 3)]
        unaugmented = {trainer.images[index].tobytes() for index in range(len(good.train))}
        looked[budget_mib] = [image for image in seen if image in unaugmented], losses
    assert len(looked[256][0]) == len(good.train)
    assert len(looked[0][0]) > 3 * len(good.train)
    assert looked[256][1] == looked[0][1]


def test_images_that_fit_into_memory_are_decoded_once(options, monkeypatch):
    decoded: list[bytes] = []

    def counting(read):
        def counted(image, *declared):
            decoded.append(image if isinstance(image, bytes) else image.read_bytes())
            return read(image, *declared)

        return counted

    for read in (decode_contents, read_image):
        monkeypatch.setattr(dataset, read.__name__, counting(read))
    images = [path.read_bytes() for path in options.dataset.iterdir()]
    train(replace(options, steps=12))
    assert sorted(decoded) == sorted(images)
    decoded.clear()
    train(replace(options, steps=12, cache_mib=0, overwrite=True))
    assert len(decoded) > 2 * len(images)


def test_images_beside_the_memory_budget_are_decoded_anew(good_parts):
    files = [ImageFile(*pair) for pair in list_images(good_parts)][:3]
    preprocess = Preprocessor(PreprocessSpec(300, 300))  # 1.03 MiB each
    cache = ImageCache(preprocess, None, 3)
    images = PreparedImages(files, cache)
    wanted = [preprocess(decode_image(file.path), PixelFormat.BGR8) for file in files]
    for file in files:
        cache.add(file, decode_image(file.path))
    assert images[0] is images[0]
    assert images[1] is images[1]
    assert images[2] is not images[2]
    for found, right in zip(images, wanted, strict=True):
        np.testing.assert_array_equal(found, right)


def test_turned_parts(rng):
    image = rng.normal(size=(3, 20, 20)).astype(np.float32)
    flipped = {turn(image, Turns(flip_horizontal=True), np.random.default_rng(i)).tobytes() for i in range(8)}
    assert flipped == {image.tobytes(), np.ascontiguousarray(image[:, :, ::-1]).tobytes()}
    whole = {turn(image, Turns(True, True), np.random.default_rng(i)).tobytes() for i in range(20)}
    assert len(whole) == 4
    turned = turn(image, Turns(rotate_deg=180), np.random.default_rng(0))
    assert turned.shape == image.shape
    assert not np.allclose(turned, image)


def test_a_common_layout_is_what_place_explains(rng):
    scale = rng.uniform(0.1, 10, (1, 384, 1))
    layout, offset = rng.normal(size=(1, 384, 30)), rng.normal(size=(1, 384, 1))
    images = scale * (layout + 0.5 * rng.normal(size=(11, 384, 30)) + 5 * offset)
    images[:, 7] = 3.0  # a dead channel
    found = layout_share(torch.from_numpy(image).float() for image in images)
    normalised = np.delete(images, 7, axis=1)
    normalised = (normalised - normalised.mean((0, 2), keepdims=True)) / normalised.std((0, 2), keepdims=True)
    missed = normalised[1::2] - normalised[::2].mean(0)
    assert found == pytest.approx(1 - (missed**2).mean() / (normalised[1::2] ** 2).mean(), abs=1e-4)
    assert found > 0.6
    assert layout_share(torch.ones(384, 30) for _ in range(4)) == 1, "nothing to whiten"
    surfaces = (torch.from_numpy(rng.normal(size=(384, 30))).float() for _ in range(10))
    assert layout_share(surfaces) == pytest.approx(-0.2, abs=0.05), (
        "a mean of five explains nothing, and adds its own"
    )


@pytest.mark.parametrize(
    ("wanted", "whitened", "wanted_relative", "relative"),
    [(None, True, None, True), (False, False, None, False), (None, True, False, False), (False, False, True, True)],
)
def test_surfaces_are_whitened_and_maps_relative_unless_told_otherwise(
    options, rng, wanted, whitened, wanted_relative, relative
):
    surface = cv2.GaussianBlur(rng.integers(0, 256, (400, 400)).astype(np.uint8), (0, 0), 2)
    photos = options.out.parent / "surface"
    photos.mkdir()
    for index, (y, x) in enumerate(rng.integers(0, 300, (12, 2))):
        cv2.imwrite(str(photos / f"{index}.png"), surface[y : y + 96, x : x + 96])
    notes = Notes()
    told = replace(options, dataset=photos, whiten=wanted, relative_map=wanted_relative, steps=1)
    bundle = train(told, notes)
    assert bundle.training["whiten"] is whitened
    assert bundle.training["relative_map"] is relative
    assert (bundle.quantiles.st_levels is not None) is relative
    assert all((p.quantiles.st_levels is not None) is relative for p in bundle.precisions.values())
    assert any("a surface; features are whitened" in said for said in notes.said) == (wanted is None)
    assert ("expected.weight" in bundle.model.weights) is relative
    assert any("relative to what is expected" in said for said in notes.said) is relative
    # A version that does not know relative maps must refuse their bundle.
    assert json.loads((options.out / MANIFEST).read_text())["format"] == f"inspectord.bundle/{2 if relative else 1}"


def test_levels_are_those_of_training_images_so_that_the_threshold_keeps_its_promise(options):
    bundle = train(replace(options, relative_map=True, steps=1))
    good = load_good_images(options.dataset, options.held_out_share, options.seed)
    cache = ImageCache(Preprocessor(options.preprocess), None, 0)
    from pipeline.engine_cpu import CpuEngine
    from pipeline.scoring import Scorer

    engine, relative = CpuEngine(bundle.model), Scorer(options.geometry).relative_maps
    of_train, of_held_out = (
        relative.range_of(engine.infer(image)[0] for image in PreparedImages(files, cache))
        for files in (good.train, good.held_out)
    )
    assert astuple(bundle.quantiles.st_levels) == pytest.approx(astuple(of_train), rel=1e-3)
    assert astuple(of_held_out) != pytest.approx(astuple(of_train), rel=1e-2)


def test_a_training_can_be_calibrated_with_and_without_relative_maps(options):
    """What happens after the last step makes no other model: a checkpoint serves both."""
    notes = Notes()
    with pytest.raises(TrainingStopped):
        train(replace(options, relative_map=True), Notes(stop_after=2))
    bundle = train(replace(options, relative_map=False), notes)
    assert any("resuming from the checkpoint" in said for said in notes.said)
    assert bundle.quantiles.st_levels is None


def test_parts_in_one_position_are_not_whitened(options):
    notes = Notes()
    assert train(replace(options, steps=1), notes).training["whiten"] is False
    assert any("parts in one position" in said for said in notes.said)


def test_whitened_features_are_uncorrelated_over_the_training_images(options):
    good = load_good_images(options.dataset, 0.25, 0)
    cache = ImageCache(Preprocessor(options.preprocess), None, 0)
    trainer = Trainer(options, good, cache, torch.device("cpu"), "fp32")
    trainer.prepare_teacher(find_teacher("random", "small", 0), whiten=True)
    with torch.no_grad():
        pieces = [trainer.model.describe(torch.from_numpy(trainer.images[i])[None])[0].flatten(1) for i in range(9)]
    features = torch.cat(pieces, dim=1).double().numpy()
    np.testing.assert_allclose(features.mean(axis=1), 0, atol=1e-3)
    np.testing.assert_allclose(features.std(axis=1), 1, atol=1e-3)
    plain = Trainer(options, good, cache, torch.device("cpu"), "fp32")
    plain.prepare_teacher(find_teacher("random", "small", 0), whiten=False)
    with torch.no_grad():
        pieces = [plain.model.describe(torch.from_numpy(plain.images[i])[None])[0].flatten(1) for i in range(9)]

    def correlation(values):
        return np.abs(np.corrcoef(values) - np.eye(384)).mean()

    assert correlation(features) < 0.5 * correlation(torch.cat(pieces, dim=1).numpy())
