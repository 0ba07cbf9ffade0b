from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from calibrate.evaluate import evaluate
from calibrate.layouts import (
    REPORT_MARK,
    DatasetError,
    Layout,
    layout_of,
    load_test_set,
    read_defects,
    read_labels,
    refuse_among_images,
    training_files,
)
from calibrate.report import write_evaluation_report
from pipeline.bundle import read_bundle


def image(path, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((20, 30), value, np.uint8))


def mask(path, value=255, *boxes):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((20, 30), np.uint8)
    for y, x, height, width in boxes or [(2, 3, 4, 5)]:
        pixels[y : y + height, x : x + width] = value
    cv2.imwrite(str(path), pixels)


def mvtec(root):
    for i in range(3):
        image(root / f"train/good/{i}.png")
    image(root / "test/good/000.png")
    image(root / "test/hole/000.png")
    image(root / "test/hole/001.png")
    mask(root / "ground_truth/hole/000_mask.png", 255, (2, 3, 4, 5), (10, 10, 2, 2))
    return root


def test_mvtec_ad(tmp_path):
    root = mvtec(tmp_path)
    assert layout_of(root) is Layout.MVTEC_AD
    assert [f.name for f in training_files(root).good] == ["0.png", "1.png", "2.png"]
    found = load_test_set(root)
    assert [(i.file.name, i.kind, len(i.masks)) for i in found.images] == [
        ("good/000.png", "good", 0),
        ("hole/000.png", "hole", 1),
        ("hole/001.png", "hole", 0),
    ]
    regions, saturating = read_defects(found, found.images[1], (20, 30))
    assert [r.saturation_px for r in regions] == [20, 4]
    assert saturating == []
    (region,), _ = read_defects(found, found.images[1], (20, 30), (slice(0, 8), slice(5, 30)))
    assert region.mask.shape == (8, 25)
    assert region.saturation_px == 4 * 3


def loco(root):
    mvtec(root)
    image(root / "validation/good/000.png")
    image(root / "test/logical_anomalies/000.png")
    truth = root / "ground_truth/logical_anomalies/000"
    mask(truth / "000.png", 255)
    mask(truth / "001.png", 254, (10, 10, 5, 10))
    config = [
        {"defect_name": "a", "pixel_value": 255, "saturation_threshold": 7, "relative_saturation": False},
        {"defect_name": "b", "pixel_value": 254, "saturation_threshold": 0.5, "relative_saturation": True},
    ]
    (root / "defects_config.json").write_text(json.dumps(config))
    return root


def test_mvtec_loco(tmp_path):
    root = loco(tmp_path)
    truth = root / "ground_truth/logical_anomalies/000"
    assert training_files(root).layout is Layout.MVTEC_LOCO
    assert [f.name for f in training_files(root).validation] == ["validation/good/000.png"]
    found = load_test_set(root)
    logical = next(i for i in found.images if i.kind == "logical_anomalies")
    _, saturating = read_defects(found, logical, (20, 30))
    assert [d.saturation_px for d in saturating] == [7, 25]
    mask(truth / "002.png", 9)
    logical = next(i for i in load_test_set(root).images if i.kind == "logical_anomalies")
    with pytest.raises(DatasetError, match=r"002\.png: grey value 9 is not in defects_config"):
        read_defects(found, logical, (20, 30))
    (root / "defects_config.json").write_text('[{"pixel_value": 1}]')
    with pytest.raises(DatasetError, match="list of defects"):
        load_test_set(root)
    shutil.rmtree(root / "test")
    with pytest.raises(DatasetError, match=r"has defects_config\.json but no test/"):
        load_test_set(root)


def visa(root):
    for split in ("candle", "pcb1"):
        for i in range(2):
            image(root / split / f"Data/Images/Normal/{i}.JPG")
        image(root / split / "Data/Images/Anomaly/0.JPG")
        mask(root / split / "Data/Masks/Anomaly/0.png", 1)
    lines = ["object,split,label,image,mask"]
    for name in ("candle", "pcb1"):
        lines += [
            f"{name},train,normal,{name}/Data/Images/Normal/0.JPG,",
            f"{name},test,normal,{name}/Data/Images/Normal/1.JPG,",
            f"{name},test,anomaly,{name}/Data/Images/Anomaly/0.JPG,{name}/Data/Masks/Anomaly/0.png",
        ]
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(lines) + "\n")
    return root / "candle"


