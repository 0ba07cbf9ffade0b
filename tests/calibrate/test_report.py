from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest

from calibrate.dataset import image_digest
from calibrate.evaluate import evaluate
from calibrate.listener import Listener, TrainingStopped
from calibrate.report import write_evaluation_report
from drivers.synthetic import PartRenderer, SyntheticOptions
from pipeline.bundle import read_bundle


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A test set of the simulated line in MVTec AD's layout, masks included."""
    root = tmp_path_factory.mktemp("tree")
    line = PartRenderer(SyntheticOptions(seed=3, width=96, height=96))
    for kind, count in (("good", 6), ("stain", 3), ("scratch", 8)):
        (root / "test" / kind).mkdir(parents=True)
        (root / "ground_truth" / kind).mkdir(parents=True)
        for i in range(count):
            part = line.render(800 + i, kind)
            cv2.imwrite(str(root / "test" / kind / f"{i}.png"), part.raw)
            if kind != "good":
                cv2.imwrite(str(root / "ground_truth" / kind / f"{i}_mask.png"), part.mask.astype(np.uint8) * 255)
    return root


@pytest.fixture(scope="module")
def result(tree, tiny_bundle):
    return evaluate(read_bundle(tiny_bundle), tree, "cpu")


def test_the_json_has_every_metric_between_0_and_1(result):
    facts = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(facts["image"]) == {"auroc", "ap", "f1_max"}
    assert set(facts["pixel"]) == {"auroc", "ap", "aupro"}
    assert set(facts["kinds"]) == {"scratch", "stain"}
    assert {"image_auroc", "pixel_aupro", "escapes", "escape_interval"} <= set(facts["kinds"]["stain"])
    for group in (facts["image"], facts["pixel"]):
        assert all(0 <= value <= 1 for value in group.values())
    threshold = facts["threshold"]
    assert (threshold["good"], threshold["defective"]) == (6, 11)
    assert threshold["false_reject_rate"] == threshold["false_rejects"] / 6
    assert threshold["escapes"] == sum(kind["escapes"] for kind in facts["kinds"].values())
    assert facts["run"]["layout"] == "MVTec AD"
    assert facts["run"]["images"] == 17


@pytest.mark.parametrize("looks", [5, 17 + 5])
def test_it_stops_where_it_is_asked_to_while_scoring_and_while_counting_pixels(tree, tiny_bundle, looks):
    class Impatient(Listener):
        looked = 0

        def should_stop(self):
            self.looked += 1
            return self.looked == looks

    where = "counting pixels" if looks > 17 else "scoring"
    with pytest.raises(TrainingStopped, match=f"stopped while {where}; nothing was written"):
        evaluate(read_bundle(tiny_bundle), tree, "cpu", listener=Impatient())


def test_a_defect_without_mask_is_left_out_of_the_pixel_metrics_and_said(tree, tiny_bundle, tmp_path):
    shutil.copytree(tree, tmp_path / "tree")
    (tmp_path / "tree/ground_truth/stain/0_mask.png").unlink()
    shutil.rmtree(tmp_path / "tree/ground_truth/scratch")
    found = evaluate(read_bundle(tiny_bundle), tmp_path / "tree", "cpu")
    assert found.without_mask == 9
    assert found.kinds["scratch"].pixel is None
    assert found.kinds["stain"].pixel is not None


def test_a_black_mask_is_no_mask(tree, tiny_bundle, tmp_path):
    shutil.copytree(tree, tmp_path / "tree")
    without, black = tmp_path / "tree/ground_truth/stain/0_mask.png", np.zeros((96, 96), np.uint8)
    without.unlink()
    wanted = evaluate(read_bundle(tiny_bundle), tmp_path / "tree", "cpu")
    cv2.imwrite(str(without), black)
    found = evaluate(read_bundle(tiny_bundle), tmp_path / "tree", "cpu")
    assert (wanted.without_mask, found.without_mask) == (1, 1)
    assert found.to_json()["pixel"] == wanted.to_json()["pixel"]


