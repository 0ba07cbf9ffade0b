"""The calibration commands as a user types them."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys

import cv2
import pytest
import torch

from drivers.synthetic import PartRenderer, SyntheticOptions
from pipeline.geometry import Geometry
from pipeline.networks import EfficientAD, pdn
from tests.calibrate.test_foreign import anomalib_names


def inspectord(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "daemon.cli", *map(str, arguments)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    line = PartRenderer(SyntheticOptions(seed=3, width=96, height=96))
    for kind, count in (("good", 8), ("stain", 3)):
        (root / kind).mkdir()
        for i in range(count):
            cv2.imwrite(str(root / kind / f"{i}.png"), line.render(300 + i, kind).raw)
    return root


def test_train_evaluate_and_report(parts, tmp_path):
    photos, out = shutil.copytree(parts, tmp_path / "photos"), tmp_path / "model"
    said = inspectord(
        "train", photos / "good", "-o", out, "--preset", "quick", "--steps", 3, "--image-size", "64x64"
    )
    assert "teacher: " in said
    assert "8 different images" in said
    assert (out / "report" / "report.html").is_file()
    for _ in range(2):  # the second time, the first report's pictures lie there, too
        said = inspectord("evaluate", out, photos, "--json", tmp_path / "e.json", "--report", photos / "report")
        assert "image AU-ROC" in said
        assert "no mask" in said
        assert "the 1 that training held out stand in" in said
        facts = json.loads((tmp_path / "e.json").read_text())
        assert list(facts["kinds"]) == ["stain"]
        assert facts["kinds"]["stain"]["images"] == 3
        assert facts["run"]["training"]["preset"] == "quick"
        assert facts["run"]["training"]["whiten"] is False
        assert (photos / "report" / "report.html").is_file()
    inspectord("train", photos / "good", "-o", out, "--steps", 3, "--image-size", "64x64", "--overwrite")
    inspectord("evaluate", out, photos)
    said = inspectord("evaluate", out, parts, "--json", tmp_path / "no" / "e.json", code=2)
    assert "--json" in said
    said = inspectord("evaluate", out, photos, "--report", out / "bundle.json", code=2)
    assert "is a file; name a folder" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "fast"), "--preset"),
        (("--flip", "sideways"), "--flip"),
        (("--part", "part["), "--part"),
        (("--part", "part"), "needs a group: (part)"),
        (("--part", "tile(.)"), "is found in no name"),
        (("--teacher", "nobody"), "teachers that ship"),
    ],
)
def test_train_refuses_what_it_does_not_know(good_parts, tmp_path, arguments, message):
    assert message in inspectord("train", good_parts, "-o", tmp_path / "m", *arguments, code=2)


def test_import_a_teacher_and_train_with_it(good_parts, tmp_path):
    torch.save(pdn("small", 384, padded=False).state_dict(), tmp_path / "t.pth")
    teacher = tmp_path / "t.safetensors"
    said = inspectord("import", tmp_path / "t.pth", "-o", teacher)
    assert f"--teacher {teacher}" in said
    assert "exists; add --overwrite" in inspectord("import", tmp_path / "t.pth", "-o", teacher, code=2)
    said = inspectord(
        "train", good_parts, "-o", tmp_path / "m", "--teacher", teacher, "--steps", 2, "--image-size", "64x64"
    )
    assert "imported from a teacher file of the nelson1425 reference" in said
    assert "no such file" in inspectord("import", tmp_path / "none.pth", "-o", tmp_path / "x", code=2)


def test_import_of_a_whole_model_asks_for_good_images(tmp_path):
    for part in ("teacher", "student", "autoencoder"):
        torch.save(pdn("small", 384, padded=False).state_dict(), tmp_path / f"{part}_final.pth")
    assert "add --good DIR" in inspectord("import", tmp_path, "-o", tmp_path / "m", code=2)


def test_import_keeps_all_good_images_but_one_for_the_threshold_where_nothing_else_needs_them(good_parts, tmp_path):
    torch.manual_seed(0)
    model = EfficientAD("small", Geometry(256, 256)).eval()
    torch.save({"state_dict": anomalib_names(model)}, tmp_path / "m.ckpt")
    images = len(list(good_parts.glob("*.png")))
    arguments = ("import", tmp_path / "m.ckpt", "--good", good_parts, "-o")
    said = inspectord(*arguments, tmp_path / "most")
    assert f"the threshold comes from {images - 1} good images; it is too low if the model was trained on" in said
    assert f"1 good images to learn from, {images - 1} held out" in said
    assert "expected false-reject rate" in said
    assert "the wanted 1.00% needs about 100 held-out images" in said
    assert f"from {images // 4} held-out images" in inspectord(*arguments, tmp_path / "few", "--held-out", 0.25)
    parts = r"good_(\d)"  # of two digits, the first
    said = inspectord(*arguments, tmp_path / "parts", "--held-out", 0.25, "--part", parts)
    assert f"from {round(0.25 * min(images, 10))} held-out images" in said, "one photograph of each part"


def test_fetch_a_teacher_from_a_file_address(tmp_path):
    source = tmp_path / "t.bin"
    source.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    inspectord("fetch-teacher", source.as_uri(), "--sha256", digest, "-o", tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == b"weights"
    said = inspectord("fetch-teacher", source.as_uri(), "--sha256", "0" * 64, "-o", tmp_path / "u", code=1)
    assert "SHA-256 is" in said
    assert not (tmp_path / "u").exists()


def test_pretrain_and_teachers(tmp_path):
    said = inspectord("pretrain", "-o", tmp_path / "mine-small.safetensors", "--steps", 1, "--scenes", 100)
    assert "5.4 MB, SHA-256" in said
    assert "procedural" in inspectord("teachers")
    assert "--images" in inspectord("pretrain", "-o", tmp_path / "x", "--target", "photographs", code=2)


@pytest.mark.parametrize("own_images", [True, False])
def test_bench_train_prints_both_sides(good_parts, tmp_path, own_images):
    images = [good_parts] if own_images else []
    said = inspectord(
        "bench", "train", *images, "--steps", 1, "--image-size", "64x64", "--json", tmp_path / "b.json"
    )
    found = json.loads((tmp_path / "b.json").read_text())
    assert [side["side"] for side in found["results"]] == ["reference", "inspectord"]
    assert found["results"][0]["ratio_to_reference"] == 1
    assert found["machine"]["threads"] >= 1
    assert "mean loss" in said