def test_visa(tmp_path):
    candle = visa(tmp_path)
    assert layout_of(candle) is Layout.VISA
    assert [f.path for f in training_files(candle).good] == [candle / "Data/Images/Normal/0.JPG"]
    assert [i.kind for i in load_test_set(candle).images] == ["good", "anomaly"]
    regions, _ = read_defects(load_test_set(candle), load_test_set(candle).images[1], (20, 30))
    assert len(regions) == 1
    (candle / "image_anno.csv").write_text("image,label,mask\ncandle/Data/Images/Anomaly/0.JPG,melted wax,x\n")
    assert [i.kind for i in load_test_set(candle).images] == ["good", "melted wax"]
    with pytest.raises(DatasetError, match=r"name one of its objects, as .*candle"):
        load_test_set(tmp_path)
    whole = (tmp_path / "split_csv/1cls.csv").read_text()
    (tmp_path / "split_csv/1cls.csv").write_text("object,split\ncandle,train\n")
    with pytest.raises(DatasetError, match="row 2 has no label, image, mask"):
        load_test_set(candle)
    (tmp_path / "split_csv/1cls.csv").write_text(f"{whole}candle,test,anom")
    with pytest.raises(DatasetError, match="row 8 has no image, mask"):
        load_test_set(candle)
    (tmp_path / "split_csv/1cls.csv").write_bytes(b"object,split\ncandle,\xff\n")
    with pytest.raises(DatasetError, match=r"1cls\.csv: not a readable CSV file"):
        load_test_set(candle)


def mtd(root):
    for i in range(40):
        image(root / f"MT_Free/Imgs/exp{i}.jpg", 50 + i)
    image(root / "MT_Crack/Imgs/exp1.jpg")
    mask(root / "MT_Crack/Imgs/exp1.png")
    return root


def test_mtd(tmp_path):
    mtd(tmp_path)
    found = load_test_set(tmp_path)
    train = {f.path for f in training_files(tmp_path).good}
    test = {i.file.path for i in found.images if i.kind == "good"}
    assert found.layout is Layout.MTD
    assert len(train | test) == 40
    assert not train & test
    assert 20 <= len(train) <= 36
    assert [(i.kind, i.masks[0].name) for i in found.images if i.kind != "good"] == [("crack", "exp1.png")]


def test_photographs_of_one_tile_of_mtd_stay_on_one_side(tmp_path):
    mtd(tmp_path)
    tiles = [[(e, 1000 * tile + 15 * e) for e in range(1, 2 + tile % 6)] for tile in range(60)]
    tiles += [[(3, 100_000)], [(3, 100_020)], [(1, 100_200), (2, 100_220)]]  # a second tile; a third after a while
    for exposure, number in itertools.chain(*tiles):
        image(tmp_path / f"MT_Free/Imgs/exp{exposure}_num_{number}.jpg")
    train = {f.path.stem for f in training_files(tmp_path).good}
    test = {i.file.path.stem for i in load_test_set(tmp_path).images if i.kind == "good"}
    assert len(train | test) == 40 + sum(map(len, tiles))
    assert not train & test
    sides = [{f"exp{e}_num_{n}" in train for e, n in tile} for tile in tiles]
    assert all(len(side) == 1 for side in sides)
    assert 30 < sum(map(sum, sides)) < 56
    good = training_files(tmp_path).good
    parts = {file.path.stem: file.part for file in good}
    for tile in tiles:
        shown = {parts.get(f"exp{e}_num_{n}") for e, n in tile}
        assert len(shown) == 1
    assert None not in parts.values()


def folders(root):
    image(root / "good/1.png")
    image(root / "stain/1.png")
    mask(root / "ground_truth/stain/1.png")
    return root


@pytest.mark.parametrize("tree", [mvtec, loco, visa, mtd, folders])
def test_each_layout_is_evaluated(tree, tiny_bundle, tmp_path):
    bundle = read_bundle(tiny_bundle)
    found = evaluate(bundle, tree(tmp_path), "cpu")
    facts = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert facts["run"]["layout"] == found.test_set.layout.value
    assert set(facts["kinds"]) == {i.kind for i in found.test_set.images} - {"good"}
    for kind in facts["kinds"].values():
        assert 0 <= kind["image_auroc"] <= 1
        assert 0 <= kind["pixel_auroc"] <= 1
        assert 0 <= kind["pixel_aupro"] <= 1
        assert ("pixel_auspro" in kind) == (tree is loco)
    page = write_evaluation_report(found, bundle, tmp_path / "report")
    assert str(found.test_set.layout.value) in page.read_text()
    assert REPORT_MARK in page.read_bytes(), "what tells its pictures from photographs of parts"


def test_good_and_defect_folders(tmp_path):
    folders(tmp_path)
    image(tmp_path / "r/scores.png")
    (tmp_path / "r/report.html").write_text(f"<html>{REPORT_MARK.decode()}")
    assert [f.name for f in training_files(tmp_path).good] == ["1.png"]
    found = load_test_set(tmp_path)
    assert [(i.kind, len(i.masks)) for i in found.images] == [("good", 0), ("stain", 1)]
    image(tmp_path / "stain/wide.png")
    cv2.imwrite(str(tmp_path / "stain/1.png"), np.zeros((20, 31), np.uint8))
    with pytest.raises(DatasetError, match=r"mask is \(30, 20\) px, its image \(31, 20\)"):
        read_defects(found, found.images[1], (20, 31))