def test_held_out_images_stand_in_where_there_are_no_other_good_ones(tree, tiny_bundle, good_parts, tmp_path):
    shutil.copytree(good_parts, tmp_path / "photos/good")
    shutil.copytree(tree / "test/stain", tmp_path / "photos/stain")
    bundle = read_bundle(tiny_bundle)
    found = evaluate(bundle, tmp_path / "photos", "cpu")
    held_out = set(bundle.training["held_out_digests"])
    scored = {image_digest(s.image.file.path.read_bytes()) for s in found.scored if s.image.kind == "good"}
    assert scored == held_out
    assert found.stand_ins == found.false_rejects.of == len(held_out)
    assert len(found.seen) == 12 - len(held_out)
    assert found.to_json()["run"]["stand_ins"] == len(held_out)
    page = write_evaluation_report(found, bundle, tmp_path / "report").read_text()
    assert "the threshold was made for these very images" in page
    for s in list(found.scored):
        if s.image.kind == "good":  # neither a copy of a good image, nor one among the defective ones, counts
            shutil.copy(s.image.file.path, tmp_path / f"photos/good/again_{s.image.file.path.name}")
            shutil.copy(s.image.file.path, tmp_path / f"photos/stain/good_{s.image.file.path.name}")
    again = evaluate(bundle, tmp_path / "photos", "cpu")
    assert (again.stand_ins, again.image, again.escapes) == (found.stand_ins, found.image, found.escapes)
    shutil.rmtree(tmp_path / "photos")
    shutil.copytree(good_parts, tmp_path / "photos/good")
    shutil.copytree(tree / "test/stain", tmp_path / "photos/stain")
    shutil.copy(tree / "test/good/0.png", tmp_path / "photos/good/new.png")
    found = evaluate(bundle, tmp_path / "photos", "cpu")
    assert (found.stand_ins, found.false_rejects.of, len(found.seen)) == (0, 1, 12)


def test_images_that_training_saw_are_left_out(tree, tiny_bundle, good_parts, tmp_path):
    shutil.copytree(tree, tmp_path / "tree")
    shutil.copy(good_parts / "good_0.png", tmp_path / "tree/test/good/copy.png")
    found = evaluate(read_bundle(tiny_bundle), tmp_path / "tree", "cpu")
    assert found.seen == ["good/copy.png"]
    assert found.false_rejects.of == 6


def test_the_report_stands_alone(result, tiny_bundle, tmp_path):
    path = write_evaluation_report(result, read_bundle(tiny_bundle), tmp_path / "report")
    html = path.read_text()
    pictures = re.findall(r'<img src="([^"]+)"', html)
    assert pictures
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    assert not re.search(r'(href|src)="(?!data:)', html), "nothing is fetched from elsewhere"
    names = {p.name for p in path.parent.iterdir()}
    assert {"report.html", "scores.png", "roc.png", "pro.png", "example-scratch-best-0.png"} <= names
    assert len(names) == len(pictures) + 1
    shown = cv2.imread(str(path.parent / "example-scratch-best-0.png"))
    assert shown.shape[:2] == (96, 3 * 96 + 2 * 6), "photograph, map and mask side by side"
    for kind in ("good", "scratch", "stain"):
        assert f"<td>{kind}</td>" in html
    assert f"{100 * result.image.auroc:.1f}%" in html


def test_an_image_that_is_listed_twice_is_shown_twice(result, tiny_bundle, tmp_path):
    twice = replace(result, scored=[*result.scored, *result.scored])
    assert write_evaluation_report(twice, read_bundle(tiny_bundle), tmp_path / "report").is_file()


def test_training_leaves_a_report(tiny_bundle):
    html = (tiny_bundle / "report" / "report.html").read_text()
    assert "Held-out good images" in html
    assert (tiny_bundle / "report" / "losses.png").is_file()
    assert read_bundle(tiny_bundle).training["digests"]


def test_names_from_the_data_set_cannot_break_the_report(tree, tiny_bundle, tmp_path):
    shutil.copytree(tree, tmp_path / "tree")
    odd = "<b>&stain"
    (tmp_path / "tree/test/stain").rename(tmp_path / "tree/test" / odd)
    found = evaluate(read_bundle(tiny_bundle), tmp_path / "tree", "cpu")
    html = write_evaluation_report(found, read_bundle(tiny_bundle), tmp_path / "r").read_text()
    assert "<b>" not in html
    assert "&lt;b&gt;&amp;stain" in html