def test_defects_and_masks_are_never_taken_for_good_parts(tmp_path, monkeypatch):
    mvtec(tmp_path / "bottle")
    with pytest.raises(DatasetError, match=r"looks like several data sets.*bottle/ground_truth"):
        training_files(tmp_path)
    candle = tmp_path / "visa" / "candle"
    image(candle / "Data/Images/Normal/0.JPG")
    image(candle / "Data/Images/Anomaly/0.JPG")
    (tmp_path / "visa/split_csv").mkdir()
    rows = "object,split,label,image,mask\ncandle,train,normal,candle/Data/Images/Normal/0.JPG,\n"
    (tmp_path / "visa/split_csv/1cls.csv").write_text(rows)
    monkeypatch.chdir(candle)
    assert [f.path.name for f in training_files(Path()).good] == ["0.JPG"]
    for kind in ("Good", "OK", "NG", "Defects"):
        image(tmp_path / kind / "photos" / kind / "1.png")
        with pytest.raises(DatasetError, match=f"it holds {kind}.*good parts in good/, in small letters"):
            training_files(tmp_path / kind / "photos")
    image(tmp_path / "plain/good/1.png")
    image(tmp_path / "plain/hole/1.png")
    image(tmp_path / "plain/.thumbs/1.png")
    assert [i.kind for i in load_test_set(tmp_path / "plain").images] == ["good", "hole"]
    image(tmp_path / "parts/1.png")
    image(tmp_path / "parts/model/report/scores.png")
    (tmp_path / "parts/model/bundle.json").write_text("{}")
    image(tmp_path / "parts/r/scores.png")
    (tmp_path / "parts/r/report.html").write_text(f"<html>{REPORT_MARK.decode()}")
    assert [f.name for f in training_files(tmp_path / "parts").good] == ["1.png"]
    (tmp_path / "parts/r/report.html").write_text("<html>somebody else's")
    assert [f.name for f in training_files(tmp_path / "parts").good] == ["1.png", "r/scores.png"]


def test_masks_with_16_bits_and_small_labels_count(tmp_path):
    root = mvtec(tmp_path)
    labels = np.zeros((20, 30), np.uint16)
    labels[4:6, 4:9] = 1
    cv2.imwrite(str(root / "ground_truth/hole/001.png"), labels)
    found = load_test_set(root)
    (region,), _ = read_defects(found, found.images[2], (20, 30))
    assert region.saturation_px == 10


def test_names_that_are_not_utf_8_lose_no_masks(tmp_path):
    kind = os.fsdecode(b"gro\xdf")
    for name in ("good", kind):
        for file in ("1.png", os.fsdecode(b"\xdf.png")):
            image(tmp_path / "small.png")
            (tmp_path / name).mkdir(exist_ok=True)
            shutil.copy(tmp_path / "small.png", tmp_path / name / file)
    (tmp_path / "ground_truth").mkdir()
    shutil.copytree(tmp_path / kind, tmp_path / "ground_truth" / kind)
    found = load_test_set(tmp_path)
    assert [(i.kind, len(i.masks)) for i in found.images] == [("good", 0)] * 2 + [("gro\ufffd", 1)] * 2
    assert all(read_labels(mask).shape == (20, 30) for i in found.images for mask in i.masks)
    huge = tmp_path / "huge.pgm"
    huge.write_bytes(b"P5 100000 100000 255\n1")
    with pytest.raises(DatasetError, match=r"huge.pgm: not a readable image"):
        read_labels(huge)


def test_nothing_is_written_among_images_not_even_among_links_to_them(tmp_path):
    image(tmp_path / "there/1.png")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.png").symlink_to(tmp_path / "there/1.png")
    linked = training_files(tmp_path / "photos").good
    for folder in ("photos", "there"):
        with pytest.raises(DatasetError, match="holds images of the data set"):
            refuse_among_images(tmp_path / folder, linked)
    refuse_among_images(tmp_path / "photos/model", linked)


def test_what_cannot_be_used_says_so(tmp_path):
    with pytest.raises(DatasetError, match="no such folder"):
        load_test_set(tmp_path / "missing")
    image(tmp_path / "1.png")
    with pytest.raises(DatasetError, match="Known layouts: MVTec AD, MVTec LOCO, VisA, MTD"):
        load_test_set(tmp_path)
    image(tmp_path / "a/test/good/1.png")
    with pytest.raises(DatasetError, match="no train/good/"):
        training_files(tmp_path / "a")
